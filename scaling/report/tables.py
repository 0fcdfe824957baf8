"""The tables of a report as plain cells, which the terminal and the page both show."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scaling.columns import NAMES, STATUSES, TEXTS
from scaling.laws import find
from scaling.report.words import count, interval, label, number, percent, plain, target, written
from scaling.results import Analysis, Bowl, Decision, Estimate, Fit, HeldOut, Level, Verdict

SHOWN_RUNS = 5000
"""Rows of the run table that a page holds."""
RANGES = ("total", "non_embedding", "active", "tokens", "flops", "lr", "batch_tokens", "loss")


class Cell(NamedTuple):
    text: str
    key: float | str | None = None
    """What a column is sorted by; numbers stand at the right of their column."""
    level: Level | None = None


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def cell(value: Any, write=number, level: Level | None = None) -> Cell:
    """A number as it is to be written, or a text."""
    if isinstance(value, int | float | np.integer | np.floating):
        return Cell(write(float(value)), float(value), level)
    return Cell("" if value is None else plain(value), None, level)


def estimated(value: Estimate | None, write=number) -> Cell:
    return Cell("—") if value is None else Cell(interval(value, write), value.value)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Cell]], note: str = "") -> Table:
    return Table(title, tuple(columns), tuple(tuple(row) for row in rows), note)


def mapping(analysis: Analysis) -> Table:
    """Which column of the input each known column was taken from, or how it was derived."""
    found = analysis.table.mapping
    rows = [(cell(name), cell(origin)) for name, origin in found.items()]
    return table("Columns", ("column", "read from"), rows, "; ".join(map(plain, analysis.table.notes)))


def summary(analysis: Analysis) -> Table:
    """How many runs there are of each status, and the spans of what was fitted."""
    runs, used = analysis.table, analysis.used
    rows = [(cell("runs"), cell(f"{len(runs)}, of which {int(used.sum())} are used"))]
    if runs.has("status"):
        states = Counter("unknown" if _missing(each) else str(each) for each in runs.frame["status"])
        order = sorted(states, key=lambda each: STATUSES.index(each) if each in STATUSES else len(STATUSES))
        rows.append((cell("status"), cell(", ".join(f"{states[each]} {each}" for each in order))))
    for name in RANGES:
        values = runs.numbers(name)[used] if runs.has(name) else np.empty(0)
        values = values[np.isfinite(values)]
        if len(values):
            write, distinct = written(name), len(np.unique(values))
            span = f"{write(values.min())} to {write(values.max())}" if distinct > 1 else write(values.min())
            rows.append((cell(label(name)), cell(span + (f", {distinct} values" if distinct > 1 else ""))))
    return table("Runs", ("", "of the used runs"), rows)


def runs(analysis: Analysis) -> Table:
    """Every run, in the columns that are known of any."""
    frame, used = analysis.table.frame, analysis.used
    known = [name for name in NAMES if analysis.table.has(name)]
    rows, writers = [], {name: written(name) for name in known if name not in TEXTS}
    columns = {name: frame[name].tolist() for name in known}
    for row in range(min(len(frame), SHOWN_RUNS)):
        values = (columns[name][row] for name in known)
        cells = [
            cell(value, writers[name]) if name in writers else Cell("" if _missing(value) else plain(value))
            for name, value in zip(known, values, strict=True)
        ]
        rows.append((Cell("used", level="ok") if used[row] else Cell("left out", level="warning"), *cells))
    left = len(frame) - len(rows)
    note = f"{left} more rows are not shown here." if left else ""
    return Table("Run table", ("", *known), tuple(rows), note)


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def verdicts(title: str, found: Sequence[Verdict], note: str = "") -> Table:
    rows = [(cell(each.level, level=each.level), cell(each.code), cell(each.message)) for each in found]
    return table(title, ("", "code", "what was found"), rows, note)


def fits(found: Sequence[Fit]) -> Table:
    """One line a law."""
    rows = []
    for each in found:
        failures = [verdict.code for verdict in each.verdicts if verdict.level == "failure"]
        warnings = [verdict.code for verdict in each.verdicts if verdict.level == "warning"]
        standing = (
            Cell("not identified: " + _codes(failures), level="failure")
            if failures
            else Cell("warnings: " + _codes(warnings), level="warning")
            if warnings
            else Cell("identified", level="ok")
        )
        clusters = cell(each.clusters, count)
        rows.append(
            (cell(each.quantity), cell(each.law), cell(label(each.size)), cell(each.rows, count), clusters,
             cell(each.noise, percent), standing)
        )  # fmt: skip
    return table("Fits", ("of", "law", "N is", "rows", "clusters", "residual sd", "verdict"), rows)


def _codes(found: Sequence[str]) -> str:
    """Each once, with how often it was found where that is more."""
    counts = Counter(map(plain, found))
    return ", ".join(f"{count} x {code}" if count > 1 else code for code, count in counts.items())


def parameters(fit: Fit) -> Table:
    """The numbers of one law, with their intervals."""
    law = find(fit.law)
    meanings = {each.name: each.meaning for each in law.parameters}
    rows = []
    for name, value in fit.parameters.items():
        held = name in fit.fixed
        error = Cell("fixed") if held else cell(value.error)
        span = Cell("") if held else Cell(f"{number(value.low)} to {number(value.high)}")
        rows.append((cell(name), cell(value.value), span, error, cell(meanings.get(name, ""))))
    note = f"{plain(law.formula)}. {plain(law.source)}"
    title = f"{label(fit.quantity)}: {plain(fit.law)}, {label(fit.size)}"
    return table(title, ("parameter", "value", "95 % interval", "standard error", "meaning"), rows, note)


def counting(found: Sequence[HeldOut]) -> list[HeldOut]:
    """Those that laws are chosen by, which extrapolate as targets do: not those of sizes amid others, if there are
    other ones."""
    return [each for each in found if not each.split.startswith("without ")] or list(found)


def quantity_of(found: HeldOut) -> str:
    """What was predicted; baselines are of the loss."""
    return find(found.law).quantity if found.size else "loss"


def held_out(found: Sequence[HeldOut]) -> Table:
    """How well each law told rows that it was not fitted to; in the order of the analysis."""
    rows = [
        (cell(quantity_of(each)), cell(each.law), cell(label(each.size)), cell(each.split), cell(each.trained, count),
         cell(each.tested, count), Cell(f"{percent(each.error)} ± {percent(each.error_se)}", each.error),
         cell(each.bias, percent), cell(each.coverage, percent))
        for each in found
    ]  # fmt: skip
    columns = ("of", "law", "N is", "held out", "fitted to", "tested on", "error", "bias", "in 95 % interval")
    return table("Hold-out", columns, rows)


def keys(found: Sequence[Bowl]) -> list[str]:
    """The columns that tell cells apart: size, tokens, and what else differs between cells that have both equal."""
    names = list(dict.fromkeys(name for bowl in found for name in bowl.cell))
    told = [*[name for name in ("non_embedding", "total", "active") if name in names][:1], "tokens"]
    for name in names:
        values: dict[tuple, set[float]] = {}
        for bowl in found:
            values.setdefault(tuple(bowl.cell.get(each) for each in told), set()).add(bowl.cell.get(name, math.nan))
        if name not in ("flops", "flops_per_token") and any(len(each) > 1 for each in values.values()):
            told.append(name)
    return told


def bowls(found: Sequence[Bowl]) -> Table:
    """The optimum of each cell."""
    names = keys(found)
    settings = [name for name in ("lr", "batch_tokens") if any(getattr(bowl, name) is not None for bowl in found)]
    rows = []
    for bowl in found:
        of_cell = [cell(bowl.cell.get(name), written(name)) for name in names]
        optima = [_optimum(bowl, name) for name in settings]
        best = [cell(bowl.best.get(name), written(name)) for name in settings]
        rows.append((*of_cell, cell(bowl.runs, count), *optima, cell(bowl.loss), *best, cell(bowl.note)))
    columns = (
        *map(label, names), "runs", *(f"best {label(name)}" for name in settings), "loss there",
        *(f"{label(name)} of the best run" for name in settings), "note",
    )  # fmt: skip
    return table("Bowls", columns, rows)


def _optimum(bowl: Bowl, name: str) -> Cell:
    value: Estimate | None = getattr(bowl, name)
    side = bowl.censored.get(name)
    if side is None:
        return estimated(value, written(name))
    edge = bowl.best.get(name, math.nan) if value is None else value.value
    sign = "≤" if side == "below" else "≥"
    return Cell(f"{sign} {written(name)(edge)} (edge of the grid)", edge, "warning")


def decisions(found: Sequence[Decision]) -> Table:
    """What is proposed for each target."""
    known = ("N", "D", "lr", "batch_tokens", "timescale", "weight_decay", "loss")
    names = [name for name in known if any(name in each.proposal for each in found)]
    rows = []
    for each in found:
        proposed = [estimated(each.proposal.get(name), written(name)) for name in names]
        far = Cell(f"{number(each.extrapolation, 3)} x", each.extrapolation, _worst(each.verdicts))
        rows.append((cell(target(each.target)), *proposed, cell(each.regret, percent), far))
    columns = ("target", *map(label, names), "expected regret", "compute beyond the runs")
    return table("Proposals", columns, rows, "In brackets: the 95 % interval of the decision." if rows else "")


def plateaus(found: Sequence[Decision]) -> Table:
    """The ranges within which a setting may be chosen freely."""
    rows = [
        (cell(target(each.target)), cell(label(name)), cell(plateau.low, written(name)),
         cell(plateau.high, written(name)), Cell(f"less than {percent(plateau.cost)} of the loss"))
        for each in found
        for name, plateau in each.plateau.items()
    ]  # fmt: skip
    note = "Each with the other settings at their best." if rows else ""
    return table("Plateau", ("target", "setting", "from", "to", "costs"), rows, note)


def details(title: str, found: Mapping[str, Any]) -> Table:
    """Nested values as one line each, with dotted names; long lists by their length."""
    return table(title, ("", ""), [(cell(name), cell(value)) for name, value in _flat(found)])


def _flat(found: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in found.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}.")
        elif isinstance(value, list | tuple | np.ndarray) and len(value) > 8:
            yield path, f"{len(value)} values"
        elif isinstance(value, float):
            yield path, number(value)
        elif isinstance(value, list | tuple | np.ndarray):
            yield path, ", ".join(number(each) if isinstance(each, float) else str(each) for each in value)
        else:
            yield path, str(value)


def _worst(found: Sequence[Verdict]) -> Level | None:
    levels = {each.level for each in found}
    return next((level for level in ("failure", "warning") if level in levels), None)
