"""Runs that could be next: a lattice around the believed optima, as far beyond what was tried as is safe.

In a cell lr goes in steps of sqrt(2) and the batch in steps of 2, at round powers of two, wherever the belief places
the optimum: so a grid whose optimum lies at its edge grows on that side.
"""

from collections.abc import Sequence

import numpy as np

from scaling.design.posterior import Belief
from scaling.design.runs import FLOPS, NEAR, Runs

RATE_STEP, BATCH_STEP = np.log(2) / 2, np.log(2)
RATE_WIDTH, BATCH_WIDTH = np.log(4), np.log(8)
"""On each side of the optimum, at least: a bowl's flanks tell where it is lowest. At most two standard deviations."""
BEYOND = np.log(4)
"""How far past all that was tried, across and along the valley, a run may go: a prediction there is a guess."""
FEWEST_STEPS = 100
"""Optimizer steps of a run; with fewer, schedules and averages mean little."""
REPEAT = 0.1
"""Of ln lr and ln B: a run this near to one of its cell is that run again."""


def lattice(belief: Belief, targets: Sequence[tuple[float, float]], budget_flops: float) -> Runs:
    """Candidates in every cell of the sizes and tokens that were run or are asked for, and that the budget affords.

    Tokens go on from the most that were run by doubling, up to the most asked for. Runs of the table are left out.
    """
    ran, asked = belief.runs, np.array(targets, dtype=float).reshape(-1, 2)
    sizes = _apart(np.r_[ran.N, asked[:, 0]])
    most = ran.D.max()
    doubled = most * 2.0 ** np.arange(1, 1 + max(0, int(np.log2(max(asked[:, 1].max() / most, 1.0)))))
    tokens = _apart(np.r_[belief.D, doubled, asked[:, 1]])
    N, D = (each.ravel() for each in np.meshgrid(sizes, tokens, indexing="ij"))
    flops = FLOPS * N * D * _cost_ratio(ran, N)
    within = flops <= budget_flops
    N, D, flops = N[within], D[within], flops[within]
    if not len(N):
        return ran.where(np.zeros(len(ran), dtype=bool))
    known = belief.including(N, D)
    vertex, by, _ = known.optimum(N, D)
    sd = np.sqrt(np.einsum("nip,pq,niq->ni", by, known.covariance, by))
    around = [_around(*each) for each in zip(vertex, sd, strict=True)]
    cell = np.repeat(np.arange(len(N)), [len(lr) for lr, _ in around])
    lr, batch = (np.concatenate(each) for each in zip(*around, strict=True))
    no, unknown = np.zeros(len(cell), dtype=bool), np.full(len(cell), np.nan)
    return admissible(known, Runs(N[cell], D[cell], lr, batch, unknown, no, no, flops[cell]))


def admissible(belief: Belief, candidates: Runs) -> Runs:
    """Those that are new, long enough, below the stability frontier and not far beyond all that was tried."""
    tried = belief.runs.where(belief.runs.measured)
    reached = belief.place(tried)
    place = belief.place(candidates)
    kept = np.all((place >= reached.min(axis=0) - BEYOND) & (place <= reached.max(axis=0) + BEYOND), axis=1)
    kept &= place[:, 0] <= belief.stable()
    kept &= candidates.batch_tokens * FEWEST_STEPS <= candidates.D
    return candidates.where(kept & ~repeats(candidates, belief.runs))


def repeats(candidates: Runs, ran: Runs) -> np.ndarray:
    """(n,) of bool: candidates that were run, whatever came of it."""
    result = np.zeros(len(candidates), dtype=bool)
    for N, D, lr, batch in zip(ran.N, ran.D, ran.lr, ran.batch_tokens, strict=True):
        same = np.maximum(np.abs(np.log(candidates.N / N)), np.abs(np.log(candidates.D / D))) <= NEAR
        near = np.maximum(np.abs(np.log(candidates.lr / lr)), np.abs(np.log(candidates.batch_tokens / batch))) < REPEAT
        result |= same & near
    return result


def _around(vertex: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """lr and batch of the lattice about an optimum in ln lr, ln B."""
    axes = []
    for at, spread, step, width in zip(vertex, sd, (RATE_STEP, BATCH_STEP), (RATE_WIDTH, BATCH_WIDTH), strict=True):
        half = max(width, 2 * min(spread, width))
        axes.append(np.exp(step * np.arange(np.ceil((at - half) / step), np.floor((at + half) / step) + 1)))
    lr, batch = np.meshgrid(*axes, indexing="ij")
    return lr.ravel(), np.round(batch.ravel())


def _apart(values: np.ndarray) -> np.ndarray:
    """The different ones, in order."""
    values = np.sort(values)
    return values[np.r_[True, np.diff(np.log(values)) > NEAR]]


def _cost_ratio(ran: Runs, N: np.ndarray) -> np.ndarray:
    """FLOPs over 6 N D: the median of the runs of the nearest size, (n,)."""
    sizes = np.unique(ran.N)
    ratios = np.array([np.median((ran.flops / (FLOPS * ran.N * ran.D))[size == ran.N]) for size in sizes])
    return ratios[np.abs(np.log(N[:, None] / sizes)).argmin(axis=1)]
