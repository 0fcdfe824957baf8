"""How well laws, and naive baselines, predict runs that they were not fitted to."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from scaling.candidates import Candidate
from scaling.cells import levels
from scaling.clusters import standard_error
from scaling.fitting.levenberg import Solutions, minimise
from scaling.fitting.objective import Huber, Objective, spread
from scaling.fitting.starts import draw
from scaling.laws import find
from scaling.results import HeldOut

LARGEST_COMPUTE = "largest compute"
SHARE = 0.15
"""Of the rows that are held out at the end of compute, at least."""
TESTED = 3
"""Rows that are held out at the largest N, at least."""
FOLDS = 6
"""Sizes are held out one by one up to so many, and in so many groups of neighbours beyond."""
MANY = 200
"""Rows, beyond which sizes amid others are no longer held out: it takes long and tells little of extrapolation."""
BEST = 3
"""Solutions that a fit returns: different starts may lead to different valleys."""
RACE, GO_ON = 15, 4
"""Steps that all starts take, and how many different ones of the best go on from there: most starts are hopeless, and
crawl longest."""
DIFFERENT = 1e-4
"""Of ln of the loss: solutions whose predictions differ by less, root mean square, are one."""
NEAR = 0.25
"""Median error at the trained runs, within which the published law's loss counts as in the same units."""
PUBLISHED_LAW = "published chinchilla"
PUBLISHED = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
"""Chinchilla, in nats for each token of its own data (Besiroglu et al. 2024, arXiv 2404.10102)."""


@dataclass(frozen=True)
class Split:
    name: str
    train: np.ndarray
    """(n,) of bool."""
    test: np.ndarray
    extrapolates: bool = True
    """The tested runs lie beyond the trained ones, as the runs do that a law is asked for."""


def make_splits(compute: np.ndarray, size: np.ndarray, symbol: str = "N") -> tuple[Split, ...]:
    """Hold-outs of rows, (n,) each: the largest compute, the largest N, from smaller to the next larger N, and each N.

    `size` is what `symbol` says: tokens, where N is one. Where C is not known, (n,) of NaN, that one is left out. A
    split needs half of the rows, and three sizes, to train on; of two with the same rows the first is kept.
    """
    level = levels(size)
    fold = level if level.max() < FOLDS else np.unique(_folds(level), return_inverse=True)[1]
    splits = []
    if np.isfinite(compute).all():
        test = _last(levels(compute), int(SHARE * len(size)))
        splits.append(Split(LARGEST_COMPUTE, ~test, test))
    test = _last(level, TESTED)
    splits.append(Split(f"largest {symbol}", ~test, test))
    for number in range(1, fold.max() + 1):
        before, rows = fold < number, fold == number
        splits.append(Split(f"up to {symbol} = {size[before].max():.3g}", before, rows))
    for number in range(fold.max() + 1 if len(size) <= MANY else 0):
        rows = fold == number
        splits.append(Split(f"without {symbol} = {_range(size[rows])}", ~rows, rows, extrapolates=False))
    possible: list[Split] = []
    for split in splits:
        enough = split.train.sum() >= max(6, len(size) / 2) and len(set(level[split.train])) >= 3
        if enough and not any(_same(split, other) for other in possible):
            possible.append(split)
    return tuple(possible)


def solve(
    candidate: Candidate, y: np.ndarray, *, objective: Objective | None = None, starts: int = 48, seed: int = 0
) -> np.ndarray:
    """Best parameter vectors of a fit to all rows (at most `BEST`, K), the best first. y (n,) is the loss."""
    begin = draw(candidate.law, candidate.x, np.log(y), starts, seed)
    return _descend(candidate, candidate.x, np.log(y), begin, objective)


