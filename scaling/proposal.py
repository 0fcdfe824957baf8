"""What laws propose for a run to come: how to split compute between parameters and tokens, a value with its interval,
the plateau around it, and how far all of it is extrapolated.

Of a run to come, numbers are known by the names of `scaling.columns`: tokens, total, hidden_size, flops and so on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling.cells import SAME
from scaling.laws import find
from scaling.laws.law import Inputs
from scaling.results import Estimate, Fit, Plateau, Verdict
from scaling.table import column_of

COST = 1e-3
"""Share of the loss that a plateau may cost."""
WARNS, REFUSES = 3.0, 10.0
"""Times the largest compute of a law's data from which an extrapolation is warned of, and refused unless asked for."""
GRID = 801
AT_EDGE = 0.05
"""Share of draws without an optimum from which the data do not tell one."""
FLOPS = 6.0
"""For each parameter and token (Kaplan et al. 2020, arXiv 2001.08361, table 1)."""
FEWEST = 1e3
"""Parameters and tokens of the smallest run that is thought of."""


@dataclass(frozen=True)
class Allocation:
    """The best split of compute between parameters and tokens."""

    N: Estimate
    D: Estimate
    loss: float
    plateau: Plateau
    """Of N, with tokens as the compute leaves them."""
    regret: float
    """Expected excess of the loss, as a share, for not knowing the law exactly; NaN without draws."""
    at_edge: float
    """Share of draws that have no optimum between too few parameters and too few tokens."""

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """A warning where some draws have no optimum, a failure where more do than can be left out."""
        if not self.at_edge > 0:
            return ()
        message = f"{self.at_edge:.0%} of the bootstrap has no optimum between too few parameters and too few tokens"
        return (Verdict("failure" if self.at_edge > AT_EDGE else "warning", "no_optimum", message),)


def law_for(fits: Sequence[Fit], quantity: str) -> tuple[Fit | None, tuple[Verdict, ...]]:
    """The law to decide a quantity by: the first that its data identify. Without one a failure, which says why not."""
    known = [fit for fit in fits if fit.quantity == quantity]
    if found := next((fit for fit in known if fit.identified), None):
        return found, ()
    if not known:
        return None, (Verdict("failure", "no_law", f"there is no law of {quantity}"),)
    reasons = "; ".join(each.message for each in known[0].verdicts if each.level == "failure")
    message = f"the law of {quantity} ({known[0].law}) is not identified by its data: {reasons}"
    return None, (Verdict("failure", "law", message),)


def allocate(
    loss: Fit, compute: float, flops_per_token: Callable[[np.ndarray], np.ndarray] = lambda size: FLOPS * size
) -> Allocation:
    """Minimise a loss law over N at D = compute / flops_per_token(N).

    `flops_per_token` takes sizes as the law means them, (n,). ValueError for a law of other inputs than N, D, C and M,
    and for one that has no optimum.
    """
    law = find(loss.law)
    if not {"N", "D"} <= set(law.inputs) <= {"N", "D", "C", "M"}:
        raise ValueError(f"law {loss.law!r} is of {', '.join(law.inputs)}; to split compute, one of N and D is needed")
    log_n = np.linspace(np.log(FEWEST), np.log(compute / FLOPS / FEWEST), GRID)
    each = flops_per_token(np.exp(log_n))
    log_n = log_n[compute / each >= FEWEST]
    if len(log_n) < 3:
        raise ValueError(f"{compute:.4g} FLOPs are too few to be split between parameters and tokens")
    x = _along(log_n, compute, flops_per_token)
    best, lowest, inside = _minimum(log_n, np.log(loss.predict(x))[None])
    if not inside[0]:
        raise ValueError(f"law {loss.law!r} has no optimum of N at {compute:.4g} FLOPs: it has the best at an end")
    chosen, draws, regret, at_edge = best[0], best, np.nan, 0.0
    if len(loss.draws):
        curves = np.log(loss.predictions(x))
        draws, lows, inside = _minimum(log_n, curves)
        at_chosen = np.log(loss.predictions(_along(best, compute, flops_per_token))[:, 0])
        regret = float(np.mean(np.expm1(np.maximum(at_chosen - lows, 0.0))))
        at_edge = float(np.mean(~inside))
    tokens = np.log(compute / flops_per_token(np.exp(np.concatenate([best, draws]))))
    known = len(loss.draws) > 0
    return Allocation(
        _estimate(chosen, draws if known else None),
        _estimate(tokens[0], tokens[1:] if known else None),
        float(np.exp(lowest[0])),
        _plateau(log_n, np.log(loss.predict(x)) - lowest[0], chosen),
        regret,
        at_edge,
    )


def _along(log_n: np.ndarray, compute: float, flops_per_token: Callable[[np.ndarray], np.ndarray]) -> Inputs:
    """The inputs of runs that cost `compute`."""
    size = np.exp(log_n)
    each = flops_per_token(size)
    return {"N": size, "D": compute / each, "C": np.full_like(size, compute), "M": each}


