"""What learning rate and batch to train a target with, how sure that is, and what not being sure costs."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import expit

from scaling.cells import AXES
from scaling.laws import find
from scaling.optima.plateau import curvature_at, plateau
from scaling.optima.regret import expected_regret
from scaling.proposal import extrapolation, outside
from scaling.results import Bowl, Decision, Estimate, Fit, Plateau, Verdict
from scaling.table import column_of

WARN, REFUSE = 3.0, 10.0
"""Factors beyond the largest compute of the cells."""
RISK = 0.05


def decide(
    target: Mapping[str, float],
    fits: Sequence[Fit],
    bowls: Sequence[Bowl],
    *,
    far: bool = False,
    cost: float = 1e-3,
    stability: Fit | None = None,
    seed: int = 0,
) -> Decision:
    """Learning rate and batch for a target: N, D and what else the laws read, by symbol or column.

    Of `fits` the first of lr and of batch_tokens count. A batch that the target gives is kept, and the rate follows
    along the valley of the bowls; `regret` and `excess` hold what that batch costs. A rate above the largest stable one
    is held there. Intervals hold the laws' draws and the scatter of optima around them, so that they are of the optimum
    at the target and not of the law. More than 10 times the largest compute that was fitted is a
    failure, with `far` a warning. ValueError naming what a law reads and the target does not say.
    """
    lr_fit, batch_fit = (next((each for each in fits if each.quantity == name), None) for name in AXES)
    used = [each for each in (lr_fit, batch_fit) if each is not None]
    if not used:
        raise ValueError("no law of lr or batch_tokens was fitted; a decision needs one")
    size = used[0].size
    known = _complete(target, size)
    columns = {name: known[symbol] for name, symbol in ((size, "N"), ("tokens", "D")) if symbol in known}
    whole = curvature_at(columns, bowls, AXES)
    middle, drawn, best_batch = _optimum(lr_fit, batch_fit, known, whole, seed)
    settled = [name for name in AXES if name in drawn]
    curvature = curvature_at(columns, bowls, settled) if settled else None
    best, drawn_best = dict(middle), dict(drawn)
    verdicts: tuple[Verdict, ...] = ()
    if stability and "lr" in middle:
        middle["lr"], verdicts = _stable(stability, known | {"B": middle.get("batch_tokens")}, middle["lr"])
        if middle["lr"] < best["lr"]:
            drawn["lr"] = np.minimum(drawn["lr"], middle["lr"])
    proposal = {name: Estimate(known[name], known[name], known[name], 0.0) for name in ("N", "D") if name in known}
    for name in AXES:
        if name in drawn:
            proposal[name] = _estimate(middle[name], drawn[name])
        elif name in middle:
            proposal[name] = Estimate(middle[name], middle[name], middle[name], 0.0)
    flat, regret, excess = {}, float("nan"), 0.0
    if curvature is not None:
        flat = {name: plateau(best[name], curvature[i, i], cost) for i, name in enumerate(settled)}
        draws = min(len(drawn[name]) for name in settled)
        off = np.column_stack([np.log(drawn_best[name][:draws] / middle[name]) for name in settled])
        regret = expected_regret(off, curvature)
        excess = expected_regret(np.array([[np.log(best[name] / middle[name]) for name in settled]]), curvature)
    if best_batch is not None:
        bend = _bend(columns, bowls, whole, "lr" in middle)
        if bend is not None:
            off = np.log(np.r_[best_batch[0], best_batch[1]] / middle["batch_tokens"])[:, None]
            at_batch = expected_regret(off[:1], bend)
            excess += at_batch
            regret = (0.0 if np.isnan(regret) else regret) + expected_regret(off[1:], bend)
            verdicts += _off_batch(middle["batch_tokens"], plateau(best_batch[0], bend[0, 0], cost), at_batch)
    beyond = extrapolation(used, known.get("C", float("nan")))
    verdicts = (*_extrapolated(beyond, far), *outside(used, known), *_identified(used), *verdicts)
    return Decision(dict(target), proposal, flat, regret, beyond, verdicts, excess)


def _optimum(
    lr_fit: Fit | None, batch_fit: Fit | None, known: Mapping[str, float], curvature: np.ndarray | None, seed: int
) -> tuple[dict[str, float], dict[str, np.ndarray], tuple[float, np.ndarray] | None]:
    """The best lr and batch_tokens, and draws (B,) of those that are not given; a given batch moves the rate. Beside a
    given batch the best one and its draws, where there is a law of it."""
    generator = np.random.default_rng(seed)
    middle: dict[str, float] = {}
    drawn: dict[str, np.ndarray] = {}
    given = known.get("B")
    if given is not None:
        middle["batch_tokens"] = given
    elif batch_fit:
        middle["batch_tokens"], drawn["batch_tokens"] = _told(batch_fit, known, generator)
    if not lr_fit:
        return middle, drawn, _told(batch_fit, known, generator) if given is not None else None
    reads_batch = bool({"B", "batch_tokens"} & set(find(lr_fit.law).inputs))
    batch = {"B": middle["batch_tokens"], "batch_tokens": middle["batch_tokens"]} if middle else {}
    middle["lr"], drawn["lr"] = _told(lr_fit, {**known, **batch}, generator)
    if given is None or not batch_fit:
        return middle, drawn, None
    best, draws = _told(batch_fit, known, generator)
    if not reads_batch:
        slope = _valley(curvature)
        middle["lr"] *= (given / best) ** slope
        count = min(len(draws), len(drawn["lr"]))
        drawn["lr"] = drawn["lr"][:count] * (given / draws[:count]) ** slope
    return middle, drawn, (best, draws)


def _complete(target: Mapping[str, float], size: str) -> dict[str, float]:
    """The target by symbol and by column, with C = M D, or 6 N D."""
    if bad := next((name for name, value in target.items() if not 0 < value < np.inf), None):
        raise ValueError(f"target {bad} = {target[bad]}: accepted are finite numbers above 0")
    known = dict(target)
    for symbol in ("N", "D", "B", "C", "M"):
        column = column_of(symbol, size)
        if symbol in known or column in known:
            known[symbol] = known[column] = float(known.get(symbol, known.get(column)))
    if "C" not in known and "D" in known and ("M" in known or "N" in known):
        known["C"] = known["flops"] = known["D"] * known.get("M", 6 * known.get("N", 0.0))
    return known


def _inputs(fit: Fit, known: Mapping[str, float | None]) -> dict[str, np.ndarray]:
    symbols = find(fit.law).inputs
    for symbol in symbols:
        if known.get(symbol) is None:
            raise ValueError(
                f"the target does not say {symbol}, which law {fit.law!r} reads; it says {', '.join(known)}"
            )
    return {symbol: np.array([known[symbol]], dtype=float) for symbol in symbols}


def _told(fit: Fit, known: Mapping[str, float], generator: np.random.Generator) -> tuple[float, np.ndarray]:
    """The law's value and draws of where the optimum of one more cell may lie, (B,): Student's around the law's."""
    x = _inputs(fit, known)
    draws = fit.predictions(x)[:, 0]
    scatter = float(fit.details.get("scatter", fit.noise))
    freedom = fit.details.get("freedom", np.inf)  # of which numpy's Student has no limit
    away = generator.standard_t(freedom, len(draws)) if np.isfinite(freedom) else generator.standard_normal(len(draws))
    return float(fit.predict(x)[0]), draws * np.exp(scatter * away)


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(value, float(low), float(high), float(value * np.log(draws).std()))