def held_out(
    candidate: Candidate,
    y: np.ndarray,
    splits: tuple[Split, ...],
    *,
    objective: Objective | None = None,
    starts: int = 16,
    seed: int = 0,
    clusters: np.ndarray | None = None,
) -> dict[str, tuple[HeldOut, np.ndarray]]:
    """Each split's measures, and the tested rows' predicted / measured - 1. y (n,) is the loss, `clusters` (n,) labels
    rows that err together.

    A split is fitted to its own training rows alone, and nothing that it starts from has seen others: it begins from
    `starts` drawn for these rows, and from the solutions of splits that train on some of the same rows and no others;
    where there are such, half as many are drawn.
    The intervals for the coverage are of the residuals' spread and of the parameters' covariance by the Jacobian.
    """
    law, target, free = candidate.law, np.log(y), np.isnan(_fixed(candidate))
    solved: list[tuple[Split, np.ndarray]] = []
    for split in sorted(splits, key=lambda each: int(each.train.sum())):
        own = {symbol: values[split.train] for symbol, values in candidate.x.items()}
        within = [best for other, best in solved if not (other.train & ~split.train).any()]
        drawn = draw(law, own, target[split.train], starts // 2 if within else starts, seed)
        begin = np.vstack([drawn, *within])
        solved.append((split, _descend(candidate, own, target[split.train], begin, objective)))
    best = {split.name: solutions[:1] for split, solutions in solved}
    results = {}
    for split in splits:
        log, jacobian = law.evaluate(best[split.name], candidate.x)
        half_width = _half_width(jacobian[0][:, free], target - log[0], split)
        errors = np.exp(log[0] - target)[split.test] - 1
        inside = np.abs(log[0] - target)[split.test] <= half_width
        results[split.name] = (
            measures(law.name, candidate.size, split, errors, float(inside.mean()), y, clusters),
            errors,
        )
    return results


def baselines(
    y: np.ndarray,
    compute: np.ndarray,
    x: Mapping[str, np.ndarray],
    splits: tuple[Split, ...],
    *,
    published: bool,
    clusters: np.ndarray | None = None,
) -> dict[str, dict[str, tuple[HeldOut, np.ndarray]]]:
    """The same, by name of the baseline, of what no fit is needed for: the loss of the trained run of most compute, a
    power of C alone, and, where the loss is in its units, the published Chinchilla law."""
    predicted: dict[str, dict[str, np.ndarray]] = {}
    for split in splits:
        if np.isfinite(compute).all():
            train, ln_c = np.flatnonzero(split.train), np.log(compute)
            largest = train[ln_c[train] > ln_c[train].max() - 1e-6]
            predicted.setdefault("last scale", {})[split.name] = np.full(len(y), y[largest].min())
            if np.ptp(ln_c[train]) > 0:
                line = np.polynomial.Polynomial.fit(ln_c[train], np.log(y[train]), 1)
                predicted.setdefault("power of C", {})[split.name] = np.exp(line(ln_c))
        if published and np.isfinite(x["D"]).all():
            law = find("chinchilla")
            values = law.log_value(law.coordinates(PUBLISHED)[None], {"N": x["N"], "D": x["D"]})[0]
            if np.median(np.abs(np.exp(values) / y - 1)) < NEAR:
                predicted.setdefault(PUBLISHED_LAW, {})[split.name] = np.exp(values)
    results: dict[str, dict[str, tuple[HeldOut, np.ndarray]]] = {}
    for name, by_split in predicted.items():
        for split in splits:
            if split.name in by_split:
                errors = (by_split[split.name] / y)[split.test] - 1
                measured = measures(name, "", split, errors, float("nan"), y, clusters)
                results.setdefault(name, {})[split.name] = measured, errors
    return results


def measures(
    law: str,
    size: str,
    split: Split,
    errors: np.ndarray,
    coverage: float,
    y: np.ndarray,
    clusters: np.ndarray | None,
) -> HeldOut:
    """Of predicted / measured - 1 of the tested rows, and the loss y of all rows, whose clusters err together."""
    measured = y[split.test]
    absolute = np.abs(errors)
    se = standard_error(absolute, (np.arange(len(y)) if clusters is None else clusters)[split.test])
    return HeldOut(
        law, size, split.name, int(split.train.sum()), len(errors), float(absolute.mean()), float(se),
        float(errors.mean()), coverage, tuple(measured.tolist()), tuple((measured * (1 + errors)).tolist()),
    )  # fmt: skip


def _descend(
    candidate: Candidate,
    x: Mapping[str, np.ndarray],
    target: np.ndarray,
    begin: np.ndarray,
    objective: Objective | None,
) -> np.ndarray:
    """The best solutions, (at most `BEST`, K), that starts (S, K) lead to on rows with this ln of the loss, (n,)."""
    fixed = _fixed(candidate)
    free = np.isnan(fixed)
    step = partial(minimise, candidate.law, x, target, objective=objective or Huber(), free=free)
    raced = step(starts=np.where(free, begin, fixed), tolerance=1e-3, iterations=RACE)
    found = step(starts=raced.coordinates[_different(raced, GO_ON)], tolerance=1e-7, iterations=150)
    return found.coordinates[_different(found, BEST)]


def _different(found: Solutions, count: int) -> list[int]:
    """At most so many of the solutions, the best first, that predict differently."""
    order = np.argsort(found.objective, kind="stable")
    chosen = [int(order[0])]
    for each in order[1:]:
        apart = found.residuals[chosen] - found.residuals[each]
        if len(chosen) < count and (np.sqrt((apart**2).mean(axis=1)) > DIFFERENT).all():
            chosen.append(int(each))
    return chosen


def _fixed(candidate: Candidate) -> np.ndarray:
    """The coordinates of fixed parameters, and NaN for the free ones, (K,)."""
    given = candidate.fixed
    return np.array(
        [float(p.coordinate(given[p.name])) if p.name in given else np.nan for p in candidate.law.parameters]
    )


def _half_width(jacobian: np.ndarray, residuals: np.ndarray, split: Split) -> np.ndarray:
    """Of the 95 % intervals of the tested rows in ln of the loss."""
    trained, tested = jacobian[split.train], jacobian[split.test]
    noise = spread(residuals[None, split.train], np.ones((1, int(split.train.sum()))))[0]
    noise *= np.sqrt(len(trained) / max(1, len(trained) - jacobian.shape[1]))
    scale = np.sqrt((trained**2).mean(axis=0)) + 1e-300
    covariance = np.linalg.pinv((trained / scale).T @ (trained / scale), rcond=1e-12, hermitian=True)
    of_law = np.einsum("nk,kl,nl->n", tested / scale, covariance, tested / scale)
    return 1.96 * noise * np.sqrt(1 + np.maximum(of_law, 0))


def _same(one: Split, other: Split) -> bool:
    return np.array_equal(one.train, other.train) and np.array_equal(one.test, other.test)


def _last(level: np.ndarray, least: int) -> np.ndarray:
    """The rows of the highest level, and of those below it until there are so many."""
    beyond = np.cumsum(np.bincount(level)[::-1])
    return level > level.max() - 1 - np.searchsorted(beyond, least)


def _folds(level: np.ndarray) -> np.ndarray:
    """Neighbouring levels in groups of about as many rows."""
    counts = np.bincount(level)
    middle = np.cumsum(counts) - counts / 2
    return np.minimum((middle / len(level) * FOLDS).astype(int), FOLDS - 1)[level]


def _range(size: np.ndarray) -> str:
    low, high = f"{size.min():.3g}", f"{size.max():.3g}"
    return low if size.max() < 1.02 * size.min() else f"{low} to {high}"
