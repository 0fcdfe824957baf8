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
"""Numbers within this factor are one setting: tokens that were rounded to whole batches, rates that were printed short."""


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
    frame = table.frame.reset_index(drop=True)
    finished, diverged = outcomes(frame)
    lr, batch, loss, sizes, tokens = (_numbers(frame, name) for name in ("lr", "batch_tokens", "loss", size, "tokens"))
    placed = (finished | diverged) & (sizes > 0) & (tokens > 0)
    for name, values in (("lr", lr), ("batch_tokens", batch)):
        if table.has(name):
            placed &= values > 0
    base = pd.DataFrame({name: levels(_numbers(frame, name)) for name in (size, "tokens")})
    if at_batch:
        base["batch_tokens"] = levels(batch)
    found = []
    for _, whole in base[placed].groupby(list(base.columns), sort=True):
        rows = whole.index.to_numpy()
        keys = _parting(frame.iloc[rows], levels(lr)[rows], levels(batch)[rows])
        for _, part in keys.groupby(list(keys.columns), dropna=False, sort=True):
            inside = rows[part.index.to_numpy()]
            ended, lost = inside[finished[inside]], inside[diverged[inside]]
            values, texts = _shared(frame.iloc[inside], size, batch[inside] if at_batch else None)
            found.append(
                Cell(values, texts, lr[ended], batch[ended], loss[ended], np.column_stack([lr[lost], batch[lost]]))
            )
    return tuple(sorted(found, key=lambda cell: (cell.values["flops"], cell.values["tokens"])))


def outcomes(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Which runs finished with a loss, and which diverged, (rows,) of bool each; a loss that is no number diverged."""
    loss = _numbers(frame, "loss")
    status = frame["status"].fillna(FINISHED).to_numpy() if "status" in frame else np.full(len(frame), FINISHED)
    ended = status == FINISHED
    return ended & np.isfinite(loss) & (loss > 0), (status == DIVERGED) | (ended & ~np.isfinite(loss))


def _numbers(frame: pd.DataFrame, column: str) -> np.ndarray:
    if column not in frame:
        return np.full(len(frame), np.nan)
    return pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype=float, na_value=np.nan)


def _parting(frame: pd.DataFrame, lr: np.ndarray, batch: np.ndarray) -> pd.DataFrame:
    """The settings that part these runs, by position; a constant column if there are none."""
    parting = {"one": np.zeros(len(frame), dtype=int)}
    for name in (*NUMBERS, *TEXTS):
        if name not in frame:
            continue
        level = levels(_numbers(frame, name)) if name in NUMBERS else pd.factorize(frame[name])[0]
        if len(set(level)) > 1 and not _follows(level, lr) and not _follows(level, batch):
            parting[name] = level
    return pd.DataFrame(parting)


def _follows(level: np.ndarray, axis: np.ndarray) -> bool:
    """Whether there is one level for each value of lr (or of the batch)."""
    return len(set(zip(axis, level, strict=True))) == len(set(axis)) > 1


def _shared(frame: pd.DataFrame, size: str, batch: np.ndarray | None) -> tuple[dict[str, float], dict[str, str]]:
    """The numbers and texts that these runs share; tokens as their median, and FLOPs as 6 N D where unknown."""
    values: dict[str, float] = {}
    for name in (size, "tokens", *NUMBERS, *DERIVED):
        numbers = _numbers(frame, name)
        if name not in values and np.isfinite(numbers).all() and len(set(levels(numbers))) == 1:
            values[name] = float(np.median(numbers))
    values.setdefault("flops", 6 * values[size] * values["tokens"])
    if batch is not None:
        values["batch_tokens"] = float(np.median(batch))
    texts = {name: str(frame[name].iloc[0]) for name in TEXTS if name in frame and frame[name].nunique() == 1}
    return values, texts


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
