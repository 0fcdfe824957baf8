"""Which law to use: that of fewest parameters within one standard error of the best prediction of held-out runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

from scaling.candidates import SIZES, Candidate, find_candidates, with_defaults
from scaling.cells import levels
from scaling.clusters import clusters_of, standard_error
from scaling.fitting.levenberg import minimise
from scaling.fitting.objective import Huber, spread
from scaling.holdout import PUBLISHED_LAW, Split, baselines, held_out, make_splits, solve
from scaling.laws.nesting import NESTINGS
from scaling.results import HeldOut, Verdict
from scaling.table import RunTable

OTHER_UNITS = ("bit", "bpc", "bpb", "byte", "character")
"""In a loss kind: it is not in nats for each token."""
SURE = 2.0
"""Standard errors by which a naive baseline has to be better to say that the laws are no good."""
ROWS_FOR_EACH = 2
"""Training rows for each free parameter that each split that counts needs: with fewer a law can bend to the noise of
the rows, and its prediction beyond them is luck."""


@dataclass(frozen=True)
class Score:
    """A law, or a baseline, by its predictions beyond the runs it was fitted to."""

    law: str
    size: str
    """Empty for a baseline."""
    parameters: int
    """Fitted ones."""
    error: float
    """Mean of |predicted / measured - 1| over the splits that count."""
    error_se: float
    fixed: dict[str, float]

    @property
    def is_baseline(self) -> bool:
        return not self.size


@dataclass(frozen=True)
class Choice:
    law: str
    size: str
    fixed: dict[str, float]
    """Parameters to fix in the fit, since the rows do not tell of them."""
    ranked: tuple[Score, ...]
    """Best first, baselines among them."""
    held_out: tuple[HeldOut, ...]
    """Of each law, size and baseline, and each split."""
    rows: np.ndarray
    """(rows of the table,) of bool: those that were compared on."""
    verdicts: tuple[Verdict, ...]


def choose(
    table: RunTable,
    used: np.ndarray,
    *,
    laws: Sequence[str] | None = None,
    sizes: Sequence[str] = SIZES,
    starts: int = 48,
    seed: int = 0,
) -> Choice:
    """The law of loss, and the meaning of N, for these rows, (rows,) of bool.

    Candidates are `laws` (all of loss if not given) with all of `sizes`; what the table cannot tell of is left out,
    with a verdict. The score is the mean error over the hold-outs whose runs lie beyond those that are fitted to; with
    too few runs for that, over each N. A law with too many parameters for the rows that are trained on is left out too.
    ValueError where no law can be fitted, or nothing held out.
    """
    rows, candidates, verdicts = find_candidates(table, used, laws=laws, sizes=sizes)
    kept = table.where(rows)
    y, x = kept.numbers("loss"), with_defaults(kept, candidates[0].size)
    splits = make_splits(x["C"], x["N"]) if np.ptp(levels(x["N"])) else make_splits(x["C"], x["D"], "D")
    if not splits:
        raise ValueError(
            f"{len(y)} runs of {len(set(levels(x['N'])))} sizes are too few to hold any out; at least 4 are needed"
        )
    counted = [each for each in splits if each.extrapolates] or splits
    counting, clusters = [each.name for each in counted], clusters_of(kept)
    candidates, too_few = _with_enough_rows(candidates, counted)
    scores, measured, solutions = [], [], {}
    names = {each.law.name for each in candidates}
    nested = {name for pair in NESTINGS if {pair.smaller, pair.larger} <= names for name in (pair.smaller, pair.larger)}
    for candidate in candidates:
        results = held_out(candidate, y, splits, seed=seed, clusters=clusters)
        if candidate.law.name in nested:
            best = solve(candidate, y, starts=starts, seed=seed)
            solutions[candidate.law.name, candidate.size] = candidate, best
        scores.append(_score(results, counted, clusters, candidate.free, dict(candidate.fixed)))
        measured += [each for each, _ in results.values()]
    for results in baselines(y, x["C"], x, splits, published=_in_nats(kept), clusters=clusters).values():
        scores.append(_score(results, counted, clusters, 0, {}))
        measured += [each for each, _ in results.values()]
    ranked = tuple(sorted(scores, key=lambda score: score.error))
    chosen, reasons = one_standard_error(ranked, counting)
    naive = compare_baselines(chosen, ranked, measured, counted, clusters)
    verdicts = (*reasons, *naive, *compare_sizes(ranked), *compare_nested(solutions, ranked, y), *too_few, *verdicts)
    return Choice(chosen.law, chosen.size, chosen.fixed, ranked, tuple(measured), rows, verdicts)


def _with_enough_rows(
    candidates: Sequence[Candidate], counted: Sequence[Split]
) -> tuple[tuple[Candidate, ...], tuple[Verdict, ...]]:
    """The laws with `ROWS_FOR_EACH` free parameter in each split, and of the others why not. ValueError if none has."""
    least = min(int(split.train.sum()) for split in counted)
    enough = tuple(each for each in candidates if least >= ROWS_FOR_EACH * each.free)
    left_out = {each.law.name: each.free for each in candidates if each not in enough}
    told = [
        f"{name} is not considered: a hold-out trains on {least} rows, and its {free} parameters need "
        f"{ROWS_FOR_EACH * free}"
        for name, free in left_out.items()
    ]
    if not enough:
        raise ValueError("; ".join(told))
    return enough, tuple(Verdict("ok", "no_candidate", each) for each in told)


def one_standard_error(ranked: Sequence[Score], counting: Sequence[str]) -> tuple[Score, tuple[Verdict, ...]]:
    """The law of fewest parameters, and of these of lowest error, within one standard error of the best law."""
    fitted = [each for each in ranked if not each.is_baseline]
    best = fitted[0]
    close = [each for each in fitted if each.error <= best.error + best.error_se]
    chosen = min(close, key=lambda each: (each.parameters, each.error))
    where = " and ".join(counting) if len(counting) <= 2 else f"{len(counting)} hold-outs"
    told = f"{_named(chosen)} errs by {_percent(chosen)} on {where}"
    if chosen is not best:
        told += f", within one standard error of {_named(best)} ({_percent(best)}) with fewer parameters or as many"
    return chosen, (Verdict("ok", "chosen", told),)


def compare_baselines(
    chosen: Score, ranked: Sequence[Score], measured: Sequence[HeldOut], counted: Sequence[Split], clusters: np.ndarray
) -> tuple[Verdict, ...]:
    """What is to be said of baselines that err less than the chosen law on these splits.

    A naive one that does by more than the noise of the difference, row by row, is a warning. A published law is none
    of these: it tells that these runs need no law of their own, unless it was fitted to them and has seen the rows.
    """
    found = {(each.law, each.size, each.split): each for each in measured}

    def errors(score: Score, split: Split) -> np.ndarray:
        each = found[score.law, score.size, split.name]
        return np.abs(np.array(each.predicted) / np.array(each.measured) - 1)

    verdicts = []
    for each in ranked:
        if not each.is_baseline or each.error >= chosen.error:
            continue
        splits = [split for split in counted if (each.law, each.size, split.name) in found]
        gained, noise = _mean([errors(chosen, split) - errors(each, split) for split in splits], splits, clusters)
        if each.law == PUBLISHED_LAW:
            message = f"{each.law} errs by {_percent(each)}: these runs add nothing to it, or it was fitted to them"
            verdicts.append(Verdict("ok", "published", message))
        elif gained > SURE * noise:
            message = (
                f"the baseline {each.law!r} errs by {_percent(each)}, {100 * gained:.2g} +- {100 * noise:.2g} % less "
                f"than {_named(chosen)}: do not rely on these laws"
            )
            verdicts.append(Verdict("warning", "baseline", message))
        else:
            message = f"the baseline {each.law!r} errs by {_percent(each)}, within the noise of {_named(chosen)}"
            verdicts.append(Verdict("ok", "baseline", message))
    return tuple(verdicts)


def compare_sizes(ranked: Sequence[Score]) -> tuple[Verdict, ...]:
    """For each law that was tried with several meanings of N: their errors."""
    verdicts = []
    for law in dict.fromkeys(each.law for each in ranked if not each.is_baseline):
        tried = [each for each in ranked if each.law == law and not each.is_baseline]
        if len(tried) > 1:
            errors = ", ".join(f"{each.size} {_percent(each)}" for each in tried)
            verdicts.append(Verdict("ok", "sizes", f"{law} by what N counts: {errors}"))
    return tuple(verdicts)


def compare_nested(
    solutions: dict[tuple[str, str], tuple[Candidate, np.ndarray]], ranked: Sequence[Score], y: np.ndarray
) -> tuple[Verdict, ...]:
    """Of each pair of nested laws: whether the larger one's further parameters are needed.

    By the robust likelihood ratio, tau = 2 sum psi' / sum psi^2 times the gain in Huber's loss, which is chi-square
    distributed with as many degrees of freedom as parameters are freed (Hampel et al. 1986, chapter 7.2), at a
    threshold of 1.345 standard deviations of the larger law's residuals; and by the held-out errors.
    """
    scores = {(each.law, each.size): each for each in ranked}
    verdicts = []
    for nesting in NESTINGS:
        for size in dict.fromkeys(size for _, size in solutions):
            smaller, larger = solutions.get((nesting.smaller, size)), solutions.get((nesting.larger, size))
            if smaller is None or larger is None:
                continue
            freed = larger[0].free - smaller[0].free
            if freed < 1:
                continue
            tau = likelihood_ratio(smaller, larger, y)
            p = float(chi2.sf(tau, freed))
            need = "needs" if p < 0.05 else "does not need"
            message = (
                f"{_named(scores[nesting.larger, size])} {need} its {freed} more than {nesting.smaller}: tau = "
                f"{tau:.3g}, p = {p:.2g}; held-out errors {_percent(scores[nesting.larger, size])} and "
                f"{_percent(scores[nesting.smaller, size])}"
            )
            verdicts.append(Verdict("ok", "nested", message))
    return tuple(verdicts)


def likelihood_ratio(
    smaller: tuple[Candidate, np.ndarray], larger: tuple[Candidate, np.ndarray], y: np.ndarray
) -> float:
    """tau of two nested laws, with each law's starting values (S, K) of a fit to the loss y, (n,)."""
    target = np.log(y)

    def residuals(candidate: Candidate, begin: np.ndarray, objective: Huber) -> np.ndarray:
        free = np.array([each.name not in candidate.fixed for each in candidate.law.parameters])
        found = minimise(candidate.law, candidate.x, target, begin, objective, free=free)
        return found.residuals[np.argmin(found.objective)]

    first = target - larger[0].law.log_value(larger[1][:1], larger[0].x)[0]
    objective = Huber(1.345 * max(float(spread(first[None], np.ones((1, len(y))))[0]), 1e-9))
    ours, theirs = (residuals(*each, objective) for each in (smaller, larger))
    ones = np.ones((1, len(y)))
    gain = float(objective.value(ours[None], ones)[0] - objective.value(theirs[None], ones)[0])
    noise = float((np.clip(theirs, -objective.delta, objective.delta) ** 2).sum())
    if gain <= 0 or noise == 0:  # to a law without residuals, as of equal losses, there is nothing to compare
        return float("inf") if gain > 0 else 0.0
    return 2 * float((np.abs(theirs) < objective.delta).sum()) / noise * gain


