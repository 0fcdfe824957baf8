"""The cells of a table with the losses, rates and batches of their runs, and what laws read of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import pandas as pd

from scaling.cells import AXES, MODEL_AND_DATA, TRAINING, cells_of, levels
from scaling.columns import DIVERGED, FINISHED, TEXTS
from scaling.laws.law import Inputs, Law
from scaling.table import RunTable, column_of

DERIVED = ("flops", "flops_per_token")
"""Told of a cell, but not what it is: they follow from the settings."""


@dataclass(frozen=True)
class Cell:
    values: Mapping[str, float]
    """Its numbers by column, with `flops`."""
    texts: Mapping[str, str]
    lr: np.ndarray
    """Of the finished runs, (n,); NaN where the table does not know it. So with the batch in tokens, and the loss."""
    batch: np.ndarray
    loss: np.ndarray
    diverged: np.ndarray
    """Learning rate and batch of the diverged runs, (m, 2)."""

    def __len__(self) -> int:
        return len(self.loss)


def cells(table: RunTable, size: str, *, at_batch: bool = False) -> tuple[Cell, ...]:
    """The cells of a table, the cheapest first; with `at_batch` the batch is one of the settings that are equal.

    Runs that are killed or still going are left out.
    ValueError if a column that is needed is unknown.
    """
    for column in (size, "tokens", "loss"):
        if not table.has(column):
            raise ValueError(f"column {column!r} is unknown in the table; optima of lr and batch need it")
    if not table.has("lr") and not table.has("batch_tokens"):
        raise ValueError("columns 'lr' and 'batch_tokens' are unknown in the table; optima need one of them")
    finished, diverged = outcomes(table.frame)
    told = [name for name in ("tokens", *MODEL_AND_DATA, *TRAINING, *DERIVED) if name not in TEXTS and table.has(name)]
    texts = [name for name in (*MODEL_AND_DATA, *TRAINING) if name in TEXTS and table.has(name)]
    unknown = np.full(len(table), np.nan)
    lr, batch = (table.numbers(name) if table.has(name) else unknown for name in AXES)
    loss, placed = table.numbers("loss"), finished | diverged
    for values in (table.numbers(name) for name in (size, "tokens", *AXES) if table.has(name)):
        placed &= (values > 0) & np.isfinite(values)
    found = []
    for rows in cells_of(table, size, placed=placed, at_batch=at_batch):
        ended, lost = rows[finished[rows]], rows[diverged[rows]]
        values = _shared({name: table.numbers(name)[rows] for name in told}, size)
        if at_batch:
            values["batch_tokens"] = float(np.median(batch[rows]))
        named = {name: str(table.frame[name].fillna("")[rows[0]]) for name in texts}
        lost = np.column_stack([lr[lost], batch[lost]])
        found.append(Cell(values, named, lr[ended], batch[ended], loss[ended], lost))
    return tuple(sorted(found, key=lambda cell: (cell.values["flops"], cell.values["tokens"])))


def outcomes(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Which runs finished with a loss, and which diverged, (rows,) of bool each: by status, or with an infinite loss. A
    finished run of unknown loss is neither."""
    loss = pd.to_numeric(frame["loss"], errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    status = frame["status"].fillna(FINISHED).to_numpy() if "status" in frame else np.full(len(frame), FINISHED)
    ended = status == FINISHED
    return ended & np.isfinite(loss) & (loss > 0), (status == DIVERGED) | (ended & np.isinf(loss))


def _shared(numbers: Mapping[str, np.ndarray], size: str) -> dict[str, float]:
    """The numbers that a cell's runs share, the size and tokens first; FLOPs as 6 N D where unknown."""
    values = {}
    for name in dict.fromkeys((size, "tokens", *numbers)):
        level = levels(numbers[name])
        if level.min() == level.max() >= 0:
            values[name] = float(np.median(numbers[name]))
    values.setdefault("flops", 6 * values[size] * values["tokens"])
    return values


def inputs(law: Law, settings: Sequence[Mapping[str, float]], size: str) -> Inputs:
    """What a law reads of cells, by its symbols, (n,) each. ValueError naming a column that some cell does not have."""
    found = {}
    for symbol in law.inputs:
        column = column_of(symbol, size)
        known = [each for each in settings if column in each]
        if len(known) < len(settings):
            there = sorted(set.intersection(*(set(each) for each in settings)))
            near = get_close_matches(column, there, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(there)}"
            raise ValueError(
                f"law {law.name!r} needs {column!r}, which not all cells have as one positive number{hint}"
            )
        found[symbol] = np.array([each[column] for each in settings], dtype=float)
        if not (found[symbol] > 0).all():
            raise ValueError(f"law {law.name!r}: {column!r} is {found[symbol].min()} in a cell; accepted is above 0")
    return found
