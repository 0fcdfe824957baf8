"""Fits made by hand, whose truth is known."""

import numpy as np

from scaling.laws import find
from scaling.results import Estimate, Fit, Verdict

HOFFMANN = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
STEP_RATE, STEP_BATCH = {"c": 1.79, "a": -0.713, "b": 0.307}, {"c": 0.58, "b": 0.571}


def fit(
    law: str, values: dict[str, float], *, spread: float = 1e-3, largest: float = 1e20, level: str = "ok", **changes
) -> Fit:
    """A fit whose draws lie around the values, each coordinate by `spread`, of rows of up to `largest` FLOPs."""
    known = find(law)
    point = known.coordinates(values)
    draws = point + spread * np.random.default_rng(0).standard_normal((64, len(point)))
    drawn = np.array([list(known.values(each).values()) for each in draws])
    ends = np.quantile(drawn, [0.025, 0.975], axis=0)
    estimates = {
        each.name: Estimate(values[each.name], float(low), float(high), error=float(error))
        for each, low, high, error in zip(known.parameters, *ends, drawn.std(axis=0), strict=True)
    }
    rest = {
        "noise": 2e-3,
        "rows": 40,
        "clusters": 12,
        "spans": {"N": (1e7, 1e9), "D": (1e9, 1e11), "C": (1e17, largest)},
        "verdicts": (Verdict(level, "condition", "made by hand"),),
        "details": {"starts": 7},
    }
    return Fit(law, "non_embedding", point, draws, estimates, **rest | changes)


def loss_fit(**changes) -> Fit:
    return fit("chinchilla", HOFFMANN, **changes)


def rate_fit(**changes) -> Fit:
    return fit("step_law_lr", STEP_RATE, **changes)


def batch_fit(**changes) -> Fit:
    return fit("step_law_batch", STEP_BATCH, **changes)
