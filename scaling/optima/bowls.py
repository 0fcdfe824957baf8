"""The bowl of one cell: a convex quadratic of ln loss over ln lr and ln batch, and where it is lowest.

A cell without one is told by its best run: the optimum lies between that run's neighbours on the grid, or beyond the
grid where the best run is at its edge.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.stats import t as student

from scaling.optima.cells import Cell, cells, levels
from scaling.results import Bowl, Estimate
from scaling.table import RunTable

WINDOW = 0.02
CHECK = 0.01
LEAST_RUNS = {2: 8, 1: 4}
"""In the window, for a quadratic of so many settings."""
OUTLIER = 5.0
"""Robust standard deviations beyond which a run is set aside."""
AXES = ("lr", "batch_tokens")
Side = Literal["below", "above"]


@dataclass(frozen=True)
class Quadratic:
    """ln loss = level + (z - vertex)' curvature (z - vertex) / 2 over d logarithms."""

    vertex: np.ndarray
    """(d,)"""
    errors: np.ndarray
    """Standard errors of the vertex, (d,), by the delta method."""
    curvature: np.ndarray
    """(d, d), symmetric."""
    level: float
    freedom: int
    """Runs less coefficients."""
    used: np.ndarray
    """Which runs it went through, (n,) of bool."""
    outliers: int = 0

    @property
    def convex(self) -> bool:
        return bool((np.linalg.eigvalsh(self.curvature) > 0).all())


def find_bowls(table: RunTable, size: str, *, window: float = WINDOW, at_batch: bool = False) -> tuple[Bowl, ...]:
    """The bowl of each cell, the cheapest cell first. `window` is the excess loss (a share) within which runs are used;
    with `at_batch` each batch is a cell of its own, over lr alone. ValueError as of `cells`."""
    return tuple(bowl(cell, window) for cell in cells(table, size, at_batch=at_batch) if len(cell))


def bowl(cell: Cell, window: float = WINDOW, check: float = CHECK) -> Bowl:
    """The optimum of one cell with 95 % intervals; censored where it is at or beyond the edge of the grid."""
    axes = {"lr": cell.lr, "batch_tokens": cell.batch}
    varied = [name for name in AXES if len(set(levels(axes[name]))) > 1 and name not in cell.values]
    best = int(np.argmin(cell.loss))
    told = Bowl(
        cell.values,
        len(cell),
        None,
        None,
        float(cell.loss[best]),
        best={name: float(axes[name][best]) for name in AXES} | {"loss": float(cell.loss[best])},
        window=window,
    )
    if not varied:
        return replace(told, note="neither lr nor batch varies")
    for fitted in (varied, *([[name] for name in varied] if len(varied) == 2 else [])):
        found = _convex(cell, axes, fitted, varied, told, window)
        if found:
            return _checked(found, cell, axes, fitted, window, check)
    estimates, censored = _of_grid(cell, axes, varied)
    return replace(told, **estimates, censored=censored, note="no convex bowl within the window: told by the best run")


def _convex(
    cell: Cell, axes: dict[str, np.ndarray], fitted: list[str], varied: list[str], told: Bowl, window: float
) -> Bowl | None:
    """The bowl by a quadratic over the `fitted` settings, other varied ones at their best run's; None if not convex."""
    others = [name for name in varied if name not in fitted]
    best = int(np.argmin(cell.loss))
    slice_ = np.all([levels(axes[name]) == levels(axes[name])[best] for name in others], axis=0) | np.zeros(
        len(cell), bool
    )
    if others and len(set(levels(axes[others[0]]))) >= 3 and len(fitted) == 1:
        return None  # a plane that has no bowl in it is told by its best run, not by one line of it
    z = np.log(np.column_stack([axes[name] for name in fitted]))[slice_]
    quadratic = quadratic_bowl(z, np.log(cell.loss[slice_]), window)
    if quadratic is None or not quadratic.convex:
        return None
    estimates, censored = _of_grid(cell, axes, others)
    outside = {name: side for i, name in enumerate(fitted) if (side := _outside(z[:, i], quadratic.vertex[i]))}
    if not outside and len(fitted) == 2 and not _in_hull(z, quadratic.vertex):
        return None
    rest = [name for name in fitted if outside and name not in outside]
    of_rest, censored_rest = _of_grid(cell, axes, rest)
    spread = student.ppf(0.975, quadratic.freedom)
    for i, name in enumerate(fitted):
        centre, error = quadratic.vertex[i], quadratic.errors[i]
        if name in outside:
            edge = float(np.exp(z[:, i].min() if outside[name] == "below" else z[:, i].max()))
            estimates[name] = Estimate(edge, 0.0, edge) if outside[name] == "below" else Estimate(edge, edge, np.inf)
        elif not outside:
            low, value, high = np.exp(centre + spread * error * np.array([-1, 0, 1]))
            estimates[name] = Estimate(float(value), float(low), float(high), float(value * error))
    h = quadratic.curvature
    notes = [f"{quadratic.outliers} runs set aside as outliers"] if quadratic.outliers else []
    return replace(
        told,
        **(estimates | of_rest),
        loss=told.loss if outside else float(np.exp(quadratic.level)),
        curvature=() if outside else (h[0, 0], h[0, 1], h[1, 1]) if len(fitted) == 2 else _alone(fitted[0], h[0, 0]),
        censored=censored | censored_rest | outside,
        note="; ".join(notes),
    )


def _alone(name: str, curvature: float) -> tuple[float, float, float]:
    nothing = float("nan")
    return (curvature, nothing, nothing) if name == "lr" else (nothing, nothing, curvature)


