"""What counts as equal, and cells: runs of equal size, tokens and settings, which differ in learning rate or batch."""

from collections.abc import Sequence

import numpy as np

from scaling.columns import TEXTS
from scaling.table import RunTable

AXES = ("lr", "batch_tokens")
MODEL_AND_DATA = (
    "total", "non_embedding", "active", "once", "recurrent", "unique_tokens", "streams", "recurrences", "parent_tokens",
    "tokenizer", "data", "loss_kind",
)  # fmt: skip
"""What a law of the loss may depend on, beside tokens: runs that differ in it never share a cell."""
TRAINING = (
    "hidden_size", "num_layers", "seq_len", "final_lr", "warmup_tokens", "weight_decay", "beta1", "beta2", "schedule",
    "optimizer", "precision",
)  # fmt: skip
"""What one tunes, or leaves as it is: a law of the loss is of the best of it, laws of lr and batch hold at each."""
SAME = 0.02
"""Numbers this close are one setting: tokens rounded to whole batches, rates that were printed short."""


def levels(values: np.ndarray, same: float = SAME) -> np.ndarray:
    """Which level each value is of, counted from the lowest, (n,) of int; -1 where it is unknown.

    A new level begins where a value is more than a factor 1 + `same` larger than the lowest of the level before, so
    that a dense row of values, as of checkpoints, is not one level.
    """
    known, found = np.isfinite(values), np.full(len(values), -1)
    unique, starts, place = np.unique(values[known]), [], 0
    while place < len(unique):
        starts.append(unique[place])
        place = np.searchsorted(unique, starts[-1] + same * max(abs(starts[-1]), 1e-300), side="right")
    found[known] = np.searchsorted(starts, values[known], side="right") - 1
    return found


def grouped(keys: Sequence[np.ndarray]) -> np.ndarray:
    """A number for each row, equal where all keys are, in the order of the keys, (n,) of int. Keys (n,) of int."""
    return np.unique(np.column_stack(keys), axis=0, return_inverse=True)[1].ravel()


def cells_of(
    table: RunTable, size: str, *, placed: np.ndarray | None = None, at_batch: bool = False, tuned: bool = False
) -> list[np.ndarray]:
    """The rows of each cell, indices (m,) each: runs that are equal in the column `size`, tokens, and all else.

    Of `TRAINING` a setting that has one value for each learning rate, or for each batch, follows it and does not part
    cells: a final rate that is a tenth of the peak, a warm-up of a number of steps. With `tuned` none of them does, as
    lr and batch do not: then a cell is what one tunes a run for. With `at_batch` the batch is one of the settings that
    are equal. `placed`, (rows,) of bool: the rows that count, all if not given. A value that is unknown equals another
    one that is.
    """
    rows = np.arange(len(table)) if placed is None else np.flatnonzero(placed)
    if not len(rows):
        return []
    outer = [name for name in (size, "tokens", *(["batch_tokens"] if at_batch else [])) if table.has(name)]
    found = _parts(rows, [levels(table.numbers(name)[rows]) for name in outer])
    columns = {name: _ways(table, name) for name in (*MODEL_AND_DATA, *TRAINING) if table.has(name)}
    axes = [table.numbers(name) for name in AXES if table.has(name)]
    cells = []
    for cell in found:
        numbers = [levels(each[cell]) for each in axes]
        parting = [
            level
            for name, ways in columns.items()
            if (level := _fewest([_levels(values[cell]) for values in ways])).min() < level.max()
            and (name in MODEL_AND_DATA or not (tuned or any(_follows(level, axis) for axis in numbers)))
        ]
        cells += _parts(cell, parting)
    return cells


def _ways(table: RunTable, name: str) -> list[np.ndarray]:
    """Numbers or texts, (rows,) each: the ways in which a setting may have been chosen, equal in one of which is equal.

    A final rate is a number, or a share of the peak; the last one of a log is a step short of the end, and is then one
    share for each batch.
    """
    if name in TEXTS:
        return [table.frame[name].fillna("").to_numpy(dtype=str)]
    values = table.numbers(name)
    if name != "final_lr" or not table.has("lr"):
        return [values]
    with np.errstate(divide="ignore", invalid="ignore"):  # a rate of zero has no shares
        return [values, values / table.numbers("lr")]


def _fewest(levels: Sequence[np.ndarray]) -> np.ndarray:
    """The levels of the way that has the fewest."""
    return min(levels, key=np.max)


def _levels(values: np.ndarray) -> np.ndarray:
    return levels(values) if values.dtype.kind == "f" else np.unique(values, return_inverse=True)[1]


def _parts(rows: np.ndarray, keys: Sequence[np.ndarray]) -> list[np.ndarray]:
    """These rows in groups that are equal in all keys, (rows,) each."""
    if not keys:
        return [rows]
    number = grouped(keys)
    return [rows[number == each] for each in range(number.max() + 1)]


def _follows(level: np.ndarray, axis: np.ndarray) -> bool:
    """Whether there is one level for each value of lr (or of the batch)."""
    return len(set(zip(axis, level, strict=True))) == len(set(axis)) > 1
