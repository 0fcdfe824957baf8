"""Cells: runs that are equal in size, tokens and every other setting, and differ in learning rate or batch alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import pandas as pd

from scaling.columns import DIVERGED, FINISHED
from scaling.laws.law import Inputs, Law
from scaling.table import RunTable, column_of

NUMBERS = (
    "total", "non_embedding", "active", "once", "recurrent", "hidden_size", "num_layers", "tokens", "unique_tokens",
    "seq_len", "final_lr", "warmup_tokens", "weight_decay", "beta1", "beta2", "streams", "recurrences", "parent_tokens",
)  # fmt: skip
TEXTS = ("schedule", "optimizer", "tokenizer", "data", "loss_kind", "precision")
DERIVED = ("flops", "flops_per_token")
"""Told of a cell, but not what it is: they follow from the settings."""
SAME = 0.02
"""Numbers this close are one setting: tokens rounded to whole batches, rates that were printed short."""


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


def levels(values: np.ndarray, same: float = SAME) -> np.ndarray:
    """Which level each value is of, counted from the lowest, (n,) of int; -1 where it is unknown.

    A new level begins where the next value is more than a factor 1 + `same` larger.
    """
    known, found = np.isfinite(values), np.full(len(values), -1)
    if known.any():
        unique = np.unique(values[known])
        scale = np.maximum(np.abs(unique[:-1]), 1e-300)
        steps = np.concatenate([[0], np.cumsum(np.diff(unique) > same * scale)])
        found[known] = steps[np.searchsorted(unique, values[known])]
    return found


def cells(table: RunTable, size: str, *, at_batch: bool = False) -> tuple[Cell, ...]:
    """The cells of a table, the cheapest first; with `at_batch` the batch is one of the settings that are equal.

    A setting that has one value for each learning rate, or for each batch, follows it and does not part cells: a final
    rate that is a tenth of the peak, a warm-up of a number of steps. Runs that are killed or still going are left out.
    ValueError if a column that is needed is unknown.
    """
    for column in (size, "tokens", "loss"):
        if not table.has(column):
            raise ValueError(f"column {column!r} is unknown in the table; optima of lr and batch need it")
    if not table.has("lr") and not table.has("batch_tokens"):
        raise ValueError("columns 'lr' and 'batch_tokens' are unknown in the table; optima need one of them")
    finished, diverged = outcomes(table.frame)
    numbers = {
        name: table.numbers(name) for name in (*NUMBERS, *DERIVED, "lr", "batch_tokens", "loss") if table.has(name)
    }
    texts = {name: table.frame[name].fillna("").to_numpy(dtype=str) for name in TEXTS if table.has(name)}
    unknown = np.full(len(table), np.nan)
    lr, batch = numbers.get("lr", unknown), numbers.get("batch_tokens", unknown)
    placed = finished | diverged
    for name in {size, "tokens", "lr", "batch_tokens"} & set(numbers):
        placed &= (numbers[name] > 0) & np.isfinite(numbers[name])
    found = []
    for rows in _groups(
        [levels(numbers[name]) for name in (size, "tokens", *(["batch_tokens"] if at_batch else []))], placed
    ):
        for inside in _groups(_parting(rows, numbers, texts, lr, batch), np.isin(np.arange(len(table)), rows)):
            ended, lost = inside[finished[inside]], inside[diverged[inside]]
            values = _shared({name: numbers[name][inside] for name in (*NUMBERS, *DERIVED) if name in numbers}, size)
            if at_batch:
                values["batch_tokens"] = float(np.median(batch[inside]))
            named = {name: str(column[inside[0]]) for name, column in texts.items()}
            lost = np.column_stack([lr[lost], batch[lost]])
            found.append(Cell(values, named, lr[ended], batch[ended], numbers["loss"][ended], lost))
    return tuple(sorted(found, key=lambda cell: (cell.values["flops"], cell.values["tokens"])))


def outcomes(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Which runs finished with a loss, and which diverged, (rows,) of bool each: by status, or with an infinite loss. A
    finished run of unknown loss is neither."""
    loss = pd.to_numeric(frame["loss"], errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    status = frame["status"].fillna(FINISHED).to_numpy() if "status" in frame else np.full(len(frame), FINISHED)
    ended = status == FINISHED
    return ended & np.isfinite(loss) & (loss > 0), (status == DIVERGED) | (ended & np.isinf(loss))


def _groups(keys: Sequence[np.ndarray], placed: np.ndarray) -> list[np.ndarray]:
    """Rows that are placed and equal in all keys, (rows,) each."""
    rows = np.flatnonzero(placed)
    if not keys or not len(rows):
        return [rows] if len(rows) else []
    group = np.unique(np.column_stack([key[rows] for key in keys]), axis=0, return_inverse=True)[1].ravel()
    return [rows[group == each] for each in range(group.max() + 1)]


def _parting(
    rows: np.ndarray,
    numbers: Mapping[str, np.ndarray],
    texts: Mapping[str, np.ndarray],
    lr: np.ndarray,
    batch: np.ndarray,
) -> list[np.ndarray]:
    """The settings that part these rows, as keys of all rows of the table."""
    axes, parting = (levels(lr[rows]), levels(batch[rows])), []
    for name in (*NUMBERS, *TEXTS):
        if name not in numbers and name not in texts:
            continue
        level = levels(numbers[name][rows]) if name in numbers else np.unique(texts[name][rows], return_inverse=True)[1]
        if level.min() < level.max() and not any(_follows(level, axis) for axis in axes):
            key = np.zeros(len(lr), dtype=int)
            key[rows] = level
            parting.append(key)
    return parting


def _follows(level: np.ndarray, axis: np.ndarray) -> bool:
    """Whether there is one level for each value of lr (or of the batch)."""
    return len(set(zip(axis, level, strict=True))) == len(set(axis)) > 1


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
