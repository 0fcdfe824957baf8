"""What laws decide: the sizes of a target, then learning rate, batch, weight decay and loss of a run, and their risk.

fit, plan, "auto" values and the replay of `benchmarks/scaling_design.py` all decide here, and differ in what they do
with a verdict of failure: nothing is proposed, or the command is refused.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from scaling import optima
from scaling.candidates import SIZES as COUNTS
from scaling.cells import AXES
from scaling.laws.timescale import weight_decay_of
from scaling.proposal import FLOPS, allocate, extrapolation, law_for, loss_at, outside, reach, value_at
from scaling.results import Bowl, Decision, Estimate, Fit, Verdict
from scaling.table import column_of

SIZES = ("N", "D", "C")
TOO_FAR = "failure", "extrapolation"
NOT_TOLD = "not_told"
NOTHING = Decision({}, {}, {}, math.nan, math.nan)


def by_parameter(size: np.ndarray) -> np.ndarray:
    """FLOPs of a token where nothing else is known of a model, (n,) of (n,)."""
    return FLOPS * size


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
    seed: int = 0,
) -> Decision:
    """A proposal by the first law of each quantity that its data identify.

    `target`: C in FLOPs, or two of N, D and C, and any other column of a run. `constants`: columns that all runs have
    equal, which hold for the target too. With `far` an extrapolation that would be refused is warned of. ValueError
    for a target that says too little.
    """
    check(target)
    try:
        found = sizes(fits, target)
    except ValueError as error:
        found = replace(NOTHING, verdicts=(Verdict("failure", "no_optimum", str(error)),))
    if not found.proposal:
        loss = law_for(fits, "loss")[0]
        beyond = extrapolation([loss], target.get("C", math.nan)) if loss else math.nan
        return replace(found, target=target, extrapolation=beyond)
    columns = {column_of(name, name): value for name, value in target.items() if name not in SIZES}
    known = {name: value for name, value in constants.items() if value > 0} | columns
    try:
        told = at_sizes(found, fits, bowls, known, far=far, seed=seed)
    except ValueError as error:
        told = at_sizes(found, fits, bowls, known, far=far, seed=seed, quantities=("loss",))
        told = replace(told, verdicts=(*told.verdicts, Verdict("warning", NOT_TOLD, f"no lr or batch: {error}")))
    told = replace(told, target=target)
    if not is_too_far(told):
        return told
    refusal = "; nothing is proposed that far unless asked for"
    said = [
        replace(each, message=each.message + refusal) if (each.level, each.code) == TOO_FAR else each
        for each in told.verdicts
    ]
    return Decision(target, {}, {}, math.nan, told.extrapolation, tuple(said))


def is_too_far(found: Decision) -> bool:
    """Whether a law is further from its data than is trusted."""
    return any((each.level, each.code) == TOO_FAR for each in found.verdicts)


def sizes(
    fits: Sequence[Fit],
    target: Mapping[str, float],
    flops_of: Callable[[np.ndarray], np.ndarray] = by_parameter,
) -> Decision:
    """N and D of a target, as they were asked for or as they split the compute best.

    `flops_of`: FLOPs of a token by size, (n,) of (n,). Nothing is proposed, and a failure says why, where the compute
    cannot be split. ValueError for a law of loss that does not tell an optimum at all.
    """
    asked = {name: target[name] for name in SIZES if name in target}
    loss, missing = law_for(fits, "loss")
    if {"N", "D"} & set(asked):
        n, d = target.get("N"), target.get("D")
        if n is None:
            n = _size_of(target["C"] / d, flops_of)
        if d is None:
            d = target["C"] / float(flops_of(np.array([n]))[0])
        said = (
            Verdict("warning", each.code, f"no loss is predicted: {each.message}")
            for each in missing
            if each.code == "law"
        )
        return replace(NOTHING, target=asked, proposal={"N": given(n), "D": given(d)}, verdicts=tuple(said))
    if loss is None:
        return replace(NOTHING, target=asked, verdicts=missing)
    found = allocate(loss, target["C"], flops_of)
    if any(each.level == "failure" for each in found.verdicts):
        return replace(NOTHING, target=asked, verdicts=found.verdicts)
    proposal, plateaus = {"N": found.N, "D": found.D}, {"N": found.plateau}
    return Decision(asked, proposal, plateaus, found.regret, math.nan, found.verdicts)


def at_sizes(
    found: Decision, fits: Sequence[Fit], bowls: Sequence[Bowl], known: Mapping[str, float] = {}, **options: Any
) -> Decision:
    """`settle` for a run of which the sizes are known, and these columns: all counts of its parameters are N, and it
    costs 6 N D unless C was asked for."""
    size, tokens = found.proposal["N"].value, found.proposal["D"].value
    compute = found.target.get("C", FLOPS * size * tokens)
    flops = {"flops": compute, "flops_without_head": compute, "flops_per_token": compute / tokens}
    usual = {"streams": 1.0, "recurrences": 1.0, "unique_tokens": tokens}
    columns = usual | dict(known) | dict.fromkeys(COUNTS, size) | {"tokens": tokens} | flops
    return settle(found, fits, bowls, columns, **options)


def settle(
    found: Decision,
    fits: Sequence[Fit],
    bowls: Sequence[Bowl],
    known: Mapping[str, float],
    *,
    far: bool = False,
    quantities: Sequence[str] = (*AXES, "loss", "timescale"),
    seed: int = 0,
) -> Decision:
    """A decision of sizes with learning rate, batch and loss of a run of these columns (`scaling.columns`), and where
    there is a law of the timescale of weight decay with that and with the decay.

    A batch among `known` is kept, and the rate follows it. A law that is not identified is a failure of code "law";
    one that is further from its data than is trusted, of code "extrapolation", with `far` a warning. ValueError for a
    column that a law of lr or batch needs and that is not known.
    """
    told = {"lr"} & set(quantities)  # which is not known yet
    known = {name: float(each) for name, each in known.items() if each > 0 and name not in told}
    laws, said = {}, list(found.verdicts)
    for name in quantities:
        fit, missing = law_for(fits, name)
        laws |= {name: fit} if fit else {}
        said += [each for each in missing if each.code == "law" and name in AXES]
    timescale = laws.pop("timescale", None)
    settings = [laws[name] for name in AXES if name in laws]
    compute = known.get("flops", math.nan)
    judged = reach(list(laws.values()), compute)
    said += [replace(each, level="warning") for each in judged] if far else judged
    best = _settings(settings, bowls, known, law_for(fits, "max_lr")[0], seed) if settings else NOTHING
    said += outside(list(laws.values()), known)
    said += [each for each in best.verdicts if each.code not in ("extrapolation", "outside")]
    proposal = dict(found.proposal) | {name: best.proposal[name] for name in AXES if name in best.proposal}
    settled = known | {name: each.value for name, each in proposal.items() if name in AXES}
    if timescale is not None:
        decay, why = _decay(timescale, settled, proposal, far)
        proposal |= decay
        said += why
    if "loss" in laws:
        try:
            proposal["loss"] = loss_at(laws["loss"], settled, best.excess)
        except ValueError as error:
            said.append(Verdict("warning", NOT_TOLD, f"no loss is predicted: {error}"))
    if len({fit.size for fit in laws.values()}) > 1 and len({known.get(name) for name in COUNTS}) == 1:
        counts = ", ".join(f"{name} by {fit.size}" for name, fit in laws.items())
        message = f"the laws count parameters differently ({counts}), and here the counts are taken as equal"
        said.append(Verdict("warning", "size", message))
    regrets = [each for each in (found.regret, best.regret) if math.isfinite(each)]
    return Decision(
        found.target,
        proposal,
        dict(found.plateau) | dict(best.plateau),
        math.fsum(regrets) if regrets else math.nan,
        extrapolation(list(laws.values()), compute),
        tuple(said),
        best.excess,
    )


def _decay(
    fit: Fit, known: Mapping[str, float], proposal: Mapping[str, Estimate], far: bool
) -> tuple[dict[str, Estimate], tuple[Verdict, ...]]:
    """The timescale of a run's weight decay, and the decay where rate, batch and tokens are known. Nothing else depends
    on them: where they are not told, a warning says why."""
    judged = reach([fit], known.get("flops", math.nan))
    failed = [each.message for each in judged if each.level == "failure" and not far]
    try:
        if failed:
            raise ValueError(failed[0])
        timescale = value_at(fit, known)
    except ValueError as error:
        return {}, (Verdict("warning", NOT_TOLD, f"no weight decay is told: {error}"),)
    said = (*(replace(each, level="warning") for each in judged), *outside([fit], known))
    if not {"batch_tokens", "lr", "tokens"} <= known.keys():
        return {"timescale": timescale}, said
    batch, lr = (proposal.get(name, given(known[name])) for name in ("batch_tokens", "lr"))
    return {"timescale": timescale, "weight_decay": weight_decay(timescale, batch, lr, known["tokens"])}, said


def given(value: float) -> Estimate:
    """A number that is not estimated."""
    return Estimate(value, value, value, 0.0)


def weight_decay(timescale: Estimate, batch_tokens: Estimate, lr: Estimate, tokens: float) -> Estimate:
    """The weight decay of a timescale, for a run of this batch, rate and length. The interval takes the three for
    independent; where rate and batch rise together it is too wide."""
    value = weight_decay_of(timescale.value, batch_tokens.value, lr.value, tokens)
    up = math.hypot(_away(batch_tokens.high, batch_tokens), _away(lr.low, lr), _away(timescale.low, timescale))
    down = math.hypot(_away(batch_tokens.low, batch_tokens), _away(lr.high, lr), _away(timescale.high, timescale))
    return Estimate(value, value * math.exp(-down), value * math.exp(min(up, 700.0)) if math.isfinite(up) else math.inf)


def _away(end: float, of: Estimate) -> float:
    """How far an end of an interval is from the value, in logarithms."""
    return abs(math.log(end / of.value)) if 0 < end < math.inf else math.inf


def _settings(
    laws: Sequence[Fit], bowls: Sequence[Bowl], known: Mapping[str, float], stability: Fit | None, seed: int
) -> Decision:
    """Learning rate and batch, by the bowls where the laws are of runs. A published law has no draws, or the run may
    have no length: then they are the laws' values."""
    if {"tokens", "flops"} <= set(known) and all(len(each.draws) and math.isfinite(each.noise) for each in laws):
        target = dict(known) | {"N": known[laws[0].size], "D": known["tokens"], "C": known["flops"]}
        return optima.decide(target, laws, bowls, far=True, stability=stability, seed=seed)
    proposal, given = {}, dict(known)
    for fit in reversed(laws):  # a law of the rate may be one of the batch too
        if fit.quantity not in known:
            proposal[fit.quantity] = value_at(fit, given)
            given.setdefault(fit.quantity, proposal[fit.quantity].value)
    return replace(NOTHING, proposal=proposal)


def _size_of(flops: float, flops_of: Callable[[np.ndarray], np.ndarray]) -> float:
    """The size at which a token costs so many FLOPs, which rise with it."""
    grid = np.geomspace(1.0, flops, 4001)
    return float(np.exp(np.interp(math.log(flops), np.log(flops_of(grid)), np.log(grid))))
