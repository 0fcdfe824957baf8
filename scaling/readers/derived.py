"""Columns that follow from others. What is known is never replaced; every formula is told in the mapping."""

import re
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from scaling.columns import normalised
from scaling.laws.timescale import timescale
from scaling.readers.amounts import UNITS, numbers, typical
from scaling.readers.mapping import RATIOS, SIZES, Mapped

MODELS = ("model", "modelname", "modelid", "arch", "architecture", "checkpoint")
"""Columns that may name a model, with its size in the name."""
_AMOUNT = re.compile(
    r"(?<![A-Za-z0-9.,])(?<!(?<![A-Za-z0-9])\d_)(\d+(?:\.\d+)?)[ ]?([MBmb])(?![A-Za-z0-9])(?![\s_\-]*(?i:tok))"
)
_OF_ANOTHER = re.compile(
    r"(?<![a-z0-9])(?:tok|tokens?|data|dataset|d|batch|batchsize|bs|bsz|b|ctx|context|seq|seqlen|steps?|iters?|int|fp|lr)"
    r"[\s_=:\-]*$",
    re.I,
)
"""What before an amount says that it is of something else."""
SURELY_TOKENS = 32_768
"""A typical batch above this is one of tokens: so many sequences are in no batch."""
APPROXIMATE = {"tokens": "C / (6 N)", "total": "C / (6 D)"}
"""Rules of thumb that a fit then rests on: their rows are labelled. They forget attention, embedding and head."""


def resolve_batch(found: Mapped, where: str) -> None:
    """Tell a batch of tokens from one of sequences, by tokens = steps x batch x seq_len where these are known and by
    its size where not. A batch that stays ambiguous is left out, with a note."""
    frame = found.frame
    for column, other in (("batch_sequences", "batch_tokens"), ("batch_tokens", "batch_sequences")):
        name = found.mapping.get(column)
        if name is None or other in frame or normalised(name) == normalised(column):
            continue
        batch, is_symbol = frame[column].to_numpy(dtype=float), len(name) == 1
        if column == "batch_tokens" and not is_symbol:
            continue
        ratio = _sequence_length(frame, batch)
        is_tokens = ratio == 1 if ratio else typical(batch) > SURELY_TOKENS
        is_sequences = bool(ratio and ratio > 1) or (not is_symbol and not is_tokens)
        if is_tokens == is_sequences:
            frame.drop(columns=column, inplace=True)
            del found.mapping[column]
            found.notes.append(
                f"{where}: {name!r} may be tokens or sequences of a batch; give columns batch_tokens or "
                f'batch_sequences="{name}"'
            )
        elif is_tokens != (column == "batch_tokens"):
            frame.rename(columns={column: other}, inplace=True)
            found.mapping[other] = found.mapping.pop(column)
            found.notes.append(f"{where}: {name!r} is taken for {'tokens' if is_tokens else 'sequences'} of a batch")
        return


def _sequence_length(frame: pd.DataFrame, batch: np.ndarray) -> float | None:
    """tokens / (steps x batch) where it is one whole number for nearly all rows, to half a percent; else None."""
    if "tokens" not in frame or "steps" not in frame:
        return None
    with np.errstate(all="ignore"):
        ratio = frame["tokens"].to_numpy(dtype=float) / (frame["steps"].to_numpy(dtype=float) * batch)
    middle = typical(ratio)
    if not np.isfinite(middle) or middle < 0.95:
        return None
    whole, known = round(middle), np.isfinite(ratio)
    is_equal = np.mean(np.abs(ratio[known] / whole - 1) < (0.05 if whole == 1 else 5e-3)) >= 0.95
    return float(whole) if is_equal else None


