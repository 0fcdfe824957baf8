"""From laws and a target to a configuration: sizes, a shape, the settings, and what the machine can hold."""

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np

from launch.auto import AUTO, Laws, columns_of, round_batch, round_rate, unlike
from launch.config import read, validated
from launch.growth_config import RunConfiguration
from launch.shapes import Family
from runtime.model.config import ModelConfig
from runtime.model.counts import count, flops_per_token
from runtime.observe.dry_run import supposed_device
from runtime.observe.memory import estimate
from runtime.observe.proposal import MOST_AT_ONCE, MOST_TENSOR, RECOMPUTE
from runtime.parallel.mesh import plan_layout
from scaling import decisions
from scaling.decisions import by_parameter
from scaling.proposal import law_for
from scaling.results import Decision, Fit, Plateau, Verdict

Made = TypeVar("Made")
QUANTITIES = ("loss", "batch_tokens", "lr", "timescale")
PLACEHOLDERS = {"optim.lr": 1e-3, "optim.weight_decay": 0.1, "batch.sequences": 1}
QUANTITIES_OF = {"optim.lr": "lr", "optim.weight_decay": "weight_decay", "batch.sequences": "batch_tokens"}
"""What decides each key that a preset may leave to laws."""
SHAPE = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
FEW_LAYERS = 2, 4
"""Of the models by which the memory of deep ones is guessed."""
SURELY = 1.15
"""Times what a device has, of a guess: so far beyond, the memory is not looked at more closely."""
STATE_BYTES = 16
"""Of a parameter in fp32: itself, its gradient and two moments, the least that a mesh has to hold."""


class Unidentified(ValueError):
    """The laws do not tell what was asked."""


@dataclass(frozen=True)
class Target:
    """What is asked for: FLOPs alone, or two of FLOPs, parameters and tokens."""

    compute: float | None = None
    params: float | None = None
    tokens: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("compute", "params", "tokens") if getattr(self, name) is not None]
        if not given or given in (["params"], ["tokens"]) or len(given) == 3:
            named = ", ".join(f"--{name}" for name in given) or "nothing"
            raise ValueError(
                f"a target of {named}; accepted are --compute alone, or two of --compute, --params and --tokens"
            )
        for name in given:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name):g} is not positive")

    @property
    def asked(self) -> dict[str, float]:
        """By the symbols of laws."""
        given = {"C": self.compute, "N": self.params, "D": self.tokens}
        return {name: each for name, each in given.items() if each is not None}

    @property
    def splits(self) -> bool:
        """Whether N and D are for the law of loss to choose."""
        return self.params is None and self.tokens is None


@dataclass(frozen=True)
class Machine:
    """What the run is to fit on."""

    world_size: int = 1
    memory_gib: float | None = None
    """Of a device; None for no limit."""


@dataclass(frozen=True)
class Preset:
    """A configuration whose family the run is to be of."""

    raw: dict[str, Any]
    config: RunConfiguration
    auto: frozenset[str] = frozenset()
    """The keys that are left to the laws, with placeholders in `raw` and `config`."""

    def refuse_placeholders(self, decided: Container[str], laws: Laws) -> None:
        """ValueError if a key that is left to the laws is decided by none of them."""
        for key in sorted(self.auto):
            if QUANTITIES_OF[key] not in decided:
                raise ValueError(
                    f'{key} = "auto" in the preset, and {laws.name} tells no {QUANTITIES_OF[key]}; give a number, as '
                    f"in {key}={PLACEHOLDERS[key]:g}"
                )


@dataclass(frozen=True)
class Plan:
    """A decision, and the run that it comes to, if there is a preset."""

    decision: Decision
    fits: Mapping[str, Fit]
    size: str
    """The count that N is."""
    raw: dict[str, Any] | None = None
    config: RunConfiguration | None = None
    memory: int | None = None
    """Bytes of a device at its fullest, where there is a limit."""


def open_preset(path: str, overrides: Sequence[str]) -> Preset:
    """A preset, with placeholders for what a plan decides. ValueError for one that cannot be."""
    raw, auto = read(path), set()
    overridden = {each.partition("=")[0].strip() for each in overrides}
    for name, value in PLACEHOLDERS.items():
        section, key = name.split(".")
        if isinstance(raw.get(section), dict) and raw[section].get(key) == AUTO:
            raw[section][key] = value
            auto |= {name} - overridden
    config = validated(raw, overrides, path)
    if config.growth:
        raise ValueError(f"{path}: a plan is of one shape, and this run grows; take the [[growth]] entries out")
    return Preset(raw, config, frozenset(auto))


