"""The tokens after which growing did best, from runs that grew at different times: what the timing law is fitted to."""

import numpy as np

from scaling.cells import grouped, levels
from scaling.frontier import SAME_COMPUTE, parabola
from scaling.inputs import compute
from scaling.laws.law import Inputs
from scaling.table import RunTable

LEAST_TIMES = 4
"""Growth times that a parabola in ln d is drawn through: one more than it has coefficients."""


def growth_optima(table: RunTable, used: np.ndarray, size: str) -> tuple[Inputs, np.ndarray]:
    """N and C, (cells,) each, and d*, (cells,): of each cell of equal size and compute the vertex of ln loss over ln d.

    d are the parent's tokens of a grown run, C its FLOPs with its ancestors'. Cells of fewer than four times, or whose
    vertex is not between them, are left out. `used` (rows,) of bool; size is the column that N means.
    """
    if not (table.has("parent_tokens") and table.has(size)):
        return {"N": np.empty(0), "C": np.empty(0)}, np.empty(0)
    grown, total, loss = table.numbers("parent_tokens"), compute(table, size), table.numbers("loss")
    rows = used & (grown > 0) & np.isfinite(total) & (table.numbers(size) > 0) & (loss > 0)
    grown, total, loss, sizes = grown[rows], total[rows], loss[rows], table.numbers(size)[rows]
    cell = grouped([levels(sizes), levels(total, SAME_COMPUTE)]) if rows.any() else np.empty(0, dtype=int)
    found = []
    for own in (cell == each for each in np.unique(cell)):
        if len(set(levels(grown[own]))) < LEAST_TIMES:
            continue
        vertex = parabola(np.log(grown[own]), np.log(loss[own]), np.ones((1, int(own.sum()))))[0][0]
        if np.isfinite(vertex):
            found.append((np.exp(np.log(sizes[own]).mean()), np.exp(np.log(total[own]).mean()), np.exp(vertex)))
    size_of, compute_of, optimum = np.array(found).reshape(-1, 3).T
    return {"N": size_of, "C": compute_of}, optimum