def _score(
    results: dict, counted: Sequence[Split], clusters: np.ndarray, parameters: int, fixed: dict[str, float]
) -> Score:
    known = [split for split in counted if split.name in results]
    error, se = _mean([np.abs(results[split.name][1]) for split in known], known, clusters)
    first = results[known[0].name][0]
    return Score(first.law, first.size, parameters, error, se, fixed)


def _mean(values: Sequence[np.ndarray], splits: Sequence[Split], clusters: np.ndarray) -> tuple[float, float]:
    """The mean over splits of their means over tested rows, and its standard error: by clusters, of which one may be
    tested in several splits, or by how the splits differ, if that is more."""
    means = np.array([each.mean() for each in values])
    weights = np.concatenate([np.full(len(each), 1 / len(each)) for each in values])
    tested = np.concatenate([clusters[split.test] for split in splits])
    se = standard_error(np.concatenate(values), tested, weights)
    if len(means) > 2:
        se = max(se, float(means.std(ddof=1) / np.sqrt(len(means))))
    return float(means.mean()), se


def _in_nats(table: RunTable) -> bool:
    """Whether nothing says that the loss is in other units than nats for each token."""
    if not table.has("loss_kind"):
        return True
    kinds = {str(each).lower() for each in table.frame["loss_kind"].dropna()}
    return not any(unit in kind for kind in kinds for unit in OTHER_UNITS)


def _named(score: Score) -> str:
    return f"{score.law} in {score.size} parameters" if score.size else score.law


def _percent(score: Score) -> str:
    return f"{100 * score.error:.3g} +- {100 * score.error_se:.2g} %"
