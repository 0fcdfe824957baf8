"""A convex quadratic or cubic through the losses of one cell, its vertex and how sure that is."""

from dataclasses import dataclass, replace
from itertools import permutations, product
from math import factorial

import numpy as np

from scaling.cells import levels

LEAST_RUNS = {1: 4, 2: 8}
"""In the window, for a quadratic of so many settings."""
CUBIC_RUNS = {1: 8, 2: 20}
"""For cubic terms: twice their coefficients."""
OUTLIER = 5.0
"""Robust standard deviations beyond which a run is set aside."""
NEWTON = 30


@dataclass(frozen=True)
class Polynomial:
    """ln loss = level + (z - vertex)' curvature (z - vertex) / 2, and cubic terms if fitted, over d logarithms."""

    vertex: np.ndarray
    """(d,)"""
    errors: np.ndarray
    """Standard errors of the vertex, (d,), by the delta method."""
    curvature: np.ndarray
    """(d, d), symmetric, at the vertex."""
    level: float
    freedom: int
    """Runs less coefficients."""
    residuals: np.ndarray
    """Of each run from the polynomial of the others, (n,)."""
    used: np.ndarray
    """Which runs it went through, (n,) of bool."""
    cubic: bool = False
    outliers: int = 0

    @property
    def convex(self) -> bool:
        return bool((np.linalg.eigvalsh(self.curvature) > 0).all())


def fitted_bowl(z: np.ndarray, y: np.ndarray, window: float, skew: bool = True) -> Polynomial | None:
    """Least squares of ln loss `y` (n,) over logarithms `z` (n, d) on runs within a share `window` of the lowest.

    Runs that are further than `OUTLIER` robust deviations from the bowl are set aside, one after another. The window
    is first laid above the third lowest run, so that a stray lowest one is seen before it draws the window down. None
    where too few runs or levels are left.
    """
    d = z.shape[1]
    kept, outliers, rank = np.ones(len(y), dtype=bool), 0, min(2, len(y) - 1)
    while True:
        used = kept & (y <= np.sort(y[kept])[rank] + np.log1p(window))
        found = None
        if used.sum() >= LEAST_RUNS[d] and all(len(set(levels(np.exp(column[used])))) >= 3 for column in z.T):
            found = least_squares_bowl(z[used], y[used], skew and used.sum() >= CUBIC_RUNS[d])
        if found is None and rank == 0:
            return None
        if found is None:
            rank = 0
            continue
        off = found.residuals - np.median(found.residuals)
        share = np.abs(off) / (1.4826 * np.median(np.abs(off)) + 1e-9)
        worst = int(np.argmax(share))
        if share[worst] > OUTLIER and used.sum() > LEAST_RUNS[d]:
            kept[np.flatnonzero(used)[worst]] = False
            outliers += 1
        elif rank:
            rank = 0
        else:
            return replace(found, used=used, outliers=outliers)


def monomials(d: int, degree: int) -> np.ndarray:
    """Powers of each logarithm, (terms, d), the lower degrees first: 1, u, v, u^2, u v, v^2, ..."""
    powers = [each for each in product(range(degree + 1), repeat=d) if sum(each) <= degree]
    return np.array(sorted(powers, key=lambda each: (sum(each), [-power for power in each])))


def terms(u: np.ndarray, powers: np.ndarray, by: tuple[int, ...] = ()) -> np.ndarray:
    """Monomials of u (n, d), or their derivative by the logarithms of these indices, (n, terms)."""
    factor, powers = np.ones(len(powers)), powers.copy()
    for axis in by:
        factor = factor * powers[:, axis]
        powers[:, axis] = np.maximum(powers[:, axis] - 1, 0)
    return factor * np.prod(u[:, None, :] ** powers, axis=2)


def least_squares_bowl(z: np.ndarray, y: np.ndarray, cubic: bool) -> Polynomial | None:
    """The polynomial through these runs; a cubic that has no minimum among them gives way to the quadratic. None where
    the runs do not tell one."""
    centre = z.mean(axis=0)
    u = z - centre
    n, d = u.shape
    powers = monomials(d, 3 if cubic else 2)
    design = terms(u, powers)
    q, r = np.linalg.qr(design)
    freedom, size = n - len(powers), np.abs(np.diag(r))
    if freedom < 1 or size.min() < 1e-9 * size.max():
        return least_squares_bowl(z, y, False) if cubic else None
    inverse = np.linalg.inv(r)
    coefficients = inverse @ (q.T @ y)
    found = _stationary(coefficients, powers, u)
    if found is None:
        return least_squares_bowl(z, y, False) if cubic else None
    vertex, h = found
    residuals = y - design @ coefficients
    at = vertex[None]
    by = -np.linalg.solve(h, np.concatenate([terms(at, powers, (i,)) for i in range(d)]))  # d vertex / d coefficients
    errors = np.sqrt(residuals @ residuals / freedom * ((by @ inverse) ** 2).sum(axis=1))
    level = float((terms(at, powers) @ coefficients)[0])
    leverage = np.minimum((q**2).sum(axis=1), 1 - 1e-6)
    return Polynomial(
        centre + vertex, errors, h, level, freedom, residuals / (1 - leverage), np.ones(n, dtype=bool), cubic
    )


def _stationary(coefficients: np.ndarray, powers: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Where the polynomial is stationary, and its second derivatives there, by Newton's method from the lowest run.

    Exact after one step for a quadratic. Of a cubic only a minimum within the range of the runs counts.
    """
    slope, bend, twist = _derivatives(coefficients, powers)
    quadratic = powers.sum(axis=1).max() == 2
    at = u[np.argmin(terms(u, powers) @ coefficients)]
    for _ in range(1 if quadratic else NEWTON):
        h = bend + twist @ at
        try:
            step = np.linalg.solve(h, slope + bend @ at + twist @ at @ at / 2)
        except np.linalg.LinAlgError:
            return None
        at = at - step
        if np.abs(step).max() < 1e-10 or not np.isfinite(at).all():
            break
    h = bend + twist @ at
    if quadratic:
        return (at, h) if np.isfinite(at).all() else None
    inside = ((at >= u.min(axis=0)) & (at <= u.max(axis=0))).all()
    return (at, h) if inside and np.abs(step).max() < 1e-6 and (np.linalg.eigvalsh(h) > 0).all() else None


def _derivatives(coefficients: np.ndarray, powers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First, second and third derivatives at the origin, (d,), (d, d) and (d, d, d)."""
    d = powers.shape[1]
    found = [np.zeros((d,) * order) for order in (1, 2, 3)]
    for value, power in zip(coefficients[1:], powers[1:], strict=True):
        axes = [axis for axis in range(d) for _ in range(power[axis])]
        for place in set(permutations(axes)):
            found[len(axes) - 1][place] = value * np.prod([factorial(each) for each in power])
    return found[0], found[1], found[2]
