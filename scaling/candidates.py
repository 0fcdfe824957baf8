"""Which laws a table can tell anything of, with which meaning of N, and why not the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling.cells import levels
from scaling.inputs import of_rows
from scaling.laws import LAWS
from scaling.laws.law import Inputs, Law
from scaling.laws.nesting import IDLE, same_as
from scaling.laws.reuse import PUBLISHED_SCALE
from scaling.results import Verdict
from scaling.table import RunTable, column_of

SIZES = ("non_embedding", "total", "active")
LEAST_LEVELS = 3
"""Values of N, and of D, that a power with a floor under it needs."""
REPEATED = 1.05
"""Tokens for each unique one from which on data counts as repeated."""


@dataclass(frozen=True)
class Candidate:
    """A law that can be fitted to rows of a table."""

    law: Law
    size: str
    x: Inputs
    """(rows,) each."""
    fixed: Mapping[str, float]
    """Parameters that these rows cannot tell, with their values."""

    @property
    def free(self) -> int:
        return len(self.law.parameters) - len(self.fixed)


def is_amount(values: np.ndarray) -> np.ndarray:
    """Which values laws can be fitted to: finite and above zero."""
    return np.isfinite(values) & (values > 0)


def complete_rows(table: RunTable, used: np.ndarray, sizes: Sequence[str] = SIZES) -> tuple[np.ndarray, list[str]]:
    """Rows on which all candidates are compared, (rows,) of bool, and the sizes known there.

    A size that fewer than nine in ten of the rows know is left out rather than their rows; so is one that is another
    one times a constant, which changes no law.
    """
    rows = used & is_amount(table.numbers("loss"))
    if table.has("tokens"):
        rows = rows & is_amount(table.numbers("tokens"))
    kept: list[str] = []
    for size in sizes:
        known = rows & is_amount(table.numbers(size)) if table.has(size) else np.zeros(len(table), dtype=bool)
        if not rows.any() or known.sum() < 0.9 * rows.sum():
            continue
        ratios = (table.numbers(size)[known] / table.numbers(other)[known] for other in kept)
        if any(np.ptp(each) < 1e-3 * each.mean() for each in ratios):
            continue
        rows, kept = known, [*kept, size]
    return rows, kept


def find_candidates(
    table: RunTable, used: np.ndarray, *, laws: Sequence[str] | None = None, sizes: Sequence[str] = SIZES
) -> tuple[np.ndarray, tuple[Candidate, ...], tuple[Verdict, ...]]:
    """The rows to compare on, (rows,) of bool; the laws of loss that can be; and of each other one why it cannot.

    `laws` are the names to consider, all laws of loss if not given. ValueError where none can be fitted.
    """
    names = [name for name in laws or LAWS if LAWS[name].quantity == "loss"]
    rows, sizes = complete_rows(table, used, sizes)
    found, reasons = [], {}
    for size in sizes:
        for name in names:
            candidate = _candidate(LAWS[name], table.where(rows), size)
            if isinstance(candidate, str):
                reasons[name] = candidate
            elif not any(each.law.name == name and same_size(each, candidate) for each in found):
                found.append(candidate)
    if not found:
        told = _by_reason(reasons) or "no size is known"
        raise ValueError(f"no law of loss can be fitted to these {int(rows.sum())} rows: {told}")
    left_out = {name: reason for name, reason in reasons.items() if name not in {each.law.name for each in found}}
    verdicts = (Verdict("ok", "no_candidate", f"{name} is not considered: {why}") for name, why in left_out.items())
    return rows, tuple(found), tuple(verdicts)


def _by_reason(reasons: Mapping[str, str]) -> str:
    """Each reason once, with the laws that it is one for."""
    laws: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        laws.setdefault(reason, []).append(name)
    return "; ".join(f"{reason} ({', '.join(names)})" for reason, names in laws.items())


def same_size(one: Candidate, other: Candidate) -> bool:
    """Whether two candidates of one law have the same inputs: N may be in none of them."""
    return all(np.array_equal(one.x[symbol], other.x[symbol]) for symbol in one.law.inputs)


def _candidate(law: Law, table: RunTable, size: str) -> Candidate | str:
    """The law for all rows of a table, or why it cannot be fitted to them."""
    x = with_defaults(table, size)
    for symbol in (*law.inputs, *law.alike):
        if not np.isfinite(x[symbol]).all():
            return f"{column_of(symbol, size)} is known for {int(np.isfinite(x[symbol]).sum())} of {len(table)} rows"
    varying = {"N": len(set(levels(x["N"]))), "D": len(set(levels(x["D"]))) if np.isfinite(x["D"]).all() else 1}
    for symbol, has in (("N", bool({"N", "N_once"} & set(law.inputs))), ("D", "D" in law.inputs)):
        if has and varying[symbol] < LEAST_LEVELS:
            return f"{column_of(symbol, size)} has {varying[symbol]} values, and needs {LEAST_LEVELS}"
        if not has and varying[symbol] > 1:
            return f"it has no term of {column_of(symbol, size)}, which varies"
    if law.name == "over_training" and np.allclose(x["C"], 6 * x["N"] * x["D"], rtol=1e-3):
        return "C is 6 N D in these rows, with which it is chinchilla_tied"
    active = {symbol: _is_active(symbol, x) for symbol in IDLE if symbol in law.inputs}
    if active and not any(active.values()):
        return f"{' and '.join(column_of(symbol, size) for symbol in active)} changes nothing in these rows"
    parameters = {each.name for each in law.parameters}
    idle = (IDLE[symbol].items() for symbol, is_active in active.items() if not is_active)
    fixed = {name: value for items in idle for name, value in items if name in parameters}
    if same := same_as(law.name, fixed):
        return f"in these rows it is {same}"
    if active.get("D1") and (x["D1"] > 0).all():
        fixed["D0"] = PUBLISHED_SCALE
    candidate = Candidate(law, size, {symbol: x[symbol] for symbol in law.inputs}, fixed)
    if len(table) < candidate.free + 3:
        return f"{len(table)} rows are too few for {candidate.free} parameters"
    return candidate


def with_defaults(table: RunTable, size: str) -> dict[str, np.ndarray]:
    """All inputs of laws of loss, (rows,) each: where a run does not tell of streams, recurrences, repeated data or a
    parent, it has none."""
    x = dict(of_rows(table, ("N", "D", "C", "U", "P", "r", "N_once", "N_rec", "D1"), size))
    alone = ~np.isfinite(x["N_once"]) | ~np.isfinite(x["N_rec"])
    defaults = {"P": 1.0, "r": 1.0, "D1": 0.0, "U": x["D"]}
    x |= {symbol: np.where(np.isfinite(x[symbol]), x[symbol], value) for symbol, value in defaults.items()}
    x["N_once"], x["N_rec"] = np.where(alone, x["N"], x["N_once"]), np.where(alone, 0.0, x["N_rec"])
    return x


def _is_active(symbol: str, x: Inputs) -> bool:
    """Whether this input changes from row to row, as far as a law depends on it."""
    if symbol == "U":
        return bool((x["D"] / x["U"] > REPEATED).any())
    if symbol == "r":
        return len(set(levels(x["r"][x["N_rec"] > 0]))) > 1
    return len(set(levels(x[symbol] + (symbol == "D1")))) > 1
