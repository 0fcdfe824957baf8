"""Greedy choice of a batch of runs: the most reduction of expected regret, or of uncertainty, for what it costs.

With Sigma the covariance of the belief, the expected regret of deciding at targets is a trace, mean over targets of
h_p Var(p*) / 2 + h_q Var(q*) / 2 = trace(F Sigma F'), exact under the bowls of `scaling.design.bowl`. A run of
sensitivity j and noise s lowers it by |F Sigma j|^2 / (s^2 + j' Sigma j), its value under V-optimality (Cohn et al.
1996, JAIR 4); D-optimality takes ln(1 + j' Sigma j / s^2) instead. Neither needs the loss of the run, so that a batch
is chosen before any of it ends.

The first run of a new cell only tells its level, and nothing for itself. So whole packets are compared: in each cell
the best run, the best after it, and so on, up to DEPTH, of which the prefix of most value for its cost is taken.
"""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from scaling.design.posterior import Belief
from scaling.design.runs import Runs

DEPTH = 4
Value = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(T, n) covariances of the targets with runs, (n,) variances of these, (n,) of their noise; to (n,) values."""


def regret_value(targets: np.ndarray, variance: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """By how much a run lowers the expected regret (V-optimality), (n,)."""
    return np.sum(targets**2, axis=0) / (noise + variance)


def entropy_value(targets: np.ndarray, variance: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """By how much it lowers the entropy of all parameters, twice in nats (D-optimality), (n,)."""
    return np.log1p(variance / noise)


def target_factor(belief: Belief, N: np.ndarray, D: np.ndarray) -> np.ndarray:
    """F of the regret at target cells, (2 T, P), of a belief that includes them."""
    _, by, curvature = belief.optimum(N, D)
    across = by[:, 0] - belief.shared[8] * by[:, 1]
    scale = np.sqrt(curvature / (2 * len(N)))
    return np.concatenate([scale[:, :1] * across, scale[:, 1:] * by[:, 1]])


@dataclass
class Design:
    """Covariances of candidate runs with parameters and targets, as chosen runs are conditioned on."""

    sensitivity: np.ndarray
    """Of each candidate to the parameters that it depends on, (n, 16)."""
    columns: np.ndarray
    """Which these are, (n, 16)."""
    projected: np.ndarray
    """Covariances with all parameters, (n, P)."""
    targets: np.ndarray
    """Covariances with the scaled targets, (T, n)."""
    variance: np.ndarray
    noise: np.ndarray
    """Variance of a measurement, (n,)."""
    regret: float

    def condition(self, run: int) -> None:
        """On the measurement of a candidate, whatever it will be."""
        total = self.noise[run] + self.variance[run]
        covariance = self.projected[:, self.columns[run]] @ self.sensitivity[run]
        toward = self.targets[:, run].copy()
        self.regret -= float(toward @ toward / total)
        self.targets -= np.outer(toward, covariance / total)
        self.variance -= covariance**2 / total
        self.projected -= np.outer(covariance / total, self.projected[run])

    def block(self, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of these candidates of one cell: their covariance (m, m), with the targets (T, m), and noise (m,)."""
        covariance = self.projected[np.ix_(runs, self.columns[runs[0]])] @ self.sensitivity[runs].T
        return covariance, self.targets[:, runs], self.noise[runs]


def design(belief: Belief, candidates: Runs, N: np.ndarray, D: np.ndarray) -> Design:
    """Of candidates for a decision at target cells N, D, (T,) each."""
    belief = belief.including(np.r_[N, candidates.N], np.r_[D, candidates.D])
    sensitivity, at, noise = belief.sensitivities(candidates)
    factor = target_factor(belief, N, D)
    projected = np.einsum("ni,nip->np", sensitivity, belief.covariance[at])
    variance = np.einsum("ni,ni->n", sensitivity, np.take_along_axis(projected, at, axis=1))
    regret = float(np.sum(factor @ belief.covariance * factor))
    return Design(sensitivity, at, projected, factor @ projected.T, variance, noise**2, regret)


def choose(
    state: Design,
    candidates: Runs,
    cell: np.ndarray,
    *,
    count: int,
    budget_flops: float,
    value: Value = regret_value,
) -> list[tuple[int, float, float]]:
    """Up to `count` candidates that cost at most `budget_flops` together: (index, regret before, regret after) each.

    `cell` (n,) is that of each candidate. A packet costs the sum of the shares of the budget and of the count that it
    takes, so that neither is left over while the other runs out. `state` is conditioned on what is chosen. Cells wait
    in a queue by their last rate, which seldom rises as other cells are measured, so that only the first few are
    compared anew (lazy greedy, Minoux 1978).
    """
    chosen: list[tuple[int, float, float]] = []
    free = np.ones(len(candidates), dtype=bool)
    left = float(budget_flops)

    def packet(group: np.ndarray) -> tuple[float, np.ndarray]:
        open_ = group[free[group] & (candidates.flops[group] <= left)]
        if not len(open_):
            return 0.0, open_
        flops = candidates.flops[open_]
        depth = min(DEPTH, count - len(chosen))
        rate, picks = _packet(*state.block(open_), flops / budget_flops + 1 / count, flops, left, depth, value)
        return rate, open_[picks]

    queue = [(-np.inf, index, np.flatnonzero(cell == each)) for index, each in enumerate(np.unique(cell))]
    while queue and len(chosen) < count:
        _, index, group = heappop(queue)
        rate, runs = packet(group)
        if not rate > 0:
            continue
        heappush(queue, (-rate, index, group))
        if queue[0][1] != index:
            continue
        for run in runs:
            before = state.regret
            state.condition(run)
            chosen.append((int(run), before, state.regret))
            free[run] = False
            left -= float(candidates.flops[run])
    return chosen


def _packet(
    covariance: np.ndarray,
    targets: np.ndarray,
    noise: np.ndarray,
    price: np.ndarray,
    flops: np.ndarray,
    left: float,
    depth: int,
    value: Value,
) -> tuple[float, list[int]]:
    """The greedy packet of one cell whose value for its price is highest: this rate, and the indices in order."""
    covariance, targets = covariance.copy(), targets.copy()
    picks: list[int] = []
    best: tuple[float, list[int]] = (0.0, [])
    worth = paid = 0.0
    free = np.ones(len(noise), dtype=bool)
    for _ in range(depth):
        values = np.where(free & (flops <= left), value(targets, np.diag(covariance), noise), -np.inf)
        run = int(values.argmax())
        if not values[run] > 0:
            break
        picks.append(run)
        free[run] = False
        left -= flops[run]
        worth, paid = worth + values[run], paid + price[run]
        if worth / paid > best[0]:
            best = worth / paid, picks.copy()
        total = noise[run] + covariance[run, run]
        row = covariance[run].copy()
        targets -= np.outer(targets[:, run].copy(), row) / total
        covariance -= np.outer(row, row) / total
    return best