def make_plan(laws: Laws, target: Target, preset: Preset | None, machine: Machine, far: bool = False) -> Plan:
    """The plan for a target. ValueError for bad input, `Unidentified` where the laws do not tell it."""
    needed = {"loss": target.splits, "timescale": preset is not None and "optim.weight_decay" in preset.auto}
    fits = told_by(laws, [name for name in QUANTITIES if needed.get(name, True)])
    # On the others nothing that is asked for depends.
    others = {name: law_for(laws.fits, name)[0] for name in QUANTITIES if not needed.get(name, True)}
    fits |= {name: fit for name, fit in others.items() if fit is not None}
    fits = {name: fits[name] for name in QUANTITIES if name in fits}
    if not fits:
        raise ValueError(f"{laws.name} has no law of {', '.join(QUANTITIES)}")
    size = next(iter(fits.values())).size
    if preset is None:
        found = sizes(laws, target)
        return Plan(answered(decisions.at_sizes(found, laws.fits, laws.bowls, far=far)), fits, size)
    return first_held(preset, machine, partial(_shaped, laws, fits, size, target, preset, machine, far=far))


def first_held(preset: Preset, machine: Machine, made: Callable[[int], Made | None]) -> Made:
    """What is made with the first tensor-parallel degree that the machine can hold it with. ValueError if there is
    none."""
    for tensor in _degrees(preset, machine):
        if (found := made(tensor)) is not None:
            return found
    raise ValueError(
        f"no layout on {machine.world_size} devices of {machine.memory_gib:g} GiB holds this model, with one sequence "
        "at a time and full recomputation; give more devices, or a smaller target"
    )


def told_by(laws: Laws, quantities: Sequence[str]) -> dict[str, Fit]:
    """The law to decide each quantity by, where there is one. `Unidentified` where there are only unidentified ones."""
    found = {}
    for name in quantities:
        fit, missing = law_for(laws.fits, name)
        if missing and missing[0].code == "law":
            raise Unidentified(missing[0].message)
        if fit is not None:
            found[name] = fit
    return found


def sizes(laws: Laws, target: Target, flops_of: Callable[[np.ndarray], np.ndarray] = by_parameter) -> Decision:
    """N and D for a target, by the law of loss where only the compute is given. `flops_of` as of `decisions.sizes`.

    ValueError for laws that have none of the loss, `Unidentified` where it has no optimum.
    """
    return answered(decisions.sizes(laws.fits, target.asked, flops_of))


def answered(found: Decision) -> Decision:
    """A decision that laws tell. ValueError where there is no law of the loss to split compute, `Unidentified` for any
    other failure."""
    failed = next((each for each in found.verdicts if each.level == "failure"), None)
    if failed is None:
        return found
    if failed.code == "no_law":
        raise ValueError("there is no law of loss, which --compute alone needs; give --params or --tokens too")
    hint = "; --far takes the law's word for it" if failed.code == "extrapolation" else ""
    raise Unidentified(failed.message + hint)


def _shaped(
    laws: Laws,
    fits: Mapping[str, Fit],
    size: str,
    target: Target,
    preset: Preset,
    machine: Machine,
    tensor: int,
    *,
    far: bool,
) -> Plan | None:
    """The plan with a tensor-parallel degree; None where the machine cannot hold it."""
    family, seq_len = Family(preset.config.model, tensor), preset.config.data.seq_len
    found = sizes(laws, target, family.flops_per_token(size, seq_len))
    model = family.nearest(size, found.proposal["N"].value)
    tokens = found.proposal["D"].value
    if target.compute is not None and target.tokens is None:
        tokens = target.compute / flops_per_token(model, seq_len)  # of this shape exactly
    raw = draft(preset, model, tokens, tensor)
    config = checked(raw)
    open_ = ("lr", "batch", "weight_decay") if "optim.weight_decay" in preset.auto else ("lr", "batch")
    known = {name: each for name, each in columns_of(config).items() if not name.startswith(open_)}
    settled = partial(decisions.settle, found, laws.fits, laws.bowls, far=far)
    decision = answered(settled(known=known))
    if "batch_tokens" in fits:
        raw["batch"]["sequences"] = round_batch(decision.proposal["batch_tokens"].value, config, machine.world_size)
    batch_tokens = raw["batch"]["sequences"] * seq_len
    decision = _at_batch(decision, settled(known=known | {"batch_tokens": batch_tokens}), batch_tokens)
    raw["schedule"]["horizon"] = whole_steps(tokens, batch_tokens)
    if "lr" in fits:
        raw["optim"]["lr"] = round_rate(decision.proposal["lr"].value)
    if "timescale" in decision.proposal:
        decision = _with_decay(decision, raw, batch_tokens)
    preset.refuse_placeholders(decision.proposal, laws)
    if "optim.weight_decay" in preset.auto:
        raw["optim"]["weight_decay"] = round_rate(decision.proposal["weight_decay"].value)
    unalike = dict.fromkeys(said for fit in fits.values() for said in unlike(fit, config))
    warned = (Verdict("warning", "unlike", each) for each in unalike)
    decision = replace(decision, verdicts=(*decision.verdicts, *warned))
    raw["run"]["name"] += f"-{short(getattr(count(model), size))}-{short(tokens)}"
    held = held_by(raw, machine)
    return None if held is None else Plan(decision, fits, size, held[0], checked(held[0]), held[1])