def complete(frame: pd.DataFrame, mapping: dict[str, str]) -> pd.DataFrame:
    """Fill what follows from other columns, row by row; adds the formulas to `mapping`."""
    frame = frame.copy()
    labels = {index: [] for index in frame.index}

    def known(name: str) -> np.ndarray:
        return frame[name].to_numpy(dtype=float, na_value=np.nan) if name in frame else np.full(len(frame), np.nan)

    def fill(name: str, values: np.ndarray, formula: str) -> None:
        present = known(name)
        fresh = ~np.isfinite(present) & np.isfinite(values) & (values > 0)
        if not fresh.any():
            return
        frame[name] = np.where(fresh, values, present)
        mapping[name] = f"{mapping[name]}; else {formula}" if name in mapping else formula
        if APPROXIMATE.get(name) == formula:
            for index in frame.index[fresh]:
                labels[index].append(f"{name} = {formula}")

    with np.errstate(all="ignore"):
        fill("seq_len", _lengths(frame), "tokens / (steps * batch_sequences)")
        fill("batch_tokens", known("batch_sequences") * known("seq_len"), "batch_sequences * seq_len")
        fill("batch_sequences", known("batch_tokens") / known("seq_len"), "batch_tokens / seq_len")
        fill("tokens", known("steps") * known("batch_tokens"), "steps * batch_tokens")
        fill("tokens", known("flops") / known("flops_per_token"), "flops / flops_per_token")
        for name in frame.columns:
            if normalised(str(name)) in RATIOS or str(name) == "D/N":
                fill("tokens", _size(frame, SIZES) * numbers(frame[name]), f"{name} * parameters")
        fill("tokens", known("flops") / (6 * _size(frame, SIZES)), "C / (6 N)")
        if not np.isfinite(_size(frame, SIZES)).any():
            fill("total", known("flops") / (6 * known("tokens")), "C / (6 D)")
        fill("steps", known("tokens") / known("batch_tokens"), "tokens / batch_tokens")
        fill("flops", known("flops_per_token") * known("tokens"), "flops_per_token * tokens")
        fill("flops", 6 * _size(frame, ("active", "total", "non_embedding")) * known("tokens"), "6 N D")
        decayed = timescale(known("batch_tokens"), known("lr"), known("weight_decay"), known("tokens"))
        fill("timescale", decayed, "batch_tokens / (lr * weight_decay * tokens)")
        for name in frame.columns:
            if (
                normalised(str(name)) in ("epochs", "numepochs", "nepochs", "repeats")
                and numbers(frame[name]) is not None
            ):
                fill("unique_tokens", known("tokens") / np.maximum(numbers(frame[name]), 1), f"tokens / {name}")
    if any(labels.values()):
        before = frame["labels"] if "labels" in frame else pd.Series(None, index=frame.index, dtype=object)
        frame["labels"] = [join(before[index], *labels[index]) for index in frame.index]
    return frame


def join(labels: str | None, *more: str) -> str | None:
    """Labels with more of them, none twice."""
    there = [] if labels is None or pd.isna(labels) else labels.split("; ")
    return "; ".join(dict.fromkeys([*there, *more])) or None


def unknown(frame: pd.DataFrame) -> list[str]:
    """What a reader should be told of columns that stay unknown although something close to them is there."""

    def has(name: str) -> bool:
        return name in frame and bool(frame[name].notna().any())

    notes = []
    if has("batch_sequences") and not has("batch_tokens"):
        notes.append(
            "batch_tokens stays unknown: the batch is in sequences, of unknown length; give constants seq_len=..."
        )
    if not has("tokens"):
        notes.append("tokens stays unknown; name its column, or give constants tokens=...")
    if not any(map(has, SIZES)):
        notes.append("no size is known; name the column of total, non_embedding or active")
    return notes


def _lengths(frame: pd.DataFrame) -> np.ndarray:
    nothing = np.full(len(frame), np.nan)
    if "batch_sequences" not in frame:
        return nothing
    length = _sequence_length(frame, frame["batch_sequences"].to_numpy(dtype=float))
    return np.full(len(frame), length) if length else nothing


def _size(frame: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """The first of these sizes that a row knows, (rows,)."""
    size = np.full(len(frame), np.nan)
    for name in columns:
        if name in frame:
            values = frame[name].to_numpy(dtype=float, na_value=np.nan)
            size = np.where(np.isfinite(size), size, values)
    return size


def sizes_in_names(frame: pd.DataFrame, mapping: dict[str, str], given: Collection[str]) -> list[str]:
    """Where neither a size nor FLOPs are known or `given`, take the size from the names of runs or models, such as
    "pythia-70m", if each has exactly one; returns the notes on it."""
    known = [name for name in ("flops", *SIZES) if name in given or (name in frame and frame[name].notna().any())]
    for name in [] if known else [each for each in frame if each == "run" or normalised(str(each)) in MODELS]:
        sizes = np.array([_size_in(str(each)) for each in frame[name]])
        if np.isnan(sizes).any() or any(_are_equal(sizes, frame, each) for each in ("tokens", "batch_tokens")):
            continue
        frame["total"], mapping["total"] = sizes, f"size in the name of {name}"
        return [
            f"no size is known but that in {name!r}, such as {str(frame[name].iloc[0])[:60]!r}: rounded, with or "
            'without embeddings as whoever named it had it; columns total="" leaves it out'
        ]
    return []


def _size_in(name: str) -> float:
    """NaN unless there is exactly one amount in a name, above zero, and no word before it that says of what else."""
    found = list(_AMOUNT.finditer(name))
    if len(found) != 1 or _OF_ANOTHER.search(name[: found[0].start()]):
        return float("nan")
    return float(found[0][1]) * UNITS[found[0][2].lower()] or float("nan")


def _are_equal(sizes: np.ndarray, frame: pd.DataFrame, column: str) -> bool:
    """Whether an amount is not of parameters but of this column."""
    if column not in frame:
        return False
    there = pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype=float)
    known = there > 0
    return bool(known.any() and np.max(np.abs(np.log(sizes[known] / there[known]))) < 0.05)
