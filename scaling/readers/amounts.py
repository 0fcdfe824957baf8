"""Cells as numbers: with commas between thousands, units and margins of error, and among words for a number that is not
there."""

import re
from typing import Any

import numpy as np
import pandas as pd

from scaling.columns import DIVERGED, FINISHED, KILLED, RUNNING, STATUSES, normalised

UNITS = {"k": 1e3, "m": 1e6, "mm": 1e6, "b": 1e9, "bn": 1e9, "g": 1e9, "t": 1e12,
         "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}  # fmt: skip
OUTCOMES = {
    FINISHED: ("finished", "completed", "complete", "done", "success", "succeeded", "ok", "true", "converged"),
    DIVERGED: ("diverged", "nan", "inf", "infinity", "exploded", "unstable"),
    KILLED: ("killed", "crashed", "failed", "interrupted", "cancelled", "canceled", "preempted", "timeout", "oom"),
    RUNNING: ("running", "pending", "queued", "starting"),
}
MISSING = frozenset(("", "na", "none", "null", "missing", "unknown", "tbd"))
"""What a cell without a number holds, as `normalised` writes it: of "-" and "n/a" that leaves nothing and "na"."""
MARKS = " \t*~≈"
"""Around a number: bold in Markdown, and about."""
STRANGE = 0.1
"""Share of the cells that tell a number or a text from which on texts make a column none of numbers."""
_COUNT = re.compile(
    r"^([-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9][0-9_]*)(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)"
    r"(?:\s*(?:±|\+/?-)\s*[0-9.]+(?:[eE][+-]?[0-9]+)?|\s*\([0-9.]+\))?\s*(k|m|b|bn|t|)\s*(?:params|parameters|tokens)?$",
    re.I,
)


def numbers(values: pd.Series, *, units: bool = False) -> np.ndarray | None:
    """A column as floats, (rows,), NaN where it holds none; None if it is a column of texts. `units`: "70M" is 7e7."""
    if _is_numeric(values):
        return values.to_numpy(dtype=float, na_value=np.nan)
    parsed, strange = _read(values, units)
    told = np.sum(~np.isnan(parsed))
    return parsed if told and strange.sum() <= STRANGE * (told + strange.sum()) else None


def doubt(values: pd.Series, *, units: bool = False) -> tuple[str, float]:
    """What a column holds that is no number and no word for one that is not there, in words, and its share of the cells
    that hold anything; "" and 0 where there is nothing of it."""
    if _is_numeric(values):
        return "", 0.0
    parsed, strange = _read(values, units)
    if not (count := int(strange.sum())):
        return "", 0.0
    told = int(np.sum(~np.isnan(parsed))) + count
    row = int(np.flatnonzero(strange)[0])
    return f"{str(values.iloc[row])[:40]!r} in row {row + 1}, no number in {count} of {told} cells", count / told


def typical(values: np.ndarray) -> float:
    """The median of the finite values above zero; NaN of none."""
    values = values[np.isfinite(values) & (values > 0)]
    return float(np.median(values)) if values.size else float("nan")


def as_status(text: Any) -> str | None:
    """One of our statuses for what others call it; None for what is not known."""
    word = normalised(str(text))
    return next((status for status in STATUSES if word in OUTCOMES[status]), None)


def _is_numeric(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def _read(values: pd.Series, units: bool) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, NaN where there is none, and which cells hold something else, both (rows,)."""
    parsed, strange = np.full(len(values), np.nan), np.zeros(len(values), dtype=bool)
    for k, value in enumerate(values):
        if pd.isna(value):
            continue
        text = str(value).strip(MARKS)
        try:
            parsed[k] = float(text)
        except ValueError:
            match = _COUNT.match(text)
            if match and (units or not match[2]):
                parsed[k] = float(re.sub("[,_]", "", match[1])) * UNITS.get(match[2].lower(), 1.0)
            else:
                strange[k] = normalised(text) not in MISSING and as_status(text) in (None, FINISHED)
    return parsed, strange
