"""Which rows of a table err together, and the standard error of a mean over such rows."""

from collections.abc import Hashable

import numpy as np
import pandas as pd

from scaling.table import RunTable

KEPT = ("total", "non_embedding", "active", "lr", "batch_tokens", "seed")
"""What is equal along a run."""


def standard_error(values: np.ndarray, clusters: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Of the weighted mean of values (n,) whose clusters, (n,), are independent and not the values in them; of one
    cluster, for which there is none, the mean's size."""
    weights = np.full(len(values), 1.0) if weights is None else weights
    weights = weights / weights.sum()
    mean = float(weights @ values)
    groups, member = np.unique(clusters, return_inverse=True)
    if len(groups) < 2:
        return abs(mean)
    totals = np.bincount(member, weights * (values - mean))
    return float(np.sqrt(len(groups) / (len(groups) - 1) * (totals @ totals)))


def clusters_of(runs: RunTable) -> np.ndarray:
    """A number for each row, equal for checkpoints of one run and for runs that go on from one ancestor, (rows,).

    Rows of one name are one run only if they are equal in what a run keeps: a name may be that of a family of runs.
    """
    if not runs.has("run"):
        return np.arange(len(runs))
    names = runs.frame["run"].astype(object).where(runs.frame["run"].notna(), None).tolist()
    kept = [runs.numbers(name) for name in KEPT if runs.has(name)]
    own = list(zip(names, *(each.tolist() for each in kept), strict=True))
    first = {name: place for place, name in reversed(list(enumerate(names)))}
    parents = runs.frame["parent"].tolist() if runs.has("parent") else [None] * len(runs)

    def root(place: int) -> Hashable:
        seen = {place}
        while not pd.isna(parents[place]):
            above = first.get(parents[place])
            if above is None or above in seen:
                return ("parent", parents[place])
            place = above
            seen.add(place)
        return place if names[place] is None else tuple(str(each) for each in own[place])

    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(root(place), len(number)) for place in range(len(runs))])