def _minimum(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where rows of y (S, n) on an even grid x are lowest, by a parabola through the three lowest points; the value
    there; and whether it is inside the grid. (S,) each."""
    lowest = np.nanargmin(y, axis=1)
    inside = (lowest > 0) & (lowest < len(x) - 1)
    middle = np.clip(lowest, 1, len(x) - 2)
    rows = np.arange(len(y))
    left, centre, right = (y[rows, middle + shift] for shift in (-1, 0, 1))
    bend = left - 2 * centre + right
    shift = np.where(inside & (bend > 0), (left - right) / (2 * np.where(bend > 0, bend, 1.0)), 0.0)
    value = np.where(inside, centre - (left - right) * shift / 4, y[rows, lowest])
    return np.where(inside, x[middle] + shift * (x[1] - x[0]), x[lowest]), value, inside


def _plateau(x: np.ndarray, excess: np.ndarray, lowest: float) -> Plateau:
    """From where to where the excess of ln loss along x, which is lowest at `lowest`, stays below the cost."""
    limit = np.log1p(COST)
    x, excess = np.insert(x, at := np.searchsorted(x, lowest), lowest), np.insert(excess, at, 0.0)
    below, above = np.flatnonzero(excess[:at] > limit), at + np.flatnonzero(excess[at:] > limit)
    low, high = x[0], x[-1]
    if len(below):
        low = np.interp(-limit, -excess[[below[-1], below[-1] + 1]], x[[below[-1], below[-1] + 1]])
    if len(above):
        high = np.interp(limit, excess[[above[0] - 1, above[0]]], x[[above[0] - 1, above[0]]])
    return Plateau(float(np.exp(low)), float(np.exp(high)), COST)


def value_at(fit: Fit, known: Mapping[str, float]) -> Estimate:
    """A law's value for a run of these columns, with its interval: of a loss, of a single measurement.

    ValueError for a column that the law needs and that is not known, and where it has no value.
    """
    x = inputs_of(fit, known)
    value = float(fit.predict(x)[0])
    if not np.isfinite(value):
        given = ", ".join(f"{symbol} = {each[0]:.4g}" for symbol, each in x.items())
        raise ValueError(f"law {fit.law!r} has no value at {given}")
    if not len(fit.draws):
        return _estimate(np.log(value), None)
    draws = np.log(fit.predictions(x)[:, 0])
    if fit.quantity == "loss" and np.isfinite(fit.noise):
        draws = draws + fit.noise * np.random.default_rng(0).standard_normal(len(draws))
    return _estimate(np.log(value), draws)


def loss_at(fit: Fit, known: Mapping[str, float], excess: float) -> Estimate:
    """`value_at` of a law of the loss of tuned runs, for one that is off its best rate and batch by this share."""
    found = value_at(fit, known)
    if {"lr", "B", "batch_tokens"} & set(find(fit.law).inputs):
        return found
    return Estimate(*((1 + excess) * each for each in (found.value, found.low, found.high, found.error)))


def inputs_of(fit: Fit, known: Mapping[str, float]) -> Inputs:
    """The inputs of a law by symbol, (1,) each. ValueError for one that is not known, and for a run that differs in
    what all runs of the law have equal."""
    for symbol, value in fit.details.get("alike", {}).items():
        column = column_of(symbol, fit.size)
        given = known.get(column, np.nan)
        if not abs(np.log(given / value)) <= np.log1p(SAME):
            raise ValueError(f"law {fit.law!r} is of runs with {column} = {value:.4g}, and here it is {given:.4g}")
    found = {}
    for symbol in find(fit.law).inputs:
        column = column_of(symbol, fit.size)
        if column == "flops" and fit.details.get("compute", "").startswith("M D"):
            column = "flops_without_head"
        if not known.get(column, np.nan) > 0:
            raise ValueError(f"law {fit.law!r} needs {column}, which is not known here")
        found[symbol] = np.array([float(known[column])])
    return found


def _estimate(log_value: float, log_draws: np.ndarray | None) -> Estimate:
    """The estimate of a positive number from logarithms; without draws it may be anything."""
    value = float(np.exp(log_value))
    if log_draws is None:
        return Estimate(value, 0.0, np.inf)
    log_draws = log_draws[np.isfinite(log_draws)]
    low, high = np.exp(np.quantile(log_draws, [0.025, 0.975]))
    return Estimate(value, float(min(low, value)), float(max(high, value)), float(np.std(np.exp(log_draws))))


def extrapolation(fits: Sequence[Fit], compute: float) -> float:
    """Compute over the largest of a law's data, the most of all laws; NaN where none tells."""
    return max((compute / fit.spans["C"][1] for fit in fits if "C" in fit.spans), default=float("nan"))


def reach(fits: Sequence[Fit], compute: float) -> tuple[Verdict, ...]:
    """A warning for laws that are extrapolated far, a failure beyond what is trusted; laws of equal reach as one."""
    quantities: dict[float, list[str]] = {}
    for fit in fits:
        if "C" in fit.spans:
            quantities.setdefault(fit.spans["C"][1], []).append(fit.quantity)
    return tuple(
        Verdict(
            "failure" if compute / largest > REFUSES else "warning",
            "extrapolation",
            f"{compute:.3g} FLOPs are {compute / largest:.3g} times the most that the law of {' and of '.join(names)} "
            f"was fitted to, {largest:.3g}",
        )
        for largest, names in quantities.items()
        if compute / largest > WARNS
    )


def outside(fits: Sequence[Fit], known: Mapping[str, float]) -> tuple[Verdict, ...]:
    """A warning for each input, of a run of these columns, that is more than `WARNS` times beyond those of a law's
    data, though its compute may not be; and for compute that is as far below them."""
    said = {}
    for fit in fits:
        for symbol, (low, high) in fit.spans.items():
            value = known.get(column_of(symbol, fit.size))
            if value is None or (low / WARNS <= value and (symbol == "C" or value <= high * WARNS)):
                continue
            message = f"{symbol} = {value:.4g} is outside of what was fitted, {low:.4g} to {high:.4g}"
            said[message] = Verdict("warning", "outside", message)
    return tuple(said.values())
