"""What fitted laws decide for a target: sizes, learning rate, batch and loss, their intervals and what they risk."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from scaling import optima
from scaling.proposal import FLOPS, allocate, extrapolation, law_for, loss_at, reach
from scaling.results import Bowl, Decision, Estimate, Fit, Plateau, Verdict
from scaling.table import column_of

SIZES = ("N", "D", "C")


def check(target: Mapping[str, float]) -> None:
    """ValueError unless a target says how large the run is to be."""
    for name, value in target.items():
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"target {name} = {value:g}: accepted is a positive number")
    if "C" not in target and not {"N", "D"} <= set(target):
        given = ", ".join(target) or "nothing"
        raise ValueError(f"target of {given}: accepted is C, or two of N, D and C, and other columns beside them")
    if set(SIZES) <= set(target):
        raise ValueError("target of N, D and C: two of them tell the third")


def decide(
    target: Mapping[str, float],
    fits: Sequence[Fit],
    bowls: Sequence[Bowl] = (),
    *,
    constants: Mapping[str, float] = {},
    far: bool = False,
    stability: Fit | None = None,
    seed: int = 0,
) -> Decision:
    """A proposal by the first law of each quantity that its data identify.

    `target`: C in FLOPs, or two of N, D and C, and any other column of a run. `constants`: columns that all runs have
    equal, which hold for the target too. With `far` an extrapolation that would be refused is warned of. ValueError
    for a target that says too little.
    """
    check(target)
    loss, missing = law_for(fits, "loss")
    proposal, plateaus, regret, said = _sizes(target, loss, missing)
    if not proposal:
        return Decision(target, {}, {}, np.nan, _beyond(loss, target.get("C", np.nan)), tuple(said))
    size, tokens = proposal["N"].value, proposal["D"].value
    compute = target.get("C", FLOPS * size * tokens)
    known = {"streams": 1.0, "recurrences": 1.0, "unique_tokens": tokens}
    known |= {name: value for name, value in constants.items() if value > 0}
    known |= {column_of(name, name): value for name, value in target.items() if name not in SIZES}
    known |= {"N": size, "D": tokens, "C": compute}
    settings, excess = [], 0.0
    for quantity in ("lr", "batch_tokens"):
        fit, without = law_for(fits, quantity)
        settings += [fit] if fit else []
        said += [each for each in without if each.code == "law"]
    if settings:
        found = _settings(known, settings, bowls, far, stability, seed)
        said += found.verdicts
        proposal |= {name: each for name, each in found.proposal.items() if name not in proposal}
        plateaus |= found.plateau
        regret, excess = _sum(regret, found.regret), found.excess
    if loss is not None:
        said += _reach(loss, compute, far)
        try:
            columns = {column_of(name, loss.size): value for name, value in known.items()}
            settled = {name: each.value for name, each in proposal.items() if name in ("lr", "batch_tokens")}
            proposal["loss"] = loss_at(loss, {**columns, **settled}, excess)
        except ValueError as error:
            said.append(Verdict("warning", "not_told", f"no loss is predicted: {error}"))
    beyond = np.nanmax([_beyond(fit, compute) for fit in (loss, *settings)], initial=-np.inf)
    refused = any(each.level == "failure" and each.code == "extrapolation" for each in said)
    if refused:
        proposal, plateaus, regret, excess = {}, {}, np.nan, 0.0
    return Decision(target, proposal, plateaus, regret, float(beyond) if beyond > 0 else np.nan, tuple(said), excess)


def _sizes(
    target: Mapping[str, float], loss: Fit | None, missing: Sequence[Verdict]
) -> tuple[dict[str, Estimate], dict[str, Plateau], float, list[Verdict]]:
    """N and D as they were asked for, or as they split the compute best. `missing` says why there is no law of loss."""
    given = {name: target[name] for name in ("N", "D") if name in target}
    if len(given) == 1:
        other = "D" if "N" in given else "N"
        given[other] = target["C"] / (FLOPS * next(iter(given.values())))
    if given:
        return (
            {name: Estimate(given[name], given[name], given[name], 0.0) for name in "ND"},
            {},
            np.nan,
            _left_out(missing),
        )
    if loss is None:
        return {}, {}, np.nan, list(missing)
    try:
        found = allocate(loss, target["C"])
    except ValueError as error:
        return {}, {}, np.nan, [Verdict("failure", "no_optimum", str(error))]
    said = list(found.verdicts)
    if any(each.level == "failure" for each in said):
        return {}, {}, np.nan, said
    return {"N": found.N, "D": found.D}, {"N": found.plateau}, found.regret, said


def _left_out(missing: Sequence[Verdict]) -> list[Verdict]:
    """A warning that no loss is predicted by a law that is not identified."""
    return [
        Verdict("warning", each.code, f"no loss is predicted: {each.message}") for each in missing if each.code == "law"
    ]


def _settings(
    known: Mapping[str, float],
    fits: Sequence[Fit],
    bowls: Sequence[Bowl],
    far: bool,
    stability: Fit | None,
    seed: int,
) -> Decision:
    """Learning rate and batch; what a law reads and nothing tells is said in a verdict."""
    try:
        return optima.decide(known, fits, bowls, far=far, stability=stability, seed=seed)
    except ValueError as error:
        return Decision(known, {}, {}, np.nan, np.nan, (Verdict("warning", "not_told", f"no lr or batch: {error}"),))


def _reach(loss: Fit, compute: float, far: bool) -> list[Verdict]:
    """How far the law of loss is extrapolated; where it was asked for, a refusal becomes a warning."""
    found = reach([loss], compute)
    if far:
        return [replace(each, level="warning") for each in found]
    refusal = "; nothing is proposed that far unless asked for"
    return [replace(each, message=each.message + refusal) if each.level == "failure" else each for each in found]


def _beyond(fit: Fit | None, compute: float) -> float:
    return np.nan if fit is None else extrapolation([fit], compute)


def _sum(*values: float) -> float:
    """Of those that are known; NaN if none is."""
    finite = [each for each in values if np.isfinite(each)]
    return float(sum(finite)) if finite else np.nan
