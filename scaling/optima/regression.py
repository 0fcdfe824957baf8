"""Weighted linear regression for many weightings at once: of points, of points behind an interval, and of bootstraps.

A design is rotated to orthonormal columns first, so that normal equations are well conditioned; directions in which it
does not vary are left at the shortest solution.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr
from scipy.stats import t as student

FREEDOM = 4.0
"""Of Student's t, by which an optimum far from the law counts less."""
ITERATIONS, TOLERANCE = 200, 1e-5


@dataclass(frozen=True)
class Rotated:
    """design (n, K) = basis (n, R) @ inverse of back (K, R)."""

    basis: np.ndarray
    back: np.ndarray

    @classmethod
    def of(cls, design: np.ndarray) -> "Rotated":
        scale = np.maximum(np.abs(design).max(axis=0), 1e-300)
        left, singular, right = np.linalg.svd(design / scale, full_matrices=False)
        rank = int((singular > 1e-9 * singular[0]).sum())
        size = np.sqrt(len(design))
        return cls(left[:, :rank] * size, (right[:rank].T / singular[:rank]) * size / scale[:, None])

    def coordinates(self, rotated: np.ndarray) -> np.ndarray:
        """(S, R) to (S, K)."""
        return rotated @ self.back.T

    def solve(self, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Weighted least squares of y, (n,) or (S, n), under weights (S, n): (S, R) of rotated coordinates."""
        pairs = (self.basis[:, :, None] * self.basis[:, None, :]).reshape(len(self.basis), -1)
        rank = self.basis.shape[1]
        normal = (weights @ pairs).reshape(len(weights), rank, rank)
        normal += 1e-12 * np.eye(rank) * weights.sum(axis=1)[:, None, None]  # a resample may repeat one row alone
        return np.linalg.solve(normal, ((weights * y) @ self.basis)[..., None])[..., 0]


def least_squares(design: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coordinates (S, K) under each row of `weights` (S, n)."""
    rotated = Rotated.of(design)
    return rotated.coordinates(rotated.solve(y, weights))


def condition(design: np.ndarray) -> float:
    """Largest over smallest singular value of the design with centred columns in units of their spread; 1 for one."""
    varied = design - design.mean(axis=0)
    constant = np.abs(varied).max(axis=0) < 1e-9
    if (constant & (np.abs(design - 1).max(axis=0) > 1e-9)).any():
        return float("inf")  # an input that does not vary
    varied = varied[:, ~constant]
    if not varied.shape[1]:
        return 1.0
    singular = np.linalg.svd(varied / varied.std(axis=0), compute_uv=False)
    return float(singular[0] / singular[-1]) if singular[-1] > 1e-9 * singular[0] else float("inf")


def cluster_weights(clusters: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """Weights (replicates, n) of the Bayesian bootstrap (Rubin 1981): each cluster as a whole, with an exponential one.

    It has the spread of drawing clusters with replacement, and no draw loses all cells of a size.
    """
    _, index = np.unique(clusters, return_inverse=True)
    drawn = np.random.default_rng(seed).exponential(size=(replicates, index.max() + 1))
    return drawn[:, index]


def row_weights(rows: int, replicates: int, seed: int) -> np.ndarray:
    """How often each row is drawn when as many are drawn with replacement, (replicates, rows)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(rows, np.full(rows, 1 / rows), size=replicates).astype(float)


def widened(draws: np.ndarray, point: np.ndarray, clusters: int) -> np.ndarray:
    """Bootstrap draws (B, K) spread as Student's interval has it for so few clusters, around the point (K,).

    Draws of n clusters are too narrow by sqrt((n - K) / n), and their 95 % interval is a normal's.
    """
    freedom = max(clusters - draws.shape[1], 1)
    factor = np.sqrt(clusters / freedom) * min(student.ppf(0.975, freedom) / 1.96, 4.0)
    return point + factor * (draws - draws.mean(axis=0))


def censored_regression(
    design: np.ndarray, low: np.ndarray, high: np.ndarray, variance: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Coordinates (S, K) of a regression of values that lie between `low` and `high` (n,), equal where they are known.

    Tobit with known variances (n,) up to a factor, which is fitted, by expectation-maximisation; known values have
    errors of Student's t (Lange, Little & Taylor 1989), so that a stray one does not lead.
    """
    exact = low == high
    rotated, deviation = Rotated.of(design), np.sqrt(variance)
    middle = np.where(exact, low, np.where(np.isinf(low), high, np.where(np.isinf(high), low, (low + high) / 2)))
    solution = rotated.solve(middle, weights / variance)
    factor = np.ones((len(weights), 1))
    for _ in range(ITERATIONS):
        mean, sigma = solution @ rotated.basis.T, factor * deviation
        value, spread = np.broadcast_to(middle, mean.shape).copy(), np.zeros_like(mean)
        value[:, ~exact], spread[:, ~exact] = _truncated(mean[:, ~exact], sigma[:, ~exact], low[~exact], high[~exact])
        trust = np.where(exact, (FREEDOM + 1) / (FREEDOM + ((value - mean) / sigma) ** 2), 1.0)
        step = rotated.solve(value, weights * trust / variance)
        square = ((value - step @ rotated.basis.T) ** 2 + spread) * trust / variance
        factor = np.sqrt(np.maximum((weights * square).sum(axis=1) / weights.sum(axis=1), 1e-12))[:, None]
        moved, solution = np.abs(step - solution).max(initial=0.0), step
        if moved < TOLERANCE:
            break
    return rotated.coordinates(solution)


def _truncated(mean: np.ndarray, sigma: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of normals within their intervals, (S, m) each."""
    a, b = (low - mean) / sigma, (high - mean) / sigma
    flipped = a > -b  # the nearer tail to the left, where differences of the distribution are exact
    a, b = np.where(flipped, -b, a), np.where(flipped, -a, b)
    a, b = np.clip(a, -35, 35), np.clip(b, -35, 35)
    mass = np.maximum(ndtr(b) - ndtr(a), 1e-300)
    at_a, at_b = (np.exp(-0.5 * each**2) / np.sqrt(2 * np.pi) for each in (a, b))
    shift = (at_a - at_b) / mass
    shrunk = 1 + (a * at_a - b * at_b) / mass - shift**2
    return mean + sigma * np.where(flipped, -shift, shift), sigma**2 * np.clip(shrunk, 1e-6, 1.0)
