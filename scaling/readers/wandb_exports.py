"""Weights & Biases exports as CSV: the history of runs, one row a logged step (long), or a chart with a column for each
run (wide). The table of runs that the site exports is a plain table with one row a run."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from scaling.columns import DUPLICATE, normalised
from scaling.readers.amounts import numbers
from scaling.readers.histories import History, Series
from scaling.readers.losses import GENERIC, candidates, words
from scaling.readers.mapping import SIZES, guess

AXES = ("_step", "step", "global_step", "trainer/global_step", "train/global_step", "iteration", "tokens")
RUN_NAMES = ("run", "runid", "runname", "name", "id", "expname", "experiment", "displayname")
COMMON = GENERIC | {
    "params", "parameters", "tokens", "lr", "rate", "learning", "batch", "size", "data", "model", "grad", "norm",
    "optim", "throughput", "perf",
}  # fmt: skip
"""Words of which a table's own columns are made, as "train - loss"."""
SAME_END = 0.9
"""Charts of one run end at about one step: the least share of the later end that the earlier one is."""
SET_ONCE = ("lr", "batch_sequences", "batch_tokens", "seed")
"""Columns in which runs of one size differ; in a log each has one value a step."""
RISES, FALLS = 1 / 3, 0.1
"""Of a log's rows at least this share lies at a later step than the one before, and at most this at an earlier one:
rows of one step are written apart, and resumes go back."""
FINAL = frozenset(("final", "end", "last"))
"""Words for a loss at the end of a run, of which a log has one, and a table of ends, as of each branch, one a row."""
_WIDE = re.compile(r"^(?P<run>.+) - (?P<metric>.+?)(?P<bound>__MIN|__MAX)?$")


def is_wide(names: list[str]) -> bool:
    """Whether a table is a chart's export: "run - metric" columns with their __MIN and __MAX, or with nothing but an
    axis beside them and names of runs that are no common words."""
    if any(name.endswith("__MIN") for name in names) and any(name.endswith("__MAX") for name in names):
        return True
    matches = [_WIDE.match(name) for name in names[1:]]
    if not matches or names[0].strip().lower() not in AXES:
        return False
    return all(match and not set(words(match["run"])) <= COMMON for match in matches)


def is_long(frame: pd.DataFrame, columns: Mapping[str, str] | None = None) -> bool:
    """Whether a table has one row a logged step, and not one a run: an axis of steps along which each run goes, no size
    that changes on the way, no rate, batch or seed that differs at one step, and a loss that is not a final one.
    `columns` may name the column of runs; an empty name says that each row is one."""
    lower = {name.strip().lower() for name in frame.columns}
    axis = next((name for name in frame.columns if name.strip().lower() in AXES[:-1]), None)
    losses = candidates(frame.columns)
    if axis is None or not ("_step" in lower or losses) or (columns or {}).get("run") == "":
        return False
    if losses and all(FINAL & {*words(each.name)} for each in losses):
        return False
    steps, names = numbers(frame[axis]), _run_names(frame, columns)
    groups = [np.asarray(rows) for rows in frame.groupby(names[0], sort=False).indices.values()] if names else []
    groups = groups or [np.arange(len(frame))]
    if steps is None or not _goes_on([steps[rows] for rows in groups]):
        return False
    known = guess(frame, {}, "", with_loss=False).frame
    if any(known[name].iloc[rows].nunique() > 1 for name in SIZES if name in known for rows in groups):
        return False
    at = pd.Series(steps)
    return not any(
        (known[name].iloc[rows].groupby(at[rows].to_numpy()).nunique() > 1).any()
        for name in SET_ONCE
        if name in known
        for rows in groups
    )


def _goes_on(runs: list[np.ndarray]) -> bool:
    """Whether steps, an array a run, are those of logs."""
    moves = np.concatenate([np.diff(each[np.isfinite(each)]) for each in runs])
    return moves.size > 0 and np.mean(moves > 0) >= RISES and np.mean(moves < 0) <= FALLS


