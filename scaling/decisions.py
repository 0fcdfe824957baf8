"""What the fitted laws decide for a target: sizes, learning rate, batch and loss, their intervals and what they risk."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from scaling.laws import find
from scaling.laws.law import SYMBOLS
from scaling.proposal import FLOPS, allocate, extrapolation, plateau, reach, value_at
from scaling.results import Bowl, Decision, Estimate, Fit, Plateau, Verdict
from scaling.table import column_of

SETTINGS = ("batch_tokens", "lr")
"""In this order: a law of lr may need the batch."""


def check(target: Mapping[str, float]) -> None:
    """ValueError unless a target says how large the run is to be."""
    for name, value in target.items():
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"target {name} = {value:g}: accepted is a positive number")
    if "C" not in target and not {"N", "D"} <= set(target):
        given = ", ".join(target) or "nothing"
        raise ValueError(f"target of {given}: accepted is C, or two of N, D and C, and other columns beside them")
    if {"N", "D", "C"} <= set(target):
        raise ValueError("target of N, D and C: two of them tell the third")


def decide(
    target: Mapping[str, float],
    fits: Sequence[Fit],
    bowls: Sequence[Bowl] = (),
    *,
    constants: Mapping[str, float] = {},
    far: bool = False,
) -> Decision:
    """A proposal by the first law of each quantity.

    `target`: C in FLOPs, or two of N, D and C, and any other column of a run. `constants`: columns that all runs have
    equal, which hold for the target too. With `far` an extrapolation that would be refused is warned of. ValueError
    for a target that says too little.
    """
    check(target)
    laws = {}
    for fit in fits:
        laws.setdefault(fit.quantity, fit)
    used = [laws[name] for name in ("loss", *SETTINGS) if name in laws]
    if not used:
        return Decision(target, {}, {}, np.nan, np.nan, (Verdict("failure", "no_law", "no law was fitted"),))
    proposal, plateaus, regret, said = _sizes(target, laws.get("loss"))
    if "N" not in proposal or "D" not in proposal:
        return Decision(target, {}, {}, np.nan, extrapolation(used, target["C"]), tuple(said))
    compute = target.get("C", FLOPS * proposal["N"].value * proposal["D"].value)
    said += _reached(used, compute, far)
    beyond = extrapolation(used, compute)
    if any(each.level == "failure" for each in said):
        return Decision(target, {}, {}, np.nan, beyond, tuple(said))
    known = {**constants, **{column_of(name, "N"): value for name, value in target.items() if name not in "NDC"}}
    known |= {"tokens": proposal["D"].value, "flops": compute}
    for name in ("batch_tokens", "lr", "loss"):
        if name in known or name not in laws:
            continue
        fit = laws[name]
        try:
            proposal[name] = value_at(fit, {**known, fit.size: proposal["N"].value})
        except ValueError as error:
            said.append(Verdict("warning", "not_told", f"no {name}: {error}"))
            continue
        known[name] = proposal[name].value
        if name in SETTINGS and (found := plateau(bowls, name, proposal[name].value)) is not None:
            plateaus[name] = found
    settings = [laws[name] for name in SETTINGS if name in proposal]
    regret = _sum(regret, _regret(settings, bowls, known, proposal["N"].value))
    return Decision(target, proposal, plateaus, regret, beyond, (*said, *_weak(used)))


def _sizes(
    target: Mapping[str, float], loss: Fit | None
) -> tuple[dict[str, Estimate], dict[str, Plateau], float, list[Verdict]]:
    """N and D as they were asked for, or as they split the compute best."""
    given = {name: target[name] for name in ("N", "D") if name in target}
    if len(given) == 1:
        other = "D" if "N" in given else "N"
        given[other] = target["C"] / (FLOPS * next(iter(given.values())))
    if given:
        return {name: Estimate(given[name], given[name], given[name], 0.0) for name in "ND"}, {}, np.nan, []
    if loss is None:
        return {}, {}, np.nan, [Verdict("failure", "no_law", "no law of the loss was fitted, to split the compute by")]
    try:
        found = allocate(loss, target["C"])
    except ValueError as error:
        return {}, {}, np.nan, [Verdict("failure", "no_optimum", str(error))]
    said = []
    if found.at_edge > 0:
        message = f"{found.at_edge:.0%} of the bootstrap has no optimum between too few parameters and too few tokens"
        said.append(Verdict("warning", "no_optimum", message))
    return {"N": found.N, "D": found.D}, {"N": found.plateau}, found.regret, said


def _reached(fits: Sequence[Fit], compute: float, far: bool) -> list[Verdict]:
    """How far each law is extrapolated; what is asked for is warned of instead of refused."""
    found = reach(fits, compute)
    if far:
        return [replace(each, level="warning") for each in found]
    refusal = "; nothing is proposed that far unless asked for (--far)"
    return [replace(each, message=each.message + refusal) if each.level == "failure" else each for each in found]


def _weak(fits: Sequence[Fit]) -> list[Verdict]:
    return [
        Verdict("warning", "unidentified", f"the law of {fit.quantity}, {fit.law}, is not identified by these runs")
        for fit in fits
        if not fit.identified
    ]


def _regret(settings: Sequence[Fit], bowls: Sequence[Bowl], known: Mapping[str, float], size: float) -> float:
    """Expected excess of the loss for not knowing the best lr and batch: half the curvature times the variance of ln of
    the optimum, over bootstrap draws and the scatter of cells around the law."""
    curved = [each.curvature for each in bowls if len(each.curvature) == 3]
    if not settings or not curved or any(len(fit.draws) < 2 for fit in settings):
        return np.nan
    of_lr, cross, of_batch = (_median([each[place] for each in curved]) for place in range(3))
    away = {}
    for fit in settings:
        x = {symbol: np.array([_known(known, symbol, fit, size)]) for symbol in find(fit.law).inputs}
        draws = np.log(fit.predictions(x)[:, 0]) - np.log(fit.predict(x)[0])
        away[fit.quantity] = draws, float(fit.details.get("scatter") or 0.0)
    parts = []
    for name, curvature in (("lr", of_lr), ("batch_tokens", of_batch)):
        if name in away and np.isfinite(curvature):
            draws, scatter = away[name]
            parts.append(0.5 * curvature * (np.mean(draws**2) + scatter**2))
    if len(away) == 2 and np.isfinite(cross):
        lr, batch = away["lr"][0], away["batch_tokens"][0]
        if len(lr) == len(batch):  # drawn from the same cells, with the same seed
            parts.append(cross * np.mean(lr * batch))
    return float(max(np.expm1(sum(parts)), 0.0)) if parts else np.nan


def _known(known: Mapping[str, float], symbol: str, fit: Fit, size: float) -> float:
    return size if symbol == "N" else known.get(SYMBOLS.get(symbol, symbol), np.nan)


def _median(values: Sequence[float]) -> float:
    finite = [each for each in values if np.isfinite(each)]
    return float(np.median(finite)) if finite else np.nan


def _sum(*values: float) -> float:
    """Of those that are known; NaN if none is."""
    finite = [each for each in values if np.isfinite(each)]
    return float(sum(finite)) if finite else np.nan
