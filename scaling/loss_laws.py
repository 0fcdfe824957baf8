"""The laws of loss of a table: the one that tells held-out runs best, and the next; or those that are asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from scaling.candidates import find_candidates, with_defaults
from scaling.cells import levels
from scaling.clusters import clusters_of
from scaling.fitting import fit
from scaling.inputs import compute, of_rows
from scaling.laws import LAWS, find
from scaling.laws.law import Law
from scaling.results import Fit, HeldOut, Verdict
from scaling.selection import Choice, choose
from scaling.table import RunTable, column_of

COMPARED = 2
"""Laws that are fitted where none is asked for: the chosen one, and the next by held-out error. Of all others the
hold-out is told."""
FEWER_STARTS, FEWER_REPLICATES = 24, 100
"""Of a law behind one that these runs identify: it is there to compare with."""


@dataclass(frozen=True)
class LossLaws:
    fits: tuple[Fit, ...] = ()
    """The chosen one first, or the next that these runs identify where they do not identify the chosen one."""
    held_out: tuple[HeldOut, ...] = ()
    """Those of the first fit, then the best first."""
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True)
class _Pick:
    law: str
    size: str
    fixed: Mapping[str, float]


def fit_losses(
    table: RunTable, rows: np.ndarray, asked: Sequence[Law], sizes: Sequence[str], replicates: int, seed: int
) -> LossLaws:
    """Laws of loss for these rows, (rows,) of bool. ValueError for a law that is asked for and whose columns are not
    there; whatever else cannot be told is said in a verdict."""
    asked = [law for law in asked if law.quantity == "loss"]
    named = [law.name for law in asked if law.name in LAWS]
    picks: list[_Pick] = []
    choice: Choice | None = None
    said: tuple[Verdict, ...] = ()
    if named or not asked:
        try:
            choice = choose(table, rows, laws=named or None, sizes=sizes, seed=seed)
            picks = _picks(choice, bool(named))
        except ValueError as error:
            said = (Verdict("warning", "no_hold_out", f"laws of loss cannot be compared: {error}"),)
            picks = _simplest(table, rows, named, sizes)
    compared = rows if choice is None else choice.rows
    fits: list[Fit] = []
    for pick in picks:
        fewer = not named and any(each.identified for each in fits)
        fits.append(
            _fit(table.where(compared), pick, min(replicates, FEWER_REPLICATES), seed, FEWER_STARTS)
            if fewer
            else _fit(table.where(compared), pick, replicates, seed)
        )
    fits = _identified_first(fits, () if choice is None else choice.verdicts)
    head = (fits[0].law, fits[0].size) if fits else None
    there = {each.law for each in fits}
    fits += [fit_rows(table.where(rows), law, sizes, replicates, seed) for law in asked if law.name not in there]
    return LossLaws(tuple(fits), _ordered(choice, head), said)


def _picks(choice: Choice, is_asked: bool) -> list[_Pick]:
    """The chosen law, then the others by their error: all that were asked for, or the next few."""
    found = {choice.law: _Pick(choice.law, choice.size, choice.fixed)}
    for each in choice.ranked:
        if not each.is_baseline:
            found.setdefault(each.law, _Pick(each.law, each.size, each.fixed))
    return list(found.values())[: None if is_asked else COMPARED]


def _simplest(table: RunTable, rows: np.ndarray, named: Sequence[str], sizes: Sequence[str]) -> list[_Pick]:
    """Where nothing can be held out: the laws that can be fitted, that of fewest parameters first."""
    try:
        _, found, _ = find_candidates(table, rows, laws=named or None, sizes=sizes)
    except ValueError:
        return []
    first = {each.law.name: each for each in sorted(found, key=lambda each: -each.free)}
    ordered = sorted(first.values(), key=lambda each: each.free)
    return [_Pick(each.law.name, each.size, each.fixed) for each in ordered][: None if named else COMPARED]


def _identified_first(fits: Sequence[Fit], said: Sequence[Verdict]) -> list[Fit]:
    """The fits that these runs identify, then the others, each in the order they came in. The first one tells what was
    `said` of the choice, and why another law is not at the head."""
    ordered = sorted(fits, key=lambda each: not each.identified)
    if not ordered:
        return []
    head, first = ordered[0], fits[0]
    if head is not first:
        why = "; ".join(each.message for each in first.verdicts if each.level == "failure")
        told = f"{head.law} is used and not {first.law}, which comes first by the hold-out but is not identified: {why}"
        said = (Verdict("warning", "passed_over", told), *said)
    return [replace(head, verdicts=(*head.verdicts, *said)), *ordered[1:]]


def _ordered(choice: Choice | None, head: tuple[str, str] | None) -> tuple[HeldOut, ...]:
    """The measures of this law and size first, then the best."""
    if choice is None:
        return ()
    rank = {(each.law, each.size): place for place, each in enumerate(choice.ranked)} | {head: -1}
    return tuple(sorted(choice.held_out, key=lambda each: rank[each.law, each.size]))


def _fit(runs: RunTable, pick: _Pick, replicates: int, seed: int, starts: int = 200) -> Fit:
    x = with_defaults(runs, pick.size)
    law = find(pick.law)
    found = fit(
        law,
        {symbol: x[symbol] for symbol in law.inputs},
        runs.numbers("loss"),
        size=pick.size,
        clusters=clusters_of(runs),
        starts=starts,
        replicates=replicates,
        seed=seed,
        fixed=pick.fixed,
        flops=x["C"] if np.isfinite(x["C"]).all() else None,
    )
    return _with_alike(found, law, runs)


def _with_alike(found: Fit, law: Law, runs: RunTable) -> Fit:
    """The fit with what its runs have equal, which it holds at alone. ValueError where they have it not."""
    at = {}
    for symbol, values in of_rows(runs, law.alike, found.size).items():
        column = column_of(symbol, found.size)
        if not (levels(values) == 0).all():
            raise ValueError(f"law {law.name!r} is of runs of equal {column}, and these differ or do not tell it")
        at[symbol] = float(np.median(values))
    if not at:
        return found
    told = " and ".join(f"{column_of(symbol, found.size)} = {value:.4g}" for symbol, value in at.items())
    message = f"all runs have {told}: what these cost is a part of {law.floor}, and no loss is predicted at others"
    verdict = Verdict("warning", "alike", message)
    return replace(found, verdicts=(*found.verdicts, verdict), details={**found.details, "alike": at})


def fit_rows(runs: RunTable, law: Law, sizes: Sequence[str], replicates: int, seed: int) -> Fit:
    """Any law to the rows that know its inputs and its quantity, each row a measurement of it.

    ValueError where a column is not there.
    """
    size = next((each for each in sizes if runs.has(each)), sizes[0])
    x = dict(of_rows(runs, law.inputs, size))
    if law.quantity == "loss":
        x |= {symbol: values for symbol, values in with_defaults(runs, size).items() if symbol in x}
    columns = {column_of(symbol, size): values for symbol, values in x.items()}
    columns[law.quantity] = runs.numbers(law.quantity) if law.quantity in runs.frame else np.full(len(runs), np.nan)
    for column, values in columns.items():
        if not (values > 0).any():
            known = ", ".join(name for name in runs.frame.columns if runs.has(name))
            raise ValueError(f"law {law.name!r} needs {column}, which these runs do not tell; known: {known}")
    kept = np.all([np.isfinite(values) & (values > 0) for values in columns.values()], axis=0)
    if not kept.any():
        raise ValueError(f"law {law.name!r} needs {', '.join(columns)}; no run tells all of them")
    here = runs.where(kept)
    flops = compute(here, size)
    found = fit(
        law,
        {symbol: values[kept] for symbol, values in x.items()},
        here.numbers(law.quantity),
        size=size,
        clusters=clusters_of(here),
        replicates=replicates,
        seed=seed,
        flops=flops if np.isfinite(flops).all() else None,
    )
    found = _with_alike(found, law, here)
    left = int((~kept).sum())
    said = Verdict("warning", "left_out", f"{left} of {len(runs)} rows do not tell {', '.join(columns)}")
    return replace(found, verdicts=(*found.verdicts, said)) if left else found