def _run_names(frame: pd.DataFrame, columns: Mapping[str, str] | None) -> list[str]:
    """The columns that name a run, the surest first, or the one that was given."""
    given = (columns or {}).get("run")
    if given in frame:
        return [given]
    names = [name for name in frame.columns if normalised(name) in RUN_NAMES]
    return sorted(names, key=lambda name: RUN_NAMES.index(normalised(name)))


def wide(frame: pd.DataFrame, path: Path) -> Iterator[History]:
    """The runs of a chart's export. Its first column is the axis."""
    axis = frame.columns[0]
    steps = numbers(frame[axis])
    if steps is None:
        raise ValueError(f"{path}: its first column, {axis!r}, holds no numbers")
    runs: dict[str, dict[str, Series]] = {}
    for name in frame.columns[1:]:
        match = _WIDE.match(name)
        values = numbers(frame[name]) if match and not match["bound"] else None
        if values is None or match["metric"] == axis:
            continue
        runs.setdefault(match["run"], {})[match["metric"]] = sparse(steps, values)
    kind = "tokens" if "token" in axis.lower() else "steps"
    for run, series in runs.items():
        yield History(run, f"{path}", series, axis=kind)


def joined(charts: Iterable[History]) -> list[History]:
    """Charts of one folder with one run each, those of a run that show different metrics to about the same end as one.
    Of runs with equal losses all but the first are labelled as its copies."""
    found: dict[tuple[Path, str, str], list[History]] = {}
    for chart in charts:
        same = found.setdefault((Path(chart.source).parent, chart.run, chart.axis), [])
        other = next((each for each in same if _fits(each, chart)), None)
        if other is None:
            same.append(chart)
        else:
            other.series |= chart.series
            other.labels.append(f"joined with its chart in {Path(chart.source).name}")
    runs = [each for same in found.values() for each in same]
    first: dict[tuple, History] = {}
    for run in runs:
        original = first.setdefault(_contents(run), run)
        if original is not run:
            run.labels.append(f"{DUPLICATE}{original.source}")
    return runs


def _fits(run: History, chart: History) -> bool:
    """Whether a chart shows other metrics of this run."""
    first, last = sorted((_end(run), _end(chart)))
    return not run.series.keys() & chart.series.keys() and first >= SAME_END * last


def _end(part: History) -> float:
    return max((float(each.steps[-1]) for each in part.series.values() if len(each.steps)), default=0.0)


def _contents(run: History) -> tuple:
    """A run's losses, or all that is known of it where these are not."""
    names = [each.name for each in candidates(run.series)] or sorted(run.series)
    return run.run, *((name, run.series[name].steps.tobytes(), run.series[name].values.tobytes()) for name in names)


def long(frame: pd.DataFrame, path: Path, columns: Mapping[str, str] | None = None) -> Iterator[History]:
    """The runs of a table with one row a logged step: those of its column of names, or one. What does not change within
    a run is a setting of it."""
    lower = {name.strip().lower(): name for name in frame.columns}
    axis = next(lower[name] for name in AXES if name in lower)
    names = _run_names(frame, columns)
    groups = frame.groupby(names[0], sort=False) if names else [(path.stem, frame)]
    for run, group in groups:
        steps = numbers(group[axis])
        if steps is None:
            raise ValueError(f"{path}: column {axis!r} holds no numbers")
        series, settings = {}, {}
        for name in group.columns:
            if name in (axis, *names[:1]):
                continue
            present = group[name].dropna()
            values = numbers(group[name]) if len(present) else None
            is_constant = len(present) == len(group) and len(group) > 1 and present.nunique() == 1
            if values is not None and not is_constant:
                series[name] = sparse(steps, values)
            elif len(present):
                settings[name] = present.iloc[-1]
        yield History(str(run), f"{path}", series, settings)


def sparse(steps: np.ndarray, values: np.ndarray) -> Series:
    """The rows at which a quantity was logged: an empty cell is no value, in a history that logs other things too."""
    there = ~np.isnan(values) & np.isfinite(steps)
    return Series(steps[there], values[there])
