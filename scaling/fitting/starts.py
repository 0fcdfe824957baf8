"""Where fits start: a Sobol sequence over the parameters, and by variable projection those that least squares gives."""

from collections.abc import Collection, Mapping

import numpy as np
from scipy.stats import qmc

from scaling.laws.law import Inputs, Law

SMALLEST = 1e-6
"""Coefficient that least squares may give, as a share of the quantity at a typical row: the start of a negative one."""


def draw(
    law: Law, x: Inputs, targets: np.ndarray, count: int, seed: int, fixed: Mapping[str, float] | None = None
) -> np.ndarray:
    """`count` parameter vectors (count, K) for ln of the measured quantity (n,), within the law's bounds.

    fixed: parameters that all of them have in common. The others lie evenly between `Parameter.starts`; of a law that
    is linear in some coefficients, these are then replaced by what least squares gives for the other parameters
    (variable projection, Golub & Pereyra 1973).
    """
    ends = np.array([each.coordinate(np.array(each.starts)) for each in law.parameters], dtype=float)
    with np.errstate(all="ignore"):
        points = qmc.Sobol(len(ends), seed=seed).random_base2(max(0, count - 1).bit_length())[:count]
        starts = ends[:, 0] + points * (ends[:, 1] - ends[:, 0])
        for k, each in enumerate(law.parameters):
            if each.name in (fixed or {}):
                starts[:, k] = each.coordinate(fixed[each.name])
        chosen = [each for each in law.coefficients if each not in (fixed or {})]
        return project(law, x, targets, starts, chosen) if chosen else starts


def project(law: Law, x: Inputs, targets: np.ndarray, starts: np.ndarray, chosen: Collection[str]) -> np.ndarray:
    """The parameter vectors (S, K) with the chosen coefficients at their least squares of the relative residuals.

    The law's own Jacobian gives the columns: of a quantity that is the sum of c_k g_k, d ln f / d c_k = g_k / f.
    """
    index = [k for k, each in enumerate(law.parameters) if each.name in chosen]
    logarithmic = np.array([law.parameters[k].logarithmic for k in index])
    current = np.where(logarithmic, np.exp(starts[:, index]), starts[:, index])
    values, slopes = law.evaluate(starts, x)
    predicted = np.exp(values - targets)
    terms = slopes[..., index] * predicted[..., None] / np.where(logarithmic, current, 1)[:, None]
    others = predicted - (terms * current[:, None]).sum(axis=-1)
    scale = terms.mean(axis=1) + 1e-300
    columns = (terms / scale[:, None]).swapaxes(1, 2)
    products = columns @ columns.swapaxes(1, 2)
    solution = _non_negative(products, (columns @ (1 - others)[..., None])[..., 0])
    solution = np.maximum(solution, SMALLEST) / scale
    projected = starts.copy()
    projected[:, index] = np.where(logarithmic, np.log(solution), solution)
    projected = np.clip(projected, *law.bounds())
    return np.where(np.isfinite(projected).all(axis=1, keepdims=True), projected, starts)


def _non_negative(matrices: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Least squares by normal equations, (S, L, L) and (S, L) to (S, L), leaving out what comes out negative."""
    kept = np.ones(sums.shape, bool)
    for _ in range(sums.shape[1]):
        matrix = matrices * (kept[:, None] & kept[..., None])
        diagonal = np.einsum("skk->sk", matrix)
        diagonal *= 1 + 1e-10
        diagonal += ~kept
        solution = np.linalg.solve(matrix, (sums * kept)[..., None])[..., 0]
        kept &= solution > 0
    return np.where(kept, solution, 0)
