"""The next K runs: what is believed, what could be run, and the choice of most reduction of regret for a budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scaling.design.belief import learn
from scaling.design.candidates import lattice, repeats
from scaling.design.choice import choose, design
from scaling.design.posterior import Belief
from scaling.design.runs import Runs, cells_of, read
from scaling.table import RunTable

LEAST_GAIN = 0.01
"""Of the expected regret: runs that lower it by less, all that would follow together, are not worth their cost."""


@dataclass(frozen=True)
class Proposal:
    """A run to be made, in the order of choice."""

    N: float
    D: float
    lr: float
    batch_tokens: float
    flops: float
    regret_before: float
    """Expected excess of the loss at the targets as a share under the belief, mean over them, before this run and after
    those above."""
    regret_after: float


def next_runs(
    table: RunTable | pd.DataFrame,
    size: str,
    targets: Sequence[tuple[float, float]],
    *,
    count: int,
    budget_flops: float,
    candidates: RunTable | pd.DataFrame | None = None,
) -> list[Proposal]:
    """Up to `count` runs of at most `budget_flops` together that lower the expected regret at targets (N, D) most.

    N means the column `size`. Runs of equal N and D are taken to be trained alike, as those of `of_one_training` are.
    Candidates are a table with that column, tokens, lr and batch_tokens (and flops), or else
    the lattice of `scaling.design.candidates`. Runs of the table that are still running count as made. Nothing is
    drawn: the same table gives the same runs. It ends before runs that would lower the regret by less than `LEAST_GAIN`
    of it together; an empty list where that is all of them, or nothing is affordable. ValueError for bad targets, count
    or budget, and as `belief`.
    """
    where = _checked(targets, count, budget_flops)
    runs = read(table, size)
    belief = learn(runs, size)
    if candidates is None:
        choices = lattice(belief, targets, budget_flops)
    else:
        choices = read(candidates, size)
        choices = choices.where(~repeats(choices, runs))
    choices = choices.where(choices.flops <= budget_flops)
    if not len(choices):
        return []
    return _chosen(belief, runs.where(runs.pending), choices, where, count, budget_flops)


def _chosen(
    belief: Belief, pending: Runs, choices: Runs, where: tuple[np.ndarray, np.ndarray], count: int, budget_flops: float
) -> list[Proposal]:
    every = choices.joined(pending)
    state = design(belief, every, *where)
    for run in range(len(choices), len(every)):
        state.condition(run)
    _, _, cell = cells_of(choices.N, choices.D)
    picked = choose(state, choices, cell, count=count, budget_flops=budget_flops)
    return [
        Proposal(
            *(float(each[run]) for each in (choices.N, choices.D, choices.lr, choices.batch_tokens, choices.flops)),
            before,
            after,
        )
        for run, before, after in worthwhile(picked)
    ]


def worthwhile(picked: Sequence[tuple[int, float, float]]) -> Sequence[tuple[int, float, float]]:
    """The first of these runs, (index, regret before, regret after) each, without those at the end that together gain
    less than `LEAST_GAIN`. A run that gains nothing may prepare the one after it, so none is judged alone."""
    last = picked[-1][2] if picked else 0.0
    gaining = (before - last >= LEAST_GAIN * before for _, before, _ in picked)
    return picked[: sum(gaining)]


def _checked(targets: Sequence[tuple[float, float]], count: int, budget_flops: float) -> tuple[np.ndarray, np.ndarray]:
    """N and D of the targets, (T,) each."""
    pairs = np.array(targets, dtype=float)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not (np.isfinite(pairs).all() and (pairs > 0).all()):
        raise ValueError(f"targets {targets!r}: at least one pair (N, D) of positive numbers is needed")
    if count < 1:
        raise ValueError(f"count {count}: at least 1 is needed")
    if not (np.isfinite(budget_flops) and budget_flops > 0):
        raise ValueError(f"budget_flops {budget_flops}: a positive number is needed")
    return pairs[:, 0], pairs[:, 1]
