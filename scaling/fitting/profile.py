"""How much worse the best fit becomes when one parameter is held elsewhere: likelihood, without a likelihood.

For an M-estimator, 2 (F(held) - F) / unit is about chi-squared with one degree of freedom, where F sums rho(r) and
unit = E psi^2 / E psi' (Heritier & Ronchetti 1994); for least squares that is the variance of the noise.
"""

from typing import NamedTuple

import numpy as np

from scaling.fitting.levenberg import minimise
from scaling.fitting.objective import Huber, spread
from scaling.laws.law import Inputs, Law

CHI_SQUARED = 3.841458820694124
"""95 % point, one degree of freedom."""
DISTANCES = np.array([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 20.0])
"""From the optimum, in standard errors, at which a parameter is held."""


class Scale(NamedTuple):
    """What the residuals say of the precision of an M-estimate."""

    unit: float
    """Of differences of the objective: E psi^2 / E psi'."""
    variance: float
    """Times the inverse of J'J is the covariance of the coordinates: E psi^2 / (E psi')^2."""
    slope: float
    """E psi'."""


def scale(residuals: np.ndarray, threshold: float, parameters: int, clusters: np.ndarray) -> Scale:
    """Of the summed Huber loss with this threshold, at the residuals (n,) of its optimum.

    E psi' is a difference quotient over about the noise / n^(1/5), for a small threshold leaves few rows within it.
    Where psi errs together in the rows of a cluster (labels, (n,)), E psi^2 is that of the clusters' sums.
    """
    rows = len(residuals)
    width = max(float(spread(residuals[None], np.ones((1, rows)))[0]) * rows**-0.2, 1e-14)
    psi = np.clip(residuals, -threshold, threshold)
    higher, lower = (np.clip(residuals + shift, -threshold, threshold) for shift in (width, -width))
    slope = max(float((higher - lower).mean()) / (2 * width), 1e-12)
    sums = np.bincount(np.unique(clusters, return_inverse=True)[1], weights=psi)
    square = max((psi**2).sum(), (sums**2).sum()) / max(1, rows - parameters)
    return Scale(max(square / slope, 1e-28), max(square / slope**2, 1e-28), slope)


def intervals(
    law: Law,
    x: Inputs,
    targets: np.ndarray,
    optimum: np.ndarray,
    threshold: float,
    *,
    clusters: np.ndarray,
    free: np.ndarray,
) -> dict[str, tuple[float, float]]:
    """The 95 % profile interval of each free parameter; an end is infinite where holding it there costs too little.

    targets: ln of the quantity, (n,); optimum (K,), of Huber's loss with this threshold.
    """
    objective = Huber(threshold)
    values, slopes = law.evaluate(optimum[None], x)
    residuals, index = targets - values[0], np.flatnonzero(free)
    unit, variance, _ = scale(residuals, threshold, len(index), clusters)
    covariance = variance * np.linalg.pinv(slopes[0][:, index].T @ slopes[0][:, index], rcond=1e-14, hermitian=True)
    lowest = objective.value(residuals[None], np.ones((1, len(residuals))))[0]
    errors = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
    along = np.zeros((len(index), len(optimum)))
    along[:, index] = covariance / errors[:, None]
    signs, (low, high) = np.array([-1, 1]), law.bounds()
    starts = np.clip(optimum + np.einsum("ki,s,d->ksdi", along, signs, DISTANCES), low, high)
    others = np.broadcast_to(free & (np.arange(len(free)) != index[:, None])[:, None, None], starts.shape)
    held = minimise(
        law, x, targets, starts.reshape(-1, len(free)), objective,
        free=others.reshape(-1, len(free)), tolerance=1e-9, iterations=60,
    )  # fmt: skip
    excess = 2 * (held.objective.reshape(starts.shape[:3]) - lowest) / unit
    found = {}
    for place, (k, costs) in enumerate(zip(index, excess, strict=True)):
        below, above = starts[place, :, :, k]
        ends = _end(below, optimum[k], costs[0], low[k]), _end(above, optimum[k], costs[1], high[k])
        found[law.parameters[k].name] = tuple(float(law.parameters[k].value(each)) for each in ends)
    return found


def _end(held: np.ndarray, optimum: float, excess: np.ndarray, bound: float) -> float:
    """The coordinate at which the excess reaches the 95 % point, its root being nearly a line; the bound where it is
    not reached on the way there, and infinite where it is not reached at all."""
    places = np.concatenate([[optimum], held])
    roots = np.sqrt(np.maximum(np.concatenate([[0], excess]), 0))
    beyond = np.flatnonzero(roots > np.sqrt(CHI_SQUARED))
    if len(beyond):
        pair = slice(beyond[0] - 1, beyond[0] + 1)
        return float(np.interp(np.sqrt(CHI_SQUARED), roots[pair], places[pair]))
    return bound if held[-1] == bound else float(np.copysign(np.inf, held[-1] - optimum))
