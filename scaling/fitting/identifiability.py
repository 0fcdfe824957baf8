"""Whether rows determine a law's parameters: verdicts, each with the number it rests on."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from scaling.laws.law import Inputs, Law
from scaling.results import Estimate, Verdict

ROWS = 3
"""For each free parameter, fewer of which are few."""
SPAN = (1.5, 3.0)
"""Largest over smallest of an input, below which its exponent is not or hardly identified."""
CONDITION = (1e7, 1e5)
"""Of the Jacobian with columns of unit norm."""
TAKES_PART = 1e-3
"""Component of a parameter in a direction that has no effect on the rows."""
FLOOR = (0.5, 0.25)
"""Width of the interval of the irreducible loss, as a share of the lowest loss."""
EXPONENT = 1.0
"""Width of the interval of a parameter that is no factor, as a share of its size."""
SMALL = 0.2
"""Size that a parameter near zero is taken to have."""
AT_BOUND = 0.1
"""Share of the bootstrap that may end at a bound."""
SHARE = 0.05
"""Of the starts that should find the best optimum."""


def of_table(law: Law, x: Inputs, clusters: np.ndarray, fixed: Mapping[str, float]) -> Iterator[Verdict]:
    """What the inputs alone tell: too few rows, spans, and inputs that vary together."""
    free = len(law.parameters) - len(fixed)
    for count, what in ((len(clusters), "rows"), (len(np.unique(clusters)), "runs or cells")):
        if count <= free:
            yield Verdict("failure", "rows", f"{count} {what} cannot determine {free} parameters")
            break
        if count < ROWS * free:
            yield Verdict("warning", "rows", f"{count} {what} are few for {free} parameters")
            break
    # Of what may be 0, and of unique tokens beside all of them, the span tells nothing; the intervals do.
    logs = {symbol: np.log(x[symbol]) for symbol in law.inputs if symbol not in (*law.zeros, "U")}
    narrow = False
    for symbol, values in logs.items():
        span = float(np.exp(np.ptp(values)))
        if level := _level(span, SPAN):
            narrow = True
            level = "warning" if fixed else level
            yield Verdict(level, "span", f"{symbol} spans a factor of {span:.3g}; {SPAN[1]:g} are wanted")
    if not narrow and {"N", "D"} <= set(logs) and len(clusters) > 2:
        yield from _together(logs["N"], logs["D"], bool(fixed))


def _together(size: np.ndarray, data: np.ndarray, is_fixed: bool) -> Iterator[Verdict]:
    slope, offset = np.polyfit(size, data, 1)
    span = float(np.exp(np.ptp(data - slope * size - offset)))
    if level := _level(span, SPAN):
        ratio = float(np.exp(np.ptp(data - size)))
        message = f"N and D vary together: D is within a factor of {span:.3g} of N^{slope:.2f}; D/N spans {ratio:.3g}"
        yield Verdict("warning" if is_fixed else level, "collinear", message)


def of_optimum(law: Law, slopes: np.ndarray, coordinates: np.ndarray, free: np.ndarray) -> Iterator[Verdict]:
    """What the best fit tells: parameters at a bound, and the condition of the Jacobian (n, K)."""
    for parameter, is_free, is_low, is_high in zip(law.parameters, free, *_at_bounds(law, coordinates), strict=True):
        if is_free and (is_low or is_high):
            bound = parameter.lower if is_low else parameter.upper
            yield Verdict("failure", "bound", f"{parameter.name} ends at its bound {bound:g}")
    number = condition(slopes[:, free])
    if level := _level(1 / number, (1 / CONDITION[0], 1 / CONDITION[1])):
        yield Verdict(level, "condition", f"the parameters compensate each other: condition number {number:.1e}")


def condition(slopes: np.ndarray) -> float:
    """Of the Jacobian (n, K) with its columns at unit norm; infinite if one is zero or rows are too few."""
    norms = np.linalg.norm(slopes, axis=0)
    if slopes.shape[0] < slopes.shape[1] or not (norms > 0).all():
        return float("inf")
    singular = np.linalg.svd(slopes / norms, compute_uv=False)
    return float(singular[0] / singular[-1]) if singular[-1] > 0 else float("inf")


def undetermined(slopes: np.ndarray) -> np.ndarray:
    """Which parameters, (K,) of bool, may change together without any effect on the rows, from the Jacobian (n, K)."""
    norms = np.linalg.norm(slopes, axis=0)
    _, singular, directions = np.linalg.svd(slopes / np.where(norms > 0, norms, 1))
    singular = np.pad(singular, (0, len(norms) - len(singular)))
    empty = directions[singular * CONDITION[0] < singular[0]]
    return (np.abs(empty) > TAKES_PART).any(axis=0)


def of_intervals(
    law: Law, estimates: Mapping[str, Estimate], draws: np.ndarray, fixed: Mapping[str, float], lowest: float
) -> Iterator[Verdict]:
    """What the bootstrap tells, (B, K): intervals that are too wide, replicates at a bound. lowest: measured value."""
    if not len(draws):
        return
    at_bounds = np.logical_or(*_at_bounds(law, draws)).mean(axis=0)
    for parameter, at in zip(law.parameters, at_bounds, strict=True):
        if parameter.name in fixed:
            continue
        found = estimates[parameter.name]
        width = found.high - found.low
        if parameter.name == law.floor:
            if level := _level(-width / lowest, (-FLOOR[0], -FLOOR[1])):
                message = f"{parameter.name} is known to {width:.3g} only; the lowest loss is {lowest:.3g}"
                yield Verdict(level, "interval", message)
        elif not parameter.logarithmic and width > EXPONENT * max(abs(found.value), SMALL):
            message = f"{parameter.name} = {found.value:.3g} is known to {found.low:.3g} ... {found.high:.3g} only"
            yield Verdict("warning", "interval", message)
        if at > AT_BOUND and not np.isclose(found.value, (parameter.lower, parameter.upper), rtol=1e-6, atol=0).any():
            yield Verdict("warning", "bound", f"{parameter.name} ends at a bound in {at:.0%} of the bootstrap")


def of_search(share: float, starts: int, rivals: Sequence[tuple[float, Mapping[str, float]]]) -> Iterator[Verdict]:
    """What the starts tell. rivals: optima that differ from the best but fit as well, with what they cost in
    chi-squared."""
    if share < SHARE:
        yield Verdict(
            "warning", "starts", f"{share:.1%} of {starts} starts found the best optimum: there may be better"
        )
    for excess, values in rivals:
        listed = ", ".join(f"{name} = {value:.4g}" for name, value in values.items())
        yield Verdict("warning", "basins", f"another optimum fits as well (chi-squared {excess:.2g} more): {listed}")


def of_estimators(
    estimates: Mapping[str, Estimate], others: Mapping[str, Mapping[str, float]], fixed: Mapping[str, float]
) -> Iterator[Verdict]:
    """Where another estimator's value lies outside of an interval: outliers, or noise that varies."""
    for estimator, values in others.items():
        outside = [
            f"{name} = {values[name]:.4g}, not {found.low:.4g} ... {found.high:.4g}"
            for name, found in estimates.items()
            if name not in fixed and not found.low <= values[name] <= found.high
        ]
        if outside:
            yield Verdict("warning", "outliers", f"{estimator.replace('_', ' ')} disagrees: {'; '.join(outside)}")


def _level(value: float, limits: tuple[float, float]) -> str | None:
    """Failure below the first limit, warning below the second."""
    return "failure" if value < limits[0] else "warning" if value < limits[1] else None


def _at_bounds(law: Law, coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether coordinates (..., K) are at the lower and at the upper bounds, of their shape."""
    low, high = law.bounds()
    return tuple(np.abs(coordinates - each) <= 1e-9 * np.maximum(1, np.abs(each)) for each in (low, high))
