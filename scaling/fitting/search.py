"""The best optimum of a law's fit and those that compete with it, from many starts."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scaling.fitting.levenberg import minimise
from scaling.fitting.objective import Huber, Objective, spread
from scaling.fitting.profile import scale
from scaling.fitting.starts import draw
from scaling.laws.law import Inputs, Law

RACE = 400
"""Rows, beyond which the starts race on a sample of this many, and their winners alone see all."""
KEPT = 3
"""Optima, the best included."""
RIVAL = 100.0
"""Chi-squared by which an optimum may be worse than the best to be kept."""
SAME = 1e-3
"""Of the noise: optima whose predictions differ by less are one."""


@dataclass(frozen=True)
class Found:
    optima: np.ndarray
    """(M, K), the best first."""
    excess: np.ndarray
    """(M,) what each costs in chi-squared (as profile intervals measure it) over the best."""
    objective: float
    """Of the best."""
    threshold: float
    """Of Huber's loss, at the best."""
    residuals: np.ndarray
    """(n,), of the best."""
    share: float
    """Of the starts that came to the best."""


def search(
    law: Law,
    x: Inputs,
    targets: np.ndarray,
    objective: Objective,
    *,
    clusters: np.ndarray,
    starts: int,
    seed: int,
    fixed: Mapping[str, float],
) -> Found:
    """Fits ln of the quantity, (n,), from `starts` points.

    clusters: label of each row, (n,). ValueError where the law can be evaluated at none of the points.
    """
    free = np.array([each.name not in fixed for each in law.parameters])
    few = _sample(len(targets), seed)
    here = {symbol: values[few] for symbol, values in x.items()}
    points = draw(law, here, targets[few], starts, seed, fixed)
    raced = minimise(law, here, targets[few], points, objective, free=free, tolerance=1e-10)
    order = np.argsort(raced.objective, kind="stable")
    if not np.isfinite(raced.objective[order[0]]):
        raise ValueError(f"law {law.name} cannot be evaluated on these rows from any of {starts} starts")
    noise = max(float(spread(raced.residuals[order[:1]], np.ones((1, len(few))))[0]), 1e-9)
    distinct = _distinct(raced.residuals, order, raced.converged, SAME * noise)
    near = np.sqrt(((raced.residuals - raced.residuals[order[0]]) ** 2).mean(axis=1)) <= SAME * noise
    polished = minimise(law, x, targets, raced.coordinates[distinct], objective, free=free)
    best = np.argsort(polished.objective, kind="stable")
    residuals = polished.residuals[best]
    threshold = float(objective.threshold(residuals[:1], np.ones((1, len(targets))))[0])
    losses = Huber(threshold).value(residuals, np.ones_like(residuals))
    excess = 2 * (losses - losses[0]) / scale(residuals[0], threshold, int(free.sum()), clusters).unit
    kept = excess <= RIVAL
    return Found(
        optima=polished.coordinates[best][kept][:KEPT],
        excess=excess[kept][:KEPT],
        objective=float(polished.objective[best[0]]),
        threshold=threshold,
        residuals=residuals[0],
        share=float(near.mean()),
    )


def _sample(rows: int, seed: int) -> np.ndarray:
    """Of the rows, in order."""
    if rows <= RACE:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, RACE, replace=False))


def _distinct(residuals: np.ndarray, order: np.ndarray, converged: np.ndarray, same: float) -> list[int]:
    """The best, and the next best converged ones that predict otherwise; a few more than are kept."""
    chosen = [int(order[0])]
    for each in order[1:]:
        if converged[each] and all(np.sqrt(((residuals[each] - residuals[one]) ** 2).mean()) > same for one in chosen):
            chosen.append(int(each))
        if len(chosen) == 2 * KEPT:
            break
    return chosen