def _valley(curvature: np.ndarray | None) -> float:
    """d ln best lr / d ln batch; the square root where no bowl tells it, as of Adam's noise-dominated steps."""
    return 0.5 if curvature is None else float(-curvature[0, 1] / curvature[0, 0])


def _bend(
    columns: Mapping[str, float], bowls: Sequence[Bowl], whole: np.ndarray | None, follows: bool
) -> np.ndarray | None:
    """Curvature (1, 1) over ln batch, with the rate at its best for each batch if it follows; None if unknown or if
    the bowls are not convex along the valley."""
    if not follows:
        return curvature_at(columns, bowls, ["batch_tokens"])
    if whole is None:
        return None
    along = whole[1, 1] - whole[0, 1] ** 2 / whole[0, 0]
    return np.array([[along]]) if along > 0 else None


def _off_batch(batch: float, flat: Plateau, excess: float) -> tuple[Verdict, ...]:
    """A warning of a given batch that costs more than its plateau does."""
    if flat.low <= batch <= flat.high:
        return ()
    message = (
        f"a batch of {batch:,.0f} tokens costs {excess:.2%} of the loss; {flat.low:,.0f} to {flat.high:,.0f} cost "
    )
    return (Verdict("warning", "batch", message + f"less than {flat.cost:.1%}"),)


def _extrapolated(factor: float, far: bool) -> tuple[Verdict, ...]:
    if not factor > WARN:
        return ()
    refused = factor > REFUSE and not far
    message = f"the target is {factor:.3g} times the largest compute that was fitted"
    message += f"; beyond {REFUSE:g} times it is refused unless asked" if refused else ""
    return (Verdict("failure" if refused else "warning", "extrapolation", message),)


def _identified(fits: Sequence[Fit]) -> tuple[Verdict, ...]:
    return tuple(
        Verdict("failure", "law", f"law {fit.law!r} is not identified: {each.message}")
        for fit in fits
        for each in fit.verdicts
        if each.level == "failure"
    )


def _stable(stability: Fit, known: Mapping[str, float | None], lr: float) -> tuple[float, tuple[Verdict, ...]]:
    """The rate, held at the largest stable one. A warning where it is held, where more than a few runs in a hundred
    would diverge at it, or a half at the worst draw."""
    if not stability.identified or any(known.get(symbol) is None for symbol in find(stability.law).inputs):
        return lr, ()
    x = _inputs(stability, known)
    largest, worst = stability.predict(x)[0], np.quantile(stability.predictions(x)[:, 0], 0.025)
    if lr > largest:
        message = f"lr {lr:.3g} is held at the largest stable one, {largest:.3g} (at least {worst:.3g}): "
        return float(largest), (Verdict("warning", "stability", message + "half of the runs would diverge there"),)
    risk = float(expit(stability.details["sharpness"] * np.log(lr / largest)))
    if risk <= RISK and lr < worst:
        return lr, ()
    message = (
        f"lr {lr:.3g} is near the largest stable one, {largest:.3g} (at least {worst:.3g}): {risk:.0%} would diverge"
    )
    return lr, (Verdict("warning", "stability", message),)
