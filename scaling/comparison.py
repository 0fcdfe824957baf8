"""Cost to equal loss: what runs need to come to the same losses, beside a first one.

A loss curve wanders, and a cost to a loss is the cost at which it was first reached. So each curve is replaced by its
lowest loss so far, and between its points the logarithm of the cost is taken to be linear in the loss. A run that never
reaches a level has a lower bound of its cost, which is all that it has spent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

COSTS = ("tokens", "flops", "seconds")
LEVELS = 5
CONFIDENCE = 0.95
Bound = Literal["exact", "at least", "at most", "unknown"]


@dataclass(frozen=True)
class Curve:
    """A loss over what it cost, ancestors included, in order; all of shape (n,)."""

    name: str
    loss: np.ndarray
    costs: Mapping[str, np.ndarray]
    """Of `COSTS`; all NaN where unknown."""

    def envelope(self) -> np.ndarray:
        """The lowest loss so far, (n,)."""
        return np.minimum.accumulate(self.loss)


@dataclass(frozen=True)
class Cost:
    """To one loss. The value is a number of which `bound` says what it is; NaN if unknown."""

    value: float
    bound: Bound = "exact"


@dataclass(frozen=True)
class GroupCost:
    """Of the runs of a group: the geometric mean, and where there are several the interval of it."""

    value: float
    low: float
    high: float
    bound: Bound
    reached: int
    runs: int


@dataclass(frozen=True)
class Ratio:
    """Of a cost to the baseline's."""

    value: float
    low: float
    high: float
    bound: Bound


@dataclass(frozen=True)
class Row:
    """One group at one level."""

    level: float
    group: str
    costs: Mapping[str, GroupCost]
    ratios: Mapping[str, Ratio]


Groups = Mapping[str, Sequence[Curve]]


def compare(groups: Groups, levels: Sequence[float] | None = None) -> list[Row]:
    """Costs of every group at every level, highest loss first, and their ratios to those of the first group.

    By default the levels lie within what all runs have come through. ValueError where there is no such range.
    """
    levels = common_levels(groups) if levels is None else sorted(levels, reverse=True)
    first = next(iter(groups))
    rows = []
    for level in levels:
        found = {
            name: {cost: [cost_to(curve, level, cost) for curve in curves] for cost in COSTS}
            for name, curves in groups.items()
        }
        for name, costs in found.items():
            pooled = {cost: pool(each) for cost, each in costs.items()}
            ratios = {cost: ratio(each, found[first][cost], same=name == first) for cost, each in costs.items()}
            rows.append(Row(level, name, pooled, ratios))
    return rows


def common_levels(groups: Groups, number: int = LEVELS) -> list[float]:
    """Losses that every run has come through, evenly spaced down to the lowest that all reach; highest first.

    ValueError naming the runs where one ends above where another begins.
    """
    curves = [curve for each in groups.values() for curve in each]
    begins = min(curves, key=lambda each: each.loss[0])
    ends = max(curves, key=lambda each: each.envelope()[-1])
    high, low = float(begins.loss[0]), float(ends.envelope()[-1])
    if not low < high:
        raise ValueError(
            f"{ends.name} comes down to a loss of {low:.4f} and {begins.name} begins at {high:.4f}: there is no level "
            "that both come through; give levels, at which some are only bounded"
        )
    # A level at the very end of the range is where a run begins: that nobody needs to be compared at.
    return [float(each) for each in np.linspace(low, high, number + 1)[:number][::-1]]


def cost_to(curve: Curve, level: float, cost: str) -> Cost:
    """What a run spent when its loss first came down to a level."""
    lowest, spent = curve.envelope(), curve.costs[cost]
    if not np.isfinite(spent).all():
        return Cost(math.nan, "unknown")
    # Rounding: the level may be the very loss that a run ends at.
    below = np.flatnonzero(lowest <= level * (1 + 1e-12))
    if not below.size:
        return Cost(float(spent[-1]), "at least")
    place = int(below[0])
    if place == 0:
        return Cost(float(spent[0]), "exact" if math.isclose(lowest[0], level) else "at most")
    before, after = lowest[place - 1], lowest[place]
    share = min(1.0, (before - level) / (before - after))
    if spent[place - 1] <= 0:
        return Cost(float(spent[place - 1] + share * (spent[place] - spent[place - 1])))
    return Cost(float(np.exp(np.log(spent[place - 1]) * (1 - share) + np.log(spent[place]) * share)))


def pool(costs: Sequence[Cost]) -> GroupCost:
    """Runs of a group together: the geometric mean of their costs, with the t interval of it. A run that never came to
    the level makes it a lower bound, and one that began below it an upper one."""
    bound, values = _bound([each.bound for each in costs]), np.array([each.value for each in costs])
    reached = sum(each.bound in ("exact", "at most") for each in costs)
    if bound == "unknown":
        return GroupCost(math.nan, math.nan, math.nan, bound, reached, len(costs))
    logs = np.log(values)
    low, high = (
        _interval(logs.mean(), logs.var(ddof=1) / len(logs), len(logs) - 1) if len(logs) > 1 else (math.nan,) * 2
    )
    if bound != "exact":
        low = high = math.nan
    return GroupCost(float(np.exp(logs.mean())), low, high, bound, reached, len(costs))


def ratio(costs: Sequence[Cost], baseline: Sequence[Cost], *, same: bool = False) -> Ratio:
    """Of geometric means, with Welch's interval where both have several runs and all of them came to the level."""
    if same:
        return Ratio(1.0, 1.0, 1.0, "exact")
    ours, theirs = pool(costs), pool(baseline)
    opposite = {"at least": "at most", "at most": "at least"}
    bound = _bound([ours.bound, opposite.get(theirs.bound, theirs.bound)])
    if bound == "unknown":
        return Ratio(math.nan, math.nan, math.nan, bound)
    logs = [np.log([each.value for each in group]) for group in (costs, baseline)]
    value = float(logs[0].mean() - logs[1].mean())
    low = high = math.nan
    if bound == "exact" and min(map(len, logs)) > 1:
        parts = [each.var(ddof=1) / len(each) for each in logs]
        weights = sum(part**2 / (len(each) - 1) for part, each in zip(parts, logs, strict=True))
        low, high = _interval(value, sum(parts), sum(parts) ** 2 / weights if weights else math.inf)
    return Ratio(math.exp(value), low, high, bound)


def _interval(centre: float, variance: float, freedom: float) -> tuple[float, float]:
    """Of exp of a mean of logarithms."""
    reach = stats.t.ppf(0.5 + CONFIDENCE / 2, freedom) * math.sqrt(variance)
    return math.exp(centre - reach), math.exp(centre + reach)


def _bound(bounds: Sequence[Bound]) -> Bound:
    """What a mean of such numbers is."""
    kinds = set(bounds) - {"exact"}
    if not kinds:
        return "exact"
    return kinds.pop() if len(kinds) == 1 else "unknown"
