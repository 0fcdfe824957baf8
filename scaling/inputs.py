"""The inputs of a law, taken from the rows of a table."""

from collections.abc import Iterable

import numpy as np

from scaling.laws.law import Inputs
from scaling.table import RunTable, column_of


def compute(table: RunTable, size: str) -> np.ndarray:
    """FLOPs of each run, and 6 N D where the table has none; NaN where neither is known, (rows,)."""
    known = table.numbers("flops") if table.has("flops") else np.full(len(table), np.nan)
    if table.has(size) and table.has("tokens"):
        return np.where(np.isfinite(known), known, 6 * table.numbers(size) * table.numbers("tokens"))
    return known


def of_rows(table: RunTable, symbols: Iterable[str], size: str) -> Inputs:
    """By symbol, (rows,) each; NaN where a row does not know it. C falls back to 6 N D."""
    found = {}
    for symbol in symbols:
        column = column_of(symbol, size)
        if symbol == "C":
            found[symbol] = compute(table, size)
        else:
            found[symbol] = table.numbers(column) if table.has(column) else np.full(len(table), np.nan)
    return found
