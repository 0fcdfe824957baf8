"""From runs to a belief about their optima.

Every measured cell has a bowl (`scaling.design.bowl`) of its own level; its optimum and its curvatures deviate from
shared laws by normal amounts, whose spreads are estimated. The posterior is the Laplace approximation at the mode,
found by Levenberg-Marquardt; noise, spreads and the weights of outliers are updated between its steps (EM).

A run far up its bowl tells little: the form is only nearly right there. So the standard deviation of a run of excess f
is noise * sqrt(1 + (f / FAR)^2), and no window has to be chosen. Residuals are Student's t, against outliers.
"""

from dataclasses import replace

import numpy as np
import pandas as pd

from scaling.design.bowl import LOCAL, SHARED, evaluate
from scaling.design.posterior import FAR, Belief, spread_out
from scaling.design.runs import Runs, cells_of, read
from scaling.table import RunTable

FREEDOM = 5.0
"""Of Student's t."""
PRIOR = {
    "c": (np.nan, np.log(10)),  # around the rates that were tried
    "a": (-0.35, 0.5),  # Porian et al. 2024: lr* ~ N^-.36 on the compute-optimal line; Bjorck et al. 2024: -.23
    "b": (0.0, 0.5),  # Bjorck et al. at fixed B: -.32; DeepSeek LLM: C^-.125; Step Law has +.31
    "c_B": (np.nan, np.log(10)),  # around the batches that were tried
    "a_B": (0.0, 0.3),  # Bergsma et al. 2025 (Power Lines): B* follows D and not N
    "b_B": (
        0.6,
        0.3,
    ),  # the same; DeepSeek LLM: C^.327, so D^.65 on the compute-optimal line; Porian et al.: N^.70 there
    "ln_h_p": (np.log(0.02), np.log(3)),  # a factor of 2 in lr costs half a percent, within a factor of 3
    "ln_h_q": (np.log(0.01), np.log(3)),
    "r": (0.5, 0.5),  # the square-root rule of Adam (Malladi et al. 2022)
    "k_p": (1.0, 0.5),  # noise of the weights costs in proportion to the rate: exp(u)
    "k_q": (0.0, 0.5),
}
"""Mean and standard deviation of the shared parameters, from other grids than those that the tests use."""
SPREADS = {"level": (1.0, None), "lr": (0.1, 4.0), "B": (0.1, 4.0), "ln_h_p": (0.3, 4.0), "ln_h_q": (0.3, 4.0)}
"""Of a cell's deviations: expected standard deviation, and how many cells that expectation counts for (None: fixed)."""
NOISE = (2e-3, 4.0)
"""Of ln loss near the optimum: expected standard deviation, and how many runs that expectation counts for."""


def belief(table: RunTable | pd.DataFrame, size: str) -> Belief:
    """What the finished runs of a table say of ln lr* and ln B* over N (the column `size`) and D.

    ValueError where a needed column is missing or no run has a loss.
    """
    return learn(read(table, size), size)


def learn(runs: Runs, size: str, *, start: Belief | None = None, steps: int = 60, tolerance: float = 1e-4) -> Belief:
    """The posterior after the measured runs; `start` is an earlier belief to begin from, which saves steps only."""
    kept = runs.where(runs.measured)
    if not len(kept):
        raise ValueError("no finished run has a loss")
    N, D, cell = cells_of(kept.N, kept.D)
    y = np.log(kept.loss)
    centre = (float(np.log(N).mean()), float(np.log(D).mean()))
    lowest = np.full(len(N), np.inf)
    np.minimum.at(lowest, cell, y)
    state = _beginning(kept, N, D, centre, lowest, size)
    if start is not None:
        state = _resumed(state, start)
    prior = _beginning(kept, N, D, centre, lowest, size).mean
    prior[len(SHARED) :: len(LOCAL)] = lowest
    damping = 1e-3
    for _ in range(steps):
        before = state.mean
        state, damping = _step(state, prior, y, cell, damping)
        scale = np.sqrt(np.diag(state.covariance))
        if damping < 1e3 and np.abs((state.mean - before) / scale).max() < np.sqrt(tolerance):
            break
    return replace(state, runs=runs)


