"""A table of runs, and what is known of how it came about."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from scaling.columns import NAMES, TEXTS
from scaling.laws.law import SYMBOLS


@dataclass(frozen=True)
class RunTable:
    """One row a run, in the columns of `scaling.columns` (those that are known; a foreign table's others follow)."""

    frame: pd.DataFrame
    mapping: dict[str, str] = field(default_factory=dict)
    """Column to the name it had where it was read, or to the formula it was derived by."""
    notes: tuple[str, ...] = ()
    """What a reader of the report should know of the table as a whole."""
    fingerprint: str = ""
    """SHA-256 of what was read."""

    def __len__(self) -> int:
        return len(self.frame)

    def has(self, column: str) -> bool:
        """Whether any row knows this column."""
        return column in self.frame and bool(self.frame[column].notna().any())

    def numbers(self, column: str) -> np.ndarray:
        """A column as floats, NaN where unknown, (rows,)."""
        return self.frame[column].to_numpy(dtype=float, na_value=np.nan)

    def where(self, kept: np.ndarray) -> "RunTable":
        """Only these rows, (rows,) of bool."""
        return RunTable(self.frame[kept].reset_index(drop=True), self.mapping, self.notes, self.fingerprint)


def column_of(symbol: str, size: str) -> str:
    """The column behind a formula's symbol, with N meaning the column `size`."""
    return size if symbol == "N" else SYMBOLS.get(symbol, symbol)


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """The known columns first and in order, numbers as floats, texts as strings or None."""
    known = [name for name in NAMES if name in frame]
    frame = frame[known + [name for name in frame if name not in NAMES]].copy()
    for name in known:
        if name in TEXTS:
            texts = [None if pd.isna(value) else str(value) for value in frame[name]]
            frame[name] = pd.Series(texts, index=frame.index, dtype=object)
        else:
            frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(float)
    return frame