def _outside(z: np.ndarray, vertex: float) -> Side | None:
    return "below" if vertex < z.min() else "above" if vertex > z.max() else None


def _in_hull(z: np.ndarray, point: np.ndarray) -> bool:
    """Whether a point of the plane is inside the hull of others: seen from it they leave no half of the plane empty."""
    angles = np.sort(np.arctan2(*(z - point).T))
    gaps = np.diff(angles, append=angles[0] + 2 * np.pi)
    return bool(gaps.max() < np.pi)


def _checked(
    found: Bowl, cell: Cell, axes: dict[str, np.ndarray], fitted: list[str], window: float, check: float
) -> Bowl:
    """With a note if the vertex within the narrower window is another one."""
    if check >= window or not found.curvature or len(fitted) < 2:
        return found
    narrow = quadratic_bowl(np.log(np.column_stack([axes[name] for name in fitted])), np.log(cell.loss), check)
    if narrow is None or not narrow.convex:
        return found
    notes = [found.note] if found.note else []
    for i, name in enumerate(fitted):
        estimate = getattr(found, name)
        apart = narrow.vertex[i] - np.log(estimate.value)
        if abs(apart) > 2 * np.hypot(narrow.errors[i], estimate.error / estimate.value):
            notes.append(f"within {check:.0%} the best {name} is {np.exp(apart):.2f} times that within {window:.0%}")
    return replace(found, note="; ".join(notes))


def _of_grid(cell: Cell, axes: dict[str, np.ndarray], names: list[str]) -> tuple[dict[str, Estimate], dict[str, Side]]:
    """Of each setting the best run's value, between its neighbours on the grid; without a standard error."""
    estimates, censored = {}, {}
    best = int(np.argmin(cell.loss))
    for name in names:
        values, level = axes[name], levels(axes[name])
        lower, upper = values[level == level[best] - 1], values[level == level[best] + 1]
        estimates[name] = Estimate(
            float(values[best]),
            float(lower.max()) if len(lower) else 0.0,
            float(upper.min()) if len(upper) else float("inf"),
        )
        if not len(lower) or not len(upper):
            censored[name] = "above" if len(lower) else "below"
    return estimates, censored


def quadratic_bowl(z: np.ndarray, y: np.ndarray, window: float) -> Quadratic | None:
    """Least squares of ln loss `y` (n,) over logarithms `z` (n, d) on runs within `window` of the lowest.

    Runs that are further than `OUTLIER` robust deviations from the bowl are set aside, one after another, as is a best
    run that no other comes within the window of. None where too few runs or levels are left.
    """
    d = z.shape[1]
    kept, outliers = np.ones(len(y), dtype=bool), 0
    lowest = np.sort(y)[:2]
    if len(y) > LEAST_RUNS[d] and lowest[1] - lowest[0] > np.log1p(window):
        kept[np.argmin(y)], outliers = False, 1
    while True:
        used = kept & (y <= y[kept].min() + np.log1p(window))
        varied = all(len(set(levels(np.exp(column[used])))) >= 3 for column in z.T)
        if used.sum() < LEAST_RUNS[d] or not varied:
            return None
        found, residuals = _least_squares(z[used], y[used])
        if found is None:
            return None
        share = np.abs(residuals) / (1.4826 * np.median(np.abs(residuals - np.median(residuals))) + 1e-9)
        worst = int(np.argmax(share))
        if share[worst] <= OUTLIER or used.sum() <= LEAST_RUNS[d]:
            return replace(found, used=used, outliers=outliers)
        kept[np.flatnonzero(used)[worst]] = False
        outliers += 1


def _least_squares(z: np.ndarray, y: np.ndarray) -> tuple[Quadratic | None, np.ndarray]:
    """The quadratic through these runs, and each one's residual from the quadratic of the others, (n,)."""
    centre = z.mean(axis=0)
    u = z - centre
    n, d = u.shape
    pairs = [(i, j) for i in range(d) for j in range(i, d)]
    columns = [u[:, i] * u[:, j] * (0.5 if i == j else 1.0) for i, j in pairs]
    design = np.column_stack([np.ones(n), u, *columns])
    q, r = np.linalg.qr(design)
    freedom = n - design.shape[1]
    if freedom < 1 or np.abs(np.diag(r)).min() < 1e-9 * np.abs(np.diag(r)).max():
        return None, np.zeros(n)
    inverse = np.linalg.inv(r)
    coefficients = inverse @ (q.T @ y)
    residuals = y - design @ coefficients
    h, gradient = np.zeros((d, d)), coefficients[1 : 1 + d]
    for (i, j), value in zip(pairs, coefficients[1 + d :], strict=True):
        h[i, j] = h[j, i] = value
    if np.linalg.matrix_rank(h) < d:
        return None, np.zeros(n)
    vertex = -np.linalg.solve(h, gradient)
    # d vertex / d coefficients, from h vertex + gradient = 0
    by = np.zeros((d, design.shape[1]))
    by[:, 1 : 1 + d] = np.eye(d)
    for k, (i, j) in enumerate(pairs):
        by[i, 1 + d + k] += vertex[j]
        if i != j:
            by[j, 1 + d + k] += vertex[i]
    by = -np.linalg.solve(h, by)
    variance = residuals @ residuals / freedom
    errors = np.sqrt(variance * ((by @ inverse) ** 2).sum(axis=1))
    level = coefficients[0] + 0.5 * gradient @ vertex
    leverage = np.minimum((q**2).sum(axis=1), 1 - 1e-6)
    return Quadratic(centre + vertex, errors, h, float(level), freedom, np.ones(n, dtype=bool)), residuals / (1 - leverage)