def _beginning(runs: Runs, N: np.ndarray, D: np.ndarray, centre, lowest: np.ndarray, size: str) -> Belief:
    """The prior, with levels at the lowest losses."""
    middle = {"c": np.log(runs.lr).mean(), "c_B": np.log(runs.batch_tokens).mean()}
    mean = [middle.get(name, PRIOR[name][0]) for name in SHARED]
    mean = np.r_[mean, np.zeros(len(LOCAL) * len(N))]
    mean[len(SHARED) :: len(LOCAL)] = lowest
    spreads = np.array([SPREADS[name][0] for name in LOCAL])
    return Belief(size, centre, N, D, mean, np.diag(_prior_sd(spreads, len(N)) ** 2), NOISE[0], spreads, runs)


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


def _prior_sd(spreads: np.ndarray, cells: int) -> np.ndarray:
    return np.r_[[PRIOR[name][1] for name in SHARED], np.tile(spreads, cells)]


def _step(state: Belief, prior: np.ndarray, y: np.ndarray, cell: np.ndarray, damping: float) -> tuple[Belief, float]:
    """One damped Gauss-Newton step on the mode, then noise and spreads given it."""
    points = state.points(state.runs)
    precision = _prior_sd(state.spreads, len(state.N)) ** -2.0

    def residuals(mean: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        local = mean[len(SHARED) :].reshape(-1, len(LOCAL))
        values = evaluate(mean[: len(SHARED)], local[cell], points)
        return y - local[cell, 0] - values[0], values

    residual, (excess, by_shared, by_local) = residuals(state.mean)
    widening = 1 + (excess / FAR) ** 2
    trust = (FREEDOM + 1) / (FREEDOM + residual**2 / (state.noise**2 * widening))
    weight = trust / (state.noise**2 * widening)
    jacobian = spread_out(by_shared, by_local, cell, len(state.N))
    hessian = jacobian.T @ (weight[:, None] * jacobian) + np.diag(precision)
    pull = jacobian.T @ (weight * residual) - precision * (state.mean - prior)

    def cost(residual: np.ndarray, mean: np.ndarray) -> float:
        return float(weight @ residual**2 + precision @ (mean - prior) ** 2)

    now = cost(residual, state.mean)
    while True:
        mean = state.mean + np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), pull)
        new_residual, _ = residuals(mean)
        if cost(new_residual, mean) <= now + 1e-9 * abs(now):
            damping = max(damping / 10, 1e-9)
            break
        damping *= 10
        if damping > 1e6:
            mean, new_residual = state.mean, residual
            break
    covariance = np.linalg.inv(hessian)
    covariance = (covariance + covariance.T) / 2
    leverage = np.sum(jacobian @ covariance * jacobian, axis=1)
    expected, counts = NOISE
    squares = float(trust / widening @ new_residual**2 + weight @ (leverage * state.noise**2))
    noise = float(np.sqrt((squares + counts * expected**2) / (len(y) + counts)))
    spreads = _spreads(mean, covariance, len(state.N))
    return replace(state, mean=mean, covariance=covariance, noise=noise, spreads=spreads), damping


def _spreads(mean: np.ndarray, covariance: np.ndarray, cells: int) -> np.ndarray:
    """Of the cells' deviations: what is expected of them, with the expectation beforehand counted in."""
    second = (mean**2 + np.diag(covariance))[len(SHARED) :].reshape(cells, len(LOCAL)).sum(axis=0)
    result = []
    for total, name in zip(second, LOCAL, strict=True):
        expected, counts = SPREADS[name]
        result.append(expected if counts is None else np.sqrt((total + counts * expected**2) / (cells + counts)))
    return np.array(result)
