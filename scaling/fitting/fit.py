"""One law fitted to rows: its optimum, intervals, and verdicts on how far they can be trusted."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from scaling.fitting import identifiability
from scaling.fitting.bootstrap import Draws, resample
from scaling.fitting.levenberg import minimise
from scaling.fitting.objective import Huber, LeastSquares, Objective, spread
from scaling.fitting.profile import CHI_SQUARED, intervals
from scaling.fitting.search import Found, search
from scaling.laws.law import Inputs, Law
from scaling.results import Estimate, Fit


def fit(
    law: Law,
    x: Inputs,
    y: np.ndarray,
    *,
    size: str,
    clusters: np.ndarray | None = None,
    objective: Objective | None = None,
    starts: int = 200,
    replicates: int = 1000,
    seed: int = 0,
    fixed: Mapping[str, float] | None = None,
    flops: np.ndarray | None = None,
) -> Fit:
    """Fits a law to n rows.

    x: inputs by symbol, (n,) each. y: the quantity itself, (n,). size: the column that N means. clusters: label of the
    run or cell of each row, (n,); each row is its own if not given. objective: of the residuals in ln y, Huber(1e-3) if
    not given. starts, replicates (of the bootstrap; 0 for none, and infinite intervals), and the seed of both. fixed:
    parameters by name that are not fitted. flops: of each row, for the span of C; 6 N D if not given.

    ValueError for rows that no law can be fitted to, and for a name that is none of the law's parameters.
    """
    objective, fixed = objective or Huber(), dict(fixed or {})
    x, y, clusters = _checked(law, x, y, clusters, fixed)
    free, targets = np.array([each.name not in fixed for each in law.parameters]), np.log(y)
    found = search(law, x, targets, objective, clusters=clusters, starts=starts, seed=seed, fixed=fixed)
    draws = Draws(np.empty((0, len(free))), "none")
    if replicates:
        draws = resample(
            law, x, targets, found.optima, objective, clusters=clusters, replicates=replicates, seed=seed, free=free
        )
    profiles = intervals(law, x, targets, found.optima[0], found.threshold, clusters=clusters, free=free)
    estimates = _estimates(law, found.optima[0], draws.coordinates, fixed)
    others = _other_estimators(law, x, targets, found, objective, free)
    slopes = law.evaluate(found.optima[:1], x)[1][0]
    verdicts = (
        *identifiability.of_table(law, x, clusters, fixed),
        *identifiability.of_optimum(law, slopes, found.optima[0], free),
        *identifiability.of_intervals(law, estimates, draws.coordinates, fixed, float(y.min())),
        *identifiability.of_search(found.share, starts, _rivals(law, found, draws.coordinates)),
        *identifiability.of_estimators(estimates, others, fixed),
    )
    failures = {each.code for each in verdicts if each.level == "failure"}
    if failures & {"rows", "span", "collinear", "condition"}:
        names = np.array([each.name for each in law.parameters])[free]
        loose = names if "rows" in failures else names[identifiability.undetermined(slopes[:, free])]
        estimates = _widened(estimates, profiles, loose)
    return Fit(
        law=law.name,
        size=size,
        coordinates=found.optima[0],
        draws=draws.coordinates,
        parameters=estimates,
        noise=_noise(found.residuals, int(free.sum())),
        rows=len(y),
        clusters=len(np.unique(clusters)),
        spans=_spans(law, x, flops),
        verdicts=verdicts,
        fixed=fixed,
        details=_plain(
            {
                "estimator": {"name": objective.name, **vars(objective)},
                "objective": found.objective,
                "threshold": found.threshold,
                "starts": starts,
                "best_share": found.share,
                "basins": [
                    {"excess": cost, **law.values(each)} for cost, each in zip(found.excess, found.optima, strict=True)
                ],
                "condition": identifiability.condition(slopes[:, free]),
                "other_estimators": others,
                "profile": profiles,
                "bootstrap": {"kind": draws.kind, "replicates": len(draws.coordinates), "seed": seed},
            }
        ),
    )


def _checked(
    law: Law, x: Inputs, y: np.ndarray, clusters: np.ndarray | None, fixed: Mapping[str, float]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The inputs that the law names and the quantity as floats, and a label of each row. ValueError for bad ones."""
    names = [each.name for each in law.parameters]
    for name, value in fixed.items():
        if name not in names:
            raise ValueError(f"fixed parameter {name!r} is none of {law.name}'s; accepted: {', '.join(names)}")
        parameter = law.parameters[names.index(name)]
        if not parameter.lower <= value <= parameter.upper:
            raise ValueError(f"fixed {name} = {value:g}; accepted: {parameter.lower:g} to {parameter.upper:g}")
    if len(fixed) == len(names):
        raise ValueError(f"all parameters of {law.name} are fixed; at least one must be left to fit")
    missing = [symbol for symbol in law.inputs if symbol not in x]
    if missing:
        raise ValueError(f"law {law.name} needs {', '.join(missing)}; given: {', '.join(sorted(x)) or 'nothing'}")
    y = np.asarray(y, dtype=float)
    inputs = {symbol: np.asarray(x[symbol], dtype=float) for symbol in law.inputs}
    if not len(y):
        raise ValueError(f"law {law.name}: there are no rows to fit")
    for name, values in {law.quantity: y, **inputs}.items():
        if values.shape != y.shape or values.ndim != 1:
            raise ValueError(f"{name} has shape {values.shape}; one number for each of {len(y)} rows is accepted")
        bad = ~(np.isfinite(values) & ((values > 0) | (values == 0) & (name in law.zeros)))
        if bad.any():
            raise ValueError(
                f"{name} of row {np.argmax(bad)} is {values[np.argmax(bad)]:g}; positive ones are accepted"
            )
    clusters = np.arange(len(y)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    if clusters.shape != y.shape:
        raise ValueError(f"clusters has shape {clusters.shape}; one label for each of {len(y)} rows is accepted")
    return inputs, y, clusters


def _estimates(law: Law, best: np.ndarray, draws: np.ndarray, fixed: Mapping[str, float]) -> dict[str, Estimate]:
    """Each parameter with the percentiles and the standard deviation of its draws, (B, K)."""
    found = {}
    for k, parameter in enumerate(law.parameters):
        value = float(parameter.value(best[k]))
        if parameter.name in fixed:
            found[parameter.name] = Estimate(value, value, value, 0.0)
        elif len(draws) < 2:
            found[parameter.name] = Estimate(value, -np.inf, np.inf)
        else:
            values = parameter.value(draws[:, k])
            low, high = np.percentile(values, [2.5, 97.5])
            found[parameter.name] = Estimate(value, float(low), float(high), float(values.std(ddof=1)))
    return found


def _widened(
    estimates: Mapping[str, Estimate], profiles: Mapping[str, tuple[float, float]], loose: Collection[str]
) -> dict[str, Estimate]:
    """Without ends for loose parameters, and to the profile's interval for others: refits that start at one point of a
    valley do not tell how long it is."""
    found = {}
    for name, each in estimates.items():
        low, high = (-np.inf, np.inf) if name in loose else profiles.get(name, (each.value, each.value))
        found[name] = replace(each, low=min(each.low, low), high=max(each.high, high))
    return found


def _other_estimators(
    law: Law, x: Inputs, targets: np.ndarray, found: Found, objective: Objective, free: np.ndarray
) -> dict[str, dict[str, float]]:
    """What least squares makes of the rows, or Huber where least squares is the objective."""
    other = Huber() if isinstance(objective, LeastSquares) else LeastSquares()
    solved = minimise(law, x, targets, found.optima, other, free=free)
    return {other.name: law.values(solved.coordinates[np.argmin(solved.objective)])}


def _rivals(law: Law, found: Found, draws: np.ndarray) -> list[tuple[float, dict[str, float]]]:
    """The optima that the data does not tell from the best, and that lie a standard error or more from it."""
    errors = draws.std(axis=0) if len(draws) else np.zeros(found.optima.shape[1])
    return [
        (float(cost), law.values(each))
        for cost, each in zip(found.excess[1:], found.optima[1:], strict=True)
        if cost < CHI_SQUARED and (np.abs(each - found.optima[0]) > errors).any()
    ]


def _noise(residuals: np.ndarray, parameters: int) -> float:
    """Robust standard deviation of the residuals (n,), for the parameters that were fitted to them."""
    lost = len(residuals) / max(1, len(residuals) - parameters)
    return float(spread(residuals[None], np.ones((1, len(residuals))))[0] * np.sqrt(lost))


def _spans(law: Law, x: Inputs, flops: np.ndarray | None) -> dict[str, tuple[float, float]]:
    spans = {symbol: x[symbol] for symbol in law.inputs}
    if flops is not None:
        spans["C"] = np.asarray(flops, dtype=float)
    elif {"N", "D"} <= set(law.inputs):
        spans["C"] = 6 * x["N"] * x["D"]
    return {symbol: (float(np.nanmin(values)), float(np.nanmax(values))) for symbol, values in spans.items()}


def _plain(value: Any) -> Any:
    """As JSON has it: infinite and undefined numbers become None."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
