"""A law of the best learning rate or batch from runs: one call, by any of three methods, judged by the others."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from scaling.laws import find
from scaling.laws.powers import STEP_LAW_BATCH, STEP_LAW_LR, PowerLaw
from scaling.optima.bowls import CHECK, WINDOW, bowl
from scaling.optima.cells import Cell, cells, inputs
from scaling.optima.pooled import NEAR, by_pooling, near_optimal, row_bootstrap
from scaling.optima.regression import condition
from scaling.optima.surface import by_surface
from scaling.optima.verdicts import compared, judged
from scaling.optima.vertices import Optima, Solution, by_vertices, optima, robust_deviation
from scaling.results import Bowl, Estimate, Fit, Verdict
from scaling.table import RunTable

Method = Literal["vertices", "pooled", "surface"]
WINDOWS = (CHECK, 0.03)
"""Other windows that a fit is compared with."""


def fit_optima(
    source: RunTable | Sequence[Bowl],
    law: PowerLaw | str,
    *,
    size: str,
    method: Method = "vertices",
    window: float = WINDOW,
    skew: bool = True,
    partner: PowerLaw | None = None,
    replicates: int = 1000,
    seed: int = 0,
    checks: bool = True,
) -> Fit:
    """A law of lr or batch_tokens fitted to the runs of a table, or (by vertices) to bowls that were found before.

    `method`: "vertices" is Tobit regression of the cells' optima, "pooled" Step Law's regression of all runs within
    0.25 % of their cell's lowest loss, "surface" the laws of lr and batch at once in one surface (`partner` is the
    other one, by default Step Law's). `window` and `skew` are as of `find_bowls`. Draws are of a bootstrap of cells. A
    law that has the batch among its inputs is fitted to the best rate at each batch. With `checks` a table is fitted by
    the other methods and windows too, and where they leave the interval there is a warning. ValueError if the law is
    none of lr or batch_tokens, if a column that it needs is unknown, or where no cell tells an optimum.
    """
    law = find(law) if isinstance(law, str) else law
    if not isinstance(law, PowerLaw) or law.quantity not in ("lr", "batch_tokens"):
        raise ValueError(
            f"law {law.name!r} is of {law.quantity}; accepted is a product of powers for lr or batch_tokens"
        )
    if method not in get_args(Method) or (method != "vertices" and not isinstance(source, RunTable)):
        raise ValueError(
            f"method {method!r}: accepted is one of {', '.join(get_args(Method))}; bowls alone need vertices"
        )
    at_batch = bool({"B", "batch_tokens"} & set(law.inputs))
    if isinstance(source, RunTable):
        grid = cells(source, size, at_batch=at_batch)
        bowls: Sequence[Bowl] = [bowl(cell, window, skew) for cell in grid if len(cell)]
    else:
        grid, bowls = (), source
    found = optima(bowls, law.quantity)
    if not len(found.bowls):
        raise ValueError(f"law {law.name!r}: no cell tells an optimum of {law.quantity}; it must vary within cells")
    partner = partner or (STEP_LAW_BATCH if law.quantity == "lr" else STEP_LAW_LR)
    fitted = _Fitting(law, partner, size, grid, found, window, skew, replicates, seed)
    solution = fitted.by(method, window)
    told = _described(fitted, solution, method)
    return _compared(told, fitted, method) if checks and grid else told


class _Fitting:
    """What the methods share."""

    def __init__(
        self,
        law: PowerLaw,
        partner: PowerLaw,
        size: str,
        grid: Sequence[Cell],
        found: Optima,
        window: float,
        skew: bool,
        replicates: int,
        seed: int,
    ) -> None:
        self.law, self.partner, self.size, self.grid, self.found = law, partner, size, grid, found
        self.window, self.skew, self.replicates, self.seed = window, skew, replicates, seed
        self.x = inputs(law, [each.cell for each in found.bowls], size)
        settings = [tuple(v for k, v in each.cell.items() if k != "batch_tokens") for each in found.bowls]
        self.clusters = np.array([settings.index(each) for each in settings])

    def by(self, method: str, window: float) -> Solution:
        """ValueError where the method has too few cells."""
        if method == "pooled":
            return by_pooling(self.grid, self.law, self.size, self.replicates, self.seed)
        if method == "surface":
            pair = (self.law, self.partner) if self.law.quantity == "lr" else (self.partner, self.law)
            surface = by_surface(self.grid, *pair, self.size, self.replicates, self.seed, window, self.skew)
            return surface.lr if self.law.quantity == "lr" else surface.batch_tokens
        found, clusters = self.found, self.clusters
        if window != self.window:
            bowls = [bowl(cell, window, self.skew) for cell in self.grid if len(cell)]
            found = optima(bowls, self.law.quantity)
            clusters = np.arange(len(found.bowls))
        return by_vertices(found, self.law, self.size, clusters, self.replicates, self.seed)


def _described(fitting: _Fitting, solution: Solution, method: str) -> Fit:
    law, found = fitting.law, fitting.found
    parameters = {
        each.name: _estimate(each.value(solution.coordinates[i]), each.value(solution.draws[:, i]))
        for i, each in enumerate(law.parameters)
    }
    flops = np.array([each.cell["flops"] for each in found.bowls])
    compute = {"C": (float(flops.min()), float(flops.max()))}
    spans = {name: (float(values.min()), float(values.max())) for name, values in fitting.x.items()}
    clusters = len(set(fitting.clusters))
    details: dict[str, Any] = {
        "estimator": method,
        "window": NEAR if method == "pooled" else fitting.window,
        "scatter": solution.scatter,
        "freedom": max(clusters - len(law.parameters), 1),
        "condition": condition(solution.design),
        "optima": {"known": int(found.known.sum()), "censored": int(found.censored.sum())},
        "seed": fitting.seed,
    }
    if method == "pooled":
        near = near_optimal(fitting.grid, law.quantity)
        drawn = row_bootstrap(near, law, fitting.size, fitting.replicates, fitting.seed)
        details["row_bootstrap"] = {"mean": drawn.mean(axis=0).tolist(), "sd": drawn.std(axis=0).tolist()}
    return Fit(
        law.name,
        fitting.size,
        solution.coordinates,
        solution.draws,
        parameters,
        robust_deviation(solution.residuals, len(law.parameters)),
        len(solution.design),
        clusters,
        compute | spans,
        judged(law, found, solution, parameters, fitting.x, clusters),
        details=details,
    )


def _estimate(value: np.ndarray, draws: np.ndarray) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), float(draws.std()))


def _compared(fit: Fit, fitting: _Fitting, method: str) -> Fit:
    """With the exponents by other windows and methods, and a warning where they leave the interval."""
    others: dict[str, dict[str, list[float]]] = {"window": {}, "method": {}}
    trials = [] if method == "pooled" else [("window", f"a window of {each:.0%}", method, each) for each in WINDOWS]
    trials += [("method", each, each, fitting.window) for each in get_args(Method) if each != method]
    quick = copy(fitting)
    quick.replicates = 2
    for code, label, name, window in trials:
        try:
            others[code][label] = quick.by(name, window).coordinates.tolist()
        except ValueError:  # the surface needs whole planes, which a table may lack
            continue
    said: list[Verdict] = []
    for code, found in others.items():
        said += compared(fitting.law, fit.parameters, found, code)
    return replace(fit, verdicts=(*fit.verdicts, *said), details=fit.details | {"others": others})
