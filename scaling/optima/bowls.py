"""The bowl of one cell: a convex polynomial of ln loss over ln lr and ln batch, and where it is lowest.

A quadratic, with cubic terms where there are runs enough: bowls are steeper towards high rates, so that a quadratic
alone puts the best rate too low, and the lower the wider the window.
A cell without one is told by its best run: the optimum lies between that run's neighbours on the grid, or beyond the
grid where the best run is at its edge.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
from scipy.stats import t as student

from scaling.cells import AXES, levels
from scaling.optima.cells import Cell, cells
from scaling.optima.polynomial import fitted_bowl
from scaling.results import Bowl, Estimate
from scaling.table import RunTable

WINDOW = 0.02
CHECK = 0.01
Side = Literal["below", "above"]


def find_bowls(
    table: RunTable, size: str, *, window: float = WINDOW, skew: bool = True, at_batch: bool = False
) -> tuple[Bowl, ...]:
    """The bowl of each cell, the cheapest cell first. `window` is the excess loss (a share) within which runs are used;
    without `skew` there are no cubic terms; with `at_batch` each batch is a cell of its own, over lr alone. ValueError
    as of `cells`."""
    return tuple(bowl(cell, window, skew) for cell in cells(table, size, at_batch=at_batch) if len(cell))


def bowl(cell: Cell, window: float = WINDOW, skew: bool = True) -> Bowl:
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
        found = _convex(cell, axes, fitted, varied, told, window, skew)
        if found:
            return _checked(found, cell, axes, fitted, window, skew)
    estimates, censored = _of_grid(cell, axes, varied)
    return replace(told, **estimates, censored=censored, note="no convex bowl within the window: told by the best run")


def _convex(
    cell: Cell, axes: dict[str, np.ndarray], fitted: list[str], varied: list[str], told: Bowl, window: float, skew: bool
) -> Bowl | None:
    """The bowl over the `fitted` settings, with other varied ones at their best run's; None if not convex."""
    others = [name for name in varied if name not in fitted]
    best = int(np.argmin(cell.loss))
    line = np.ones(len(cell), dtype=bool)
    for name in others:
        level = levels(axes[name])
        line &= level == level[best]
        if level.max() >= 2:
            return None  # a plane that has no bowl in it is told by its best run, not by one line of it
    z = np.log(np.column_stack([axes[name] for name in fitted]))[line]
    polynomial = fitted_bowl(z, np.log(cell.loss[line]), window, skew)
    if polynomial is None or not polynomial.convex:
        return None
    estimates, censored = _of_grid(cell, axes, others)
    outside = {name: side for i, name in enumerate(fitted) if (side := _outside(z[:, i], polynomial.vertex[i]))}
    if not outside and len(fitted) == 2 and not _in_hull(z, polynomial.vertex):
        return None
    rest = [name for name in fitted if outside and name not in outside]
    of_rest, censored_rest = _of_grid(cell, axes, rest)
    spread = student.ppf(0.975, polynomial.freedom)
    for i, name in enumerate(fitted):
        centre, error = polynomial.vertex[i], polynomial.errors[i]
        if name in outside:
            edge = float(np.exp(z[:, i].min() if outside[name] == "below" else z[:, i].max()))
            estimates[name] = Estimate(edge, 0.0, edge) if outside[name] == "below" else Estimate(edge, edge, np.inf)
        elif not outside:
            low, value, high = np.exp(centre + spread * error * np.array([-1, 0, 1]))
            estimates[name] = Estimate(float(value), float(low), float(high), float(value * error))
    h = polynomial.curvature
    notes = [f"{polynomial.outliers} runs set aside as outliers"] if polynomial.outliers else []
    return replace(
        told,
        **(estimates | of_rest),
        loss=told.loss if outside else float(np.exp(polynomial.level)),
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
    found: Bowl, cell: Cell, axes: dict[str, np.ndarray], fitted: list[str], window: float, skew: bool
) -> Bowl:
    """With a note if the vertex within the narrower window is another one."""
    if window <= CHECK or not found.curvature or len(fitted) < 2:
        return found
    z = np.log(np.column_stack([axes[name] for name in fitted]))
    narrow = fitted_bowl(z, np.log(cell.loss), CHECK, skew)
    if narrow is None or not narrow.convex:
        return found
    notes = [found.note] if found.note else []
    for i, name in enumerate(fitted):
        estimate = getattr(found, name)
        apart = narrow.vertex[i] - np.log(estimate.value)
        if abs(apart) > 2 * np.hypot(narrow.errors[i], estimate.error / estimate.value):
            notes.append(f"within {CHECK:.0%} the best {name} is {np.exp(apart):.2f} times that within {window:.0%}")
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
