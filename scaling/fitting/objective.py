"""What a fit minimises: Huber's loss of the residuals in ln of the quantity, by where its threshold comes from.

With a threshold t it is r^2 / 2 for |r| <= t and t (|r| - t / 2) beyond: least squares for t = inf, and for t -> 0 in
proportion to the sum of |r|. The threshold is a number, or a multiple of a scale that is estimated with the law.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

CONSISTENT = 1.4826
"""Times the median of |r| is the standard deviation of a normal r."""
SMALLEST = 1e-14
"""Threshold, so that data without noise has one."""


def huber(residuals: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    """Huber's loss of each residual, of their shape (Huber 1964)."""
    absolute = np.abs(residuals)
    clipped = np.minimum(absolute, threshold)
    return clipped * (absolute - clipped / 2)


def spread(residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Robust standard deviation from the weighted median of |r|, (S, n) to (S,)."""
    absolute = np.abs(residuals)
    order = np.argsort(absolute, axis=-1)
    heaped = np.cumsum(np.take_along_axis(np.broadcast_to(weights, absolute.shape), order, axis=-1), axis=-1)
    middle = np.argmax(heaped >= heaped[..., -1:] / 2, axis=-1)[..., None]
    return CONSISTENT * np.take_along_axis(np.take_along_axis(absolute, order, axis=-1), middle, axis=-1)[..., 0]


class Objective(ABC):
    """A sum over rows of a function of their residuals, each times its weight. Residuals (S, n), weights (S, n)."""

    name: str

    @abstractmethod
    def threshold(self, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Huber's threshold in ln of the quantity at these residuals, (S,)."""

    def value(self, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """What is minimised, (S,)."""
        return (weights * huber(residuals, self.threshold(residuals, weights)[:, None])).sum(axis=-1)


@dataclass(frozen=True)
class Huber(Objective):
    """Hoffmann et al. 2022 eq. 11, as a sum and not a mean: at delta = 1e-3 most residuals count linearly."""

    delta: float = 1e-3
    name = "huber"

    def threshold(self, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.full(len(residuals), self.delta)


@dataclass(frozen=True)
class LeastSquares(Objective):
    """Half the sum of squares."""

    name = "least_squares"

    def threshold(self, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.full(len(residuals), np.inf)


@dataclass(frozen=True)
class LeastAbsolute(Objective):
    """The sum of |r| (LAD), as the limit of a threshold that is a millionth of their mean."""

    name = "least_absolute"

    def threshold(self, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.maximum(1e-6 * (weights * np.abs(residuals)).sum(axis=-1) / weights.sum(axis=-1), SMALLEST)

    def value(self, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return (weights * np.abs(residuals)).sum(axis=-1)


@dataclass(frozen=True)
class HuberOfNoise(Objective):
    """A threshold of delta standard deviations of the noise; 1.345 keeps 95 % of least squares' efficiency."""

    delta: float = 1.345
    name = "huber_of_noise"

    def threshold(self, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.maximum(self.delta * spread(residuals, weights), SMALLEST)

    def value(self, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Huber's loss over the square of its threshold is scale-free: the logarithm of the scale weighs against it."""
        threshold = self.threshold(residuals, weights)
        losses = (weights * huber(residuals, threshold[:, None])).sum(axis=-1)
        return losses / threshold**2 * self.delta**2 + weights.sum(axis=-1) * np.log(threshold / self.delta)


@dataclass(frozen=True)
class HuberLikelihood(Objective):
    """Likelihood of Huber's density with a free scale sigma, as Besiroglu et al. 2024 (arXiv 2404.10102) report it.

    minus ln likelihood = sum of huber(r / sigma, delta) + ln sigma, up to a constant. Their delta of 1e-3 is a
    threshold of 1e-6 of the mean |r|: least absolute deviations but for that.
    """

    delta: float = 1e-3
    name = "huber_likelihood"

    def scale(self, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The likeliest sigma at these residuals, (S,): of sum of r psi(r) = sigma^2 over the weights' sum."""
        absolute, total = np.abs(residuals), weights.sum(axis=-1)
        sigma = self.delta * (weights * absolute).sum(axis=-1) / total
        for _ in range(60):
            inside = absolute <= self.delta * sigma[:, None]
            squares = (weights * np.where(inside, absolute, 0) ** 2).sum(axis=-1) / total
            linear = self.delta * (weights * np.where(inside, 0, absolute)).sum(axis=-1) / total
            previous, sigma = sigma, linear / 2 + np.sqrt(linear**2 / 4 + squares)
            if np.allclose(previous, sigma, rtol=1e-12, atol=0):
                break
        return np.maximum(sigma, SMALLEST)

    def threshold(self, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.maximum(self.delta * self.scale(residuals, weights), SMALLEST)

    def value(self, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
        sigma = self.scale(residuals, weights)[:, None]
        return (weights * (huber(residuals / sigma, self.delta) + np.log(sigma))).sum(axis=-1)