def _with_decay(decision: Decision, raw: Mapping[str, Any], batch_tokens: int) -> Decision:
    """With the weight decay at the run's own rate, batch and length."""
    batch, lr = (decisions.given(float(each)) for each in (batch_tokens, raw["optim"]["lr"]))
    timescale = decision.proposal["timescale"]
    decay = decisions.weight_decay(timescale, batch, lr, raw["schedule"]["horizon"])
    return replace(decision, proposal={**decision.proposal, "weight_decay": decay})


def draft(preset: Preset, model: ModelConfig, tokens: float, tensor: int) -> dict[str, Any]:
    """The preset's sections with another shape, length and tensor-parallel degree."""
    raw = deepcopy(preset.raw)
    raw["model"] |= {key: getattr(model, key) for key in SHAPE}
    raw["schedule"]["horizon"] = max(1, round(tokens))
    if tensor > 1 or "tensor" in raw.get("parallel", {}):
        raw.setdefault("parallel", {})["tensor"] = tensor
    return raw


def whole_steps(tokens: float, batch_tokens: int) -> int:
    """Tokens of about so many in whole batches."""
    return max(1, round(tokens / batch_tokens)) * batch_tokens


def _at_batch(best: Decision, given: Decision, batch_tokens: int) -> Decision:
    """The best decision with the rate and loss of the batch that the mesh carries, and a warning where it is off."""
    moved = {name: given.proposal[name] for name in ("lr", "loss", "timescale") if name in given.proposal}
    plateaus = dict(best.plateau) | {name: each for name, each in given.plateau.items() if name == "lr"}
    of_batch = ("stability", decisions.NOT_TOLD)
    held = [each for each in given.verdicts if each.code in of_batch]
    verdicts = (*(each for each in best.verdicts if each.code not in of_batch), *held)
    if (wanted := best.proposal.get("batch_tokens")) is not None:
        flat = best.plateau.get("batch_tokens", Plateau(wanted.value * 2 / 3, wanted.value * 3 / 2))
        if not flat.low <= batch_tokens <= flat.high:
            said = f"the mesh carries {batch_tokens:,} tokens a batch; good are {flat.low:,.0f} to {flat.high:,.0f}"
            verdicts = (*verdicts, Verdict("warning", "batch", said))
    return replace(
        best,
        proposal={**best.proposal, **moved},
        plateau=plateaus,
        regret=given.regret,
        verdicts=verdicts,
        excess=given.excess,
    )


def checked(raw: Mapping[str, Any]) -> RunConfiguration:
    """The configuration that raw sections mean; they stay as they are."""
    return validated(deepcopy(dict(raw)), (), "the plan")


def _degrees(preset: Preset, machine: Machine) -> Iterator[int]:
    """Tensor-parallel degrees in the order of trial: the preset's, and more where memory may need it."""
    degree = preset.config.parallel.tensor
    yield degree
    while machine.memory_gib is not None and degree * 2 <= MOST_TENSOR and machine.world_size % (degree * 2) == 0:
        degree *= 2
        yield degree


