"""What a proposal costs: the excess of its loss over the best, measured on a grid or expected from draws."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.spatial import Delaunay

from scaling.cells import levels
from scaling.optima.cells import Cell

How = Literal["nearest", "linear"]


def regrets(cells: Sequence[Cell], lr: np.ndarray, batch_tokens: np.ndarray, how: How = "nearest") -> np.ndarray:
    """The excess loss (a share) of a proposal for each cell, (n,): see `regret`."""
    return np.array([regret(*each, how) for each in zip(cells, lr, batch_tokens, strict=True)])


def regret(cell: Cell, lr: float, batch_tokens: float, how: How = "nearest") -> float:
    """The excess loss of (lr, batch) over the best run of its cell, as a share of it.

    "nearest" takes the run that is nearest in (ln lr, ln batch), "linear" interpolates between measured runs and is NaN
    outside of their hull: the grid does not tell it. Only finished runs count. A batch that does not vary is not asked.
    """
    excess = cell.loss / cell.loss.min() - 1
    axes = [(cell.lr, lr), (cell.batch, batch_tokens)]
    axes = [(values, asked) for values, asked in axes if len(set(levels(values))) > 1]
    if not axes:
        return float("nan")
    z, asked = np.log(np.column_stack([values for values, _ in axes])), np.log([asked for _, asked in axes])
    if how == "nearest":
        return float(excess[np.argmin(((z - asked) ** 2).sum(axis=1))])
    if how != "linear":
        raise ValueError(f"how {how!r}: accepted is nearest or linear")
    if len(axes) == 2:
        return _interpolated(z, excess, asked)
    order = np.argsort(z[:, 0])
    return float(np.interp(asked[0], z[order, 0], excess[order], left=np.nan, right=np.nan))


def _interpolated(z: np.ndarray, values: np.ndarray, asked: np.ndarray) -> float:
    """Linear within the triangle of runs around a point; NaN outside of their hull."""
    triangles = Delaunay(z)
    number = int(triangles.find_simplex(asked))
    if number < 0:
        return float("nan")
    corners = triangles.simplices[number]
    weights = np.linalg.solve(np.vstack([z[corners].T, np.ones(3)]), np.r_[asked, 1.0])
    return float(weights @ values[corners])


def expected_regret(off: np.ndarray, curvature: np.ndarray) -> float:
    """Mean of off' curvature off / 2 over draws of how far the optimum lies from the proposal in logarithms, (B, d)."""
    return float(np.einsum("bi,ij,bj->b", off, curvature, off).mean() / 2)
