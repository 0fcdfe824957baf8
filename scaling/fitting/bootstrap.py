"""What a fit would have been with other data: runs or cells drawn as a whole, or their residuals with other signs.

Rows of one run or one cell err together, so that drawing rows one by one would take them for more data than they are.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from scaling.fitting.levenberg import minimise
from scaling.fitting.objective import Objective
from scaling.fitting.profile import scale
from scaling.laws.law import Inputs, Law

FEW = 10
"""Clusters for each parameter, below which tables of drawn clusters hold too few different ones: with 7 for each of
Chinchilla's parameters, their intervals cover the truth in 99 % of cases and not 95 %."""
TOLERANCE = 1e-8
"""Of the objective's relative reduction: about 1e-3 standard errors."""
WEBB = np.sqrt([0.5, 1.0, 1.5])
"""Sizes of the six values of Webb 2014 (QED working paper 1315): mean 0, variance 1, for a handful of clusters."""


@dataclass(frozen=True)
class Draws:
    coordinates: np.ndarray
    """(B, K); a replicate that came to nothing is left out."""
    kind: Literal["cluster", "wild", "none"]


def resample(
    law: Law,
    x: Inputs,
    targets: np.ndarray,
    optima: np.ndarray,
    objective: Objective,
    *,
    clusters: np.ndarray,
    replicates: int,
    seed: int,
    free: np.ndarray,
) -> Draws:
    """Refits `replicates` tables, each from every one of the optima (M, K), whose first is the best; the best is kept.

    targets: ln of the quantity, (n,). clusters: label of each row, (n,). With fewer than `FEW` clusters a parameter,
    the residuals of the best optimum are given random factors by cluster (wild cluster bootstrap, Cameron, Gelbach &
    Miller 2008) instead of drawing clusters with replacement.
    """
    generator = np.random.default_rng(seed)
    groups, member = np.unique(clusters, return_inverse=True)
    if len(groups) < FEW * free.sum():
        kind, weights = "wild", None
        factors = generator.choice(np.concatenate([-WEBB, WEBB]), size=(replicates, len(groups)))
        errors = _errors(law, x, targets, optima[0], objective, clusters, free)
        targets = law.log_value(optima[:1], x) + factors[:, member] * errors
    else:
        kind, weights = "cluster", _multiplicities(generator, len(groups), replicates)[:, member]
    best, lowest = np.repeat(optima[:1], replicates, axis=0), np.full(replicates, np.inf)
    for optimum in optima:
        found = minimise(
            law, x, targets, np.repeat(optimum[None], replicates, axis=0), objective,
            weights=weights, free=free, tolerance=TOLERANCE, iterations=100,
        )  # fmt: skip
        better = found.objective < lowest
        best[better], lowest[better] = found.coordinates[better], found.objective[better]
    return Draws(best[np.isfinite(lowest)], kind)


def _multiplicities(generator: np.random.Generator, clusters: int, replicates: int) -> np.ndarray:
    """How often each cluster is drawn, (B, G)."""
    return generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=replicates).astype(float)


def _errors(
    law: Law,
    x: Inputs,
    targets: np.ndarray,
    optimum: np.ndarray,
    objective: Objective,
    clusters: np.ndarray,
    free: np.ndarray,
) -> np.ndarray:
    """The residuals (n,) with what the fit took off them: r + h / (1 - h) psi(r) / E psi' for a row of leverage h.

    That is r / (1 - h) for least squares; for least absolute deviations it is what Feng, He & Hu 2011 (Biometrika 98)
    correct by, without which the rows that the fit goes through exactly make intervals too narrow.
    """
    values, slopes = law.evaluate(optimum[None], x)
    residuals, slopes = targets - values[0], slopes[0][:, free]
    threshold = float(objective.threshold(residuals[None], np.ones((1, len(residuals))))[0])
    leverage = np.einsum("nk,kn->n", slopes, np.linalg.pinv(slopes, rcond=1e-7)).clip(0, 0.9)
    psi = np.clip(residuals, -threshold, threshold)
    slope = scale(residuals, threshold, int(free.sum()), clusters).slope
    return residuals + leverage / (1 - leverage) * psi / slope