def held_by(raw: dict[str, Any], machine: Machine) -> tuple[dict[str, Any], int | None] | None:
    """The run with the recomputation and micro-batch that the machine can hold, the fastest first, and the bytes that a
    device needs; None where it holds none. ValueError for a layout that cannot be."""
    config = checked(raw)
    share = _share(config, machine)
    first = min(config.batch.micro_sequences or share, share)
    if machine.memory_gib is None:
        return _with(raw, config.parallel.recompute, first if "micro_sequences" in raw["batch"] else None), None
    limit = machine.memory_gib * 2**30
    if STATE_BYTES * count(config.model).total > limit * machine.world_size:
        least = math.ceil(STATE_BYTES * count(config.model).total / limit)
        raise ValueError(
            f"weights, gradients and moments alone need {least:,} devices of {machine.memory_gib:g} GiB, and there are "
            f"{machine.world_size:,}; give more, or a smaller target"
        )
    largest = min(share, config.batch.micro_sequences or MOST_AT_ONCE)
    choices = [each for each in range(1, largest + 1) if share % each == 0 or each == largest]
    for recompute in RECOMPUTE[RECOMPUTE.index(config.parallel.recompute) :]:
        needed, likely = _memory(raw, recompute, machine)
        if (held := largest_held(choices, needed, likely, limit)) is not None:
            return _with(raw, recompute, held), needed(held)
    return None


def largest_held(
    choices: Sequence[int], needed: Callable[[int], float], likely: Callable[[int], float], limit: float
) -> int | None:
    """The largest choice, of rising ones, that needs no more than the limit; None where the first needs more.

    `needed` takes long: it is asked for the choice that `likely`, a line through its first and last value, expects, and
    from there for its neighbours until one holds and the next does not, or surely would not.
    """
    if likely(choices[0]) > SURELY * limit:
        return None
    expected = np.interp(choices, [choices[0], choices[-1]], [likely(choices[0]), likely(choices[-1])])
    place = max(int(np.searchsorted(expected, limit, side="right")) - 1, 0)
    if needed(choices[place]) > limit:
        while place >= 0 and needed(choices[place]) > limit:
            place -= 1
        return choices[place] if place >= 0 else None
    while place + 1 < len(choices) and expected[place + 1] <= SURELY * limit and needed(choices[place + 1]) <= limit:
        place += 1
    return choices[place]


def _memory(
    raw: Mapping[str, Any], recompute: str, machine: Machine
) -> tuple[Callable[[int], float], Callable[[int], float]]:
    """Bytes of the fullest device by sequences of a micro-batch: as they are, and as models of few layers tell them."""

    @cache
    def needed(micro: int) -> int:
        return _needed(_with(raw, recompute, micro), machine)

    @cache
    def likely(micro: int) -> float:
        guess = _likely(_with(raw, recompute, micro), machine)
        return needed(micro) if guess is None else guess

    return needed, likely


def _likely(raw: Mapping[str, Any], machine: Machine) -> float | None:
    """About the bytes of the fullest device, by those of the same model with few layers, as each one more needs as
    much. None for a model of few layers, and for one that cannot be without some of its layers."""
    layers = raw["model"]["num_layers"]
    if layers <= 2 * FEW_LAYERS[1]:
        return None
    try:
        few, more = (_needed({**raw, "model": {**raw["model"], "num_layers": each}}, machine) for each in FEW_LAYERS)
    except ValueError:
        return None
    return few + (more - few) * (layers - FEW_LAYERS[0]) / (FEW_LAYERS[1] - FEW_LAYERS[0])


def _share(config: RunConfiguration, machine: Machine) -> int:
    """Sequences of a batch on each rank."""
    layout = plan_layout(config.parallel, machine.world_size, config.model, config.data.seq_len, *config.batches.sizes)
    return max(1, config.batch.sequences // layout.data)


def _needed(raw: Mapping[str, Any], machine: Machine) -> int:
    """Bytes of the fullest device in a step."""
    config = checked(raw)
    layout = plan_layout(config.parallel, machine.world_size, config.model, config.data.seq_len, *config.batches.sizes)
    return estimate(config, layout, device_type=supposed_device(config, machine.world_size)).total


def _with(raw: Mapping[str, Any], recompute: str, micro: int | None) -> dict[str, Any]:
    changed = deepcopy(dict(raw))
    if recompute != "none" or "recompute" in changed.get("parallel", {}):
        changed.setdefault("parallel", {})["recompute"] = recompute
    if micro is not None:
        changed["batch"]["micro_sequences"] = micro
    return changed


def short(number: float) -> str:
    """A number for a name, such as 1.4T or 350M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
