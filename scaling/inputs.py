"""The inputs of a law, taken from the rows of a table or from the cells of bowls."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from scaling.laws.law import Inputs
from scaling.results import Bowl
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


def of_cell(cell: Mapping[str, float], symbols: Iterable[str], size: str) -> dict[str, float]:
    """The same of one cell, given by column; NaN where it does not tell."""
    found = {symbol: float(cell.get(column_of(symbol, size), np.nan)) for symbol in symbols}
    if "C" in found and np.isnan(found["C"]):
        found["C"] = 6 * float(cell.get(size, np.nan)) * float(cell.get("tokens", np.nan))
    return found


def of_bowls(bowls: Sequence[Bowl], symbols: Iterable[str], size: str) -> Inputs:
    """The same of many cells, (bowls,) each; lr and batch_tokens are those of the optimum."""
    symbols = tuple(symbols)
    rows = []
    for bowl in bowls:
        optimum = {name: value.value for name in ("lr", "batch_tokens") if (value := getattr(bowl, name)) is not None}
        rows.append(of_cell({**optimum, **bowl.cell}, symbols, size))
    return {symbol: np.array([row[symbol] for row in rows]) for symbol in symbols}
