"""A law through the optima of cells: those that are known with their errors, those behind an edge as inequalities."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from scaling.laws.powers import PowerLaw
from scaling.optima.cells import inputs
from scaling.optima.regression import censored_regression, cluster_weights, widened
from scaling.results import Bowl

LEAST_SCATTER = 0.01
"""In ln of the quantity."""


@dataclass(frozen=True)
class Optima:
    """ln of the best lr, or batch, of n cells."""

    bowls: tuple[Bowl, ...]
    low: np.ndarray
    """(n,), equal to `high` where the optimum is known; infinite where there is no bound."""
    high: np.ndarray
    error: np.ndarray
    """(n,), NaN where it is only bounded."""

    @property
    def known(self) -> np.ndarray:
        return self.low == self.high

    @property
    def censored(self) -> np.ndarray:
        """Those with one bound alone."""
        return np.isinf(self.low) | np.isinf(self.high)


def optima(bowls: Sequence[Bowl], quantity: str) -> Optima:
    """The optima of these bowls that say something of `quantity`, "lr" or "batch_tokens"."""
    told, low, high, error = [], [], [], []
    for bowl in bowls:
        estimate = getattr(bowl, quantity)
        if estimate is None or not (estimate.low > 0 or np.isfinite(estimate.high)):
            continue
        known = np.isfinite(estimate.error) and quantity not in bowl.censored
        told.append(bowl)
        low.append(np.log(estimate.value if known else estimate.low) if known or estimate.low > 0 else -np.inf)
        high.append(np.log(estimate.value if known else estimate.high))
        error.append(estimate.error / estimate.value if known else np.nan)
    return Optima(tuple(told), np.array(low), np.array(high), np.array(error))


@dataclass(frozen=True)
class Solution:
    """What a method comes to, before it is judged."""

    coordinates: np.ndarray
    """(K,)"""
    draws: np.ndarray
    """(B, K)"""
    residuals: np.ndarray
    """Of ln of the quantity where it is known, (m,)."""
    scatter: float
    """Standard deviation of optima around the law beyond the errors of their measurement."""
    design: np.ndarray
    """(n, K)"""


def by_vertices(found: Optima, law: PowerLaw, size: str, clusters: np.ndarray, replicates: int, seed: int) -> Solution:
    """Tobit regression weighted by 1 / (error^2 + scatter^2), its draws by a bootstrap of clusters (n,)."""
    design, offset = law.design(inputs(law, [each.cell for each in found.bowls], size))
    low, high = found.low - offset, found.high - offset
    error = np.where(found.known, found.error, np.nanmedian(found.error) if found.known.any() else 0.1)
    one = np.ones((1, len(low)))
    scatter = 0.1
    for _ in range(5):  # scatter and law depend on each other, weakly
        point = censored_regression(design, low, high, error**2 + scatter**2, one)[0]
        residuals = (low - design @ point)[found.known]
        scatter = _scatter(residuals, error[found.known], design.shape[1])
    variance = error**2 + scatter**2
    draws = censored_regression(design, low, high, variance, cluster_weights(clusters, replicates, seed))
    return Solution(point, widened(draws, point, len(set(clusters))), residuals, scatter, design)


def robust_deviation(residuals: np.ndarray, fitted: int = 0) -> float:
    """1.4826 times the median absolute residual, for `fitted` coordinates; NaN without residuals to spare."""
    if len(residuals) <= fitted:
        return float("nan")
    return float(1.4826 * np.median(np.abs(residuals)) * np.sqrt(len(residuals) / (len(residuals) - fitted)))


def _scatter(residuals: np.ndarray, error: np.ndarray, fitted: int) -> float:
    """The deviation that explains the residuals together with their errors, at least a hundredth.

    Paule & Mandel's: squares of residuals over variances come to their degrees of freedom; strays count as three
    robust deviations.
    """
    whole = robust_deviation(residuals, fitted)
    if not np.isfinite(whole):
        return 0.1
    square = np.minimum(np.abs(residuals), 3 * whole) ** 2

    def surplus(variance: float) -> float:
        return float((square / (error**2 + variance)).sum() - (len(residuals) - fitted))

    low, high = LEAST_SCATTER**2, max(float(square.sum()), LEAST_SCATTER**2)
    if surplus(low) <= 0 or surplus(high) >= 0:
        return LEAST_SCATTER
    return float(np.sqrt(brentq(surplus, low, high)))
