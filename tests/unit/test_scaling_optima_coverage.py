"""Intervals of exponents and of decisions hold the truth as often as they say."""

import numpy as np
import pytest

from scaling.optima import decide, find_bowls, fit_optima
from tests.ladders import BATCH, LR, best_batch, best_lr, ladder

TARGET = {"N": 2e9, "D": 1e11}
SCATTER = 0.08


def covered(seed: int) -> dict[str, bool]:
    """Whether each interval of one ladder, with outliers and cells whose optimum is cut off, has the truth."""
    made = ladder(seed, scatter=SCATTER)
    bowls = find_bowls(made.table, "non_embedding")
    assert sum("lr" in bowl.censored for bowl in bowls) >= 1
    fits = [
        fit_optima(bowls, law, size="non_embedding", replicates=300, seed=seed)
        for law in ("step_law_lr", "step_law_batch")
    ]
    found = {}
    for fit, truth, names in zip(fits, (LR, BATCH), ("ab", "b"), strict=True):
        for name in names:
            found[f"{fit.quantity} {name}"] = fit.parameters[name].low <= truth[name] <= fit.parameters[name].high
    decision = decide(TARGET, fits, bowls, seed=seed)
    # The optimum of the target's own cell, which scatters around the law as those of the ladder do.
    off = SCATTER * np.random.default_rng([seed, 1]).standard_normal(2)
    for name, law, away in (("lr", best_lr(**{k.lower(): v for k, v in TARGET.items()}), off[0]),
                            ("batch_tokens", best_batch(TARGET["D"]), off[1])):  # fmt: skip
        truth = law * np.exp(away)
        found[f"decided {name}"] = decision.proposal[name].low <= truth <= decision.proposal[name].high
    return found


def coverage(seeds: range) -> dict[str, float]:
    found = [covered(seed) for seed in seeds]
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def test_intervals_hold_the_truth():
    """A few ladders: the mean over intervals, within what so few can tell."""
    assert np.mean(list(coverage(range(10)).values())) >= 0.86


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_intervals_hold_the_truth_as_often_as_they_say():
    found = coverage(range(1000, 1200))
    assert all(0.90 <= share <= 0.98 for share in found.values()), found
