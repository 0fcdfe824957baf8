"""From runs to a belief about their optima.

Every measured cell has a bowl (`scaling.design.bowl`) of its own level; its optimum and its curvatures deviate from
shared laws (`scaling.design.prior`). The posterior is the Laplace approximation at the mode, found by damped
Gauss-Newton steps; noise, spreads of the deviations and weights of outliers are updated between the steps (EM).

A run far up its bowl tells little: the form is only nearly right there. So the standard deviation of a run of excess f
is noise * sqrt(1 + (f / FAR)^2), and no window has to be chosen. Residuals are Student's t, against outliers.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from scaling.design.bowl import LOCAL, SHARED, Points, evaluate
from scaling.design.posterior import FAR, Belief, columns
from scaling.design.prior import NOISE, PRIOR, SPREADS, correlation, prior_precision
from scaling.design.runs import Runs, cells_of, read
from scaling.table import RunTable

FREEDOM = 5.0
"""Of Student's t."""
STEPS = 60
SETTLED = 0.03
"""A step that moves no parameter by this share of its standard deviation is the last."""


def belief(table: RunTable | pd.DataFrame, size: str) -> Belief:
    """What the finished runs of a table say of ln lr* and ln B* over N (the column `size`) and D.

    ValueError where a needed column is missing or no run has a loss.
    """
    return learn(read(table, size), size)


def learn(runs: Runs, size: str, *, start: Belief | None = None) -> Belief:
    """The posterior after the measured runs; `start` is an earlier belief to begin from, which saves steps only."""
    kept = runs.where(runs.measured)
    if not len(kept):
        raise ValueError("no finished run has a loss")
    N, D, cell = cells_of(kept.N, kept.D)
    order = np.argsort(cell, kind="stable")
    kept, cell = kept.where(order), cell[order]
    data = Data(np.log(kept.loss), cell, np.flatnonzero(np.diff(cell, prepend=-1)))
    before = _beginning(kept, N, D, size, data)
    state = before if start is None else _resumed(before, start)
    points = state.points(kept)
    damping = 1e-3
    for _ in range(STEPS):
        last = state.mean
        state, damping = _step(state, before.mean, points, data, damping)
        if np.all(np.abs(state.mean - last) < SETTLED * np.sqrt(np.diag(state.covariance))):
            break
    return replace(state, runs=runs)


@dataclass(frozen=True)
class Data:
    """Measured runs, sorted by cell."""

    y: np.ndarray
    """ln loss, (n,)."""
    cell: np.ndarray
    starts: np.ndarray
    """The first run of each cell, (m,)."""


def _beginning(runs: Runs, N: np.ndarray, D: np.ndarray, size: str, data: Data) -> Belief:
    """The prior, with levels at the lowest losses."""
    middle = {"c": np.log(runs.lr).mean(), "c_B": np.log(runs.batch_tokens).mean()}
    mean = np.r_[[middle.get(name, PRIOR[name][0]) for name in SHARED], np.zeros(len(LOCAL) * len(N))]
    mean[len(SHARED) :: len(LOCAL)] = np.minimum.reduceat(data.y, data.starts)
    spreads = np.array([SPREADS[name][0] for name in LOCAL])
    centre = (float(np.log(N).mean()), float(np.log(D).mean()))
    covariance = np.linalg.inv(prior_precision(N, D, spreads))
    return Belief(size, centre, N, D, mean, covariance, NOISE[0], spreads, runs)


def _resumed(state: Belief, start: Belief) -> Belief:
    """Shared parameters moved to the new centre, and those of the cells that both know."""
    mean = state.mean.copy()
    n, d = state.centre[0] - start.centre[0], state.centre[1] - start.centre[1]
    mean[: len(SHARED)] = start.shared
    for first in (0, 3):
        mean[first] += n * start.shared[first + 1] + d * start.shared[first + 2]
    cell = start.cell(state.N, state.D)
    local = mean[len(SHARED) :].reshape(-1, len(LOCAL))
    local[cell >= 0] = start.local[cell[cell >= 0]]
    return replace(state, mean=mean, noise=start.noise, spreads=start.spreads)


def _step(state: Belief, prior: np.ndarray, points: Points, data: Data, damping: float) -> tuple[Belief, float]:
    """One damped Gauss-Newton step on the mode, then noise and spreads given it."""
    precision = prior_precision(state.N, state.D, state.spreads)

    def residuals(mean: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of ln loss, (n,), the excess, (n,), and derivatives by the shared and the cell's own parameters, (n, 16)."""
        local = mean[len(SHARED) :].reshape(-1, len(LOCAL))[data.cell]
        excess, by_shared, by_local = evaluate(mean[: len(SHARED)], local, points)
        return data.y - local[:, 0] - excess, excess, np.concatenate([by_shared, by_local], axis=1)

    residual, excess, by = residuals(state.mean)
    widening = 1 + (excess / FAR) ** 2
    trust = (FREEDOM + 1) / (FREEDOM + residual**2 / (state.noise**2 * widening))
    weight = trust / (state.noise**2 * widening)
    at = columns(np.arange(len(state.N)))
    hessian, pull = precision.copy(), -precision @ (state.mean - prior)
    np.add.at(
        hessian, (at[:, :, None], at[:, None, :]), _by_cell(by[:, :, None] * (weight[:, None] * by)[:, None], data)
    )
    np.add.at(pull, at, _by_cell((weight * residual)[:, None] * by, data))

    def cost(mean: np.ndarray, residual: np.ndarray) -> float:
        return float(weight @ residual**2 + (mean - prior) @ precision @ (mean - prior))

    now = cost(state.mean, residual)
    mean = state.mean
    while damping < 1e6:
        tried = state.mean + np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), pull)
        after = residuals(tried)[0]
        if cost(tried, after) <= now * (1 + 1e-9):
            mean, residual = tried, after
            break
        damping *= 10
    covariance = np.linalg.inv(hessian)
    covariance = (covariance + covariance.T) / 2
    own = covariance[at[:, :, None], at[:, None, :]][data.cell]
    leverage = np.einsum("ni,nij,nj->n", by, own, by)
    expected, counts = NOISE
    squares = float(trust / widening @ (residual**2 + leverage)) + counts * expected**2
    noise = float(np.sqrt(squares / (len(data.y) + counts)))
    spreads = _spreads(mean, covariance, correlation(state.N, state.D))
    return replace(state, mean=mean, covariance=covariance, noise=noise, spreads=spreads), max(damping / 10, 1e-9)


def _by_cell(rows: np.ndarray, data: Data) -> np.ndarray:
    """Sums over the runs of each cell, (m, ...)."""
    return np.add.reduceat(rows, data.starts, axis=0)


def _spreads(mean: np.ndarray, covariance: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    """Of the cells' deviations: what is expected of them, with the expectation beforehand counted in."""
    inverse = np.linalg.inv(correlation)
    result = []
    for index, name in enumerate(LOCAL):
        expected, counts = SPREADS[name]
        at = slice(len(SHARED) + index, None, len(LOCAL))
        total = mean[at] @ inverse @ mean[at] + np.sum(inverse * covariance[at, at])
        result.append(expected if counts is None else np.sqrt((total + counts * expected**2) / (len(inverse) + counts)))
    return np.array(result)
