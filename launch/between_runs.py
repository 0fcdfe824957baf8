"""A growth between two runs: decided from a checkpoint, measured, and written as a new one."""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import tomli_w
import torch
import torch.distributed as dist

from growth.context import Context
from growth.evolution import describe, grown_state
from growth.offline import StoredSource, decoders, grown_description, grown_tensors
from growth.operator import find
from growth.plan import Plan, Step, counter, make_plan
from growth.verification import TOLERANCES, compare
from launch.chain import label_of
from launch.config import validated
from launch.growth_arguments import growth_entry
from launch.growth_config import GrowthConfig, policies
from launch.growth_report import summary
from launch.new_checkpoint import PATIENCE, all_processes, draft, refuse_existing, save
from launch.trial import MeshTrial, stored_trial
from runtime.checkpoint.dcp import LazyShard
from runtime.checkpoint.interchange import model_config
from runtime.checkpoint.ranks import Ranks
from runtime.checkpoint.retention import Position
from runtime.checkpoint.store import CheckpointStore
from runtime.checkpoint.unsharded import split
from runtime.config import Config
from runtime.data.tokens import TokenFile
from runtime.inputs import Inputs, resliced
from runtime.model.config import ModelConfig
from runtime.observe.dry_run import supposed_device
from runtime.observe.memory import estimate
from runtime.optim.optimizer import COUNT, Kinds
from runtime.optim.optimizers import STATE_KINDS, has_state
from runtime.origin import Origin, parent_of, read_description
from runtime.parallel.mesh import Layout, plan_layout
from runtime.state import TrainState

SEQUENCES, POSITIONS = 2, 128
"""Of the random tokens on which `--verify logits` compares."""


Probed = dict[str, Any]
"""A trial of a growth: at least {"name", "tokens", "flops"}, as the lineage keeps it."""


@dataclass(frozen=True)
class Chosen:
    """A growth, and the probes by which it was chosen."""

    entry: GrowthConfig
    probes: Sequence[Probed] = ()
    steps: int = 0
    """Of each probe."""


@dataclass(frozen=True)
class Decision:
    """A growth as it is decided, with nothing written yet."""

    plan: Plan
    record: dict[str, Any]
    """What is kept of it, as of `growth.evolution.describe`."""
    state: TrainState
    """After the growth."""
    verify: bool
    carry: str
    """What a run can take over from the grown checkpoint."""


def open_parent(path: str, stack: ExitStack) -> tuple[Origin, StoredSource]:
    """The checkpoint to grow, verified; a collective where there is a process group. ValueError if there is none."""
    ranks = Ranks(timeout=PATIENCE)
    stack.callback(ranks.close)
    location, name = ranks.broadcast(lambda: split(path))
    store = CheckpointStore(location, read_only=True, timeout=PATIENCE)
    stack.callback(store.close)
    name = name or store.newest()
    if name is None:
        raise ValueError(f"there is no complete checkpoint at {path}")
    description = read_description(store, name)
    return Origin(store, location, name, "all", store.hash(name), description), StoredSource(store.open(name))


def optimizer_of(stored: Mapping[str, Any]) -> str:
    """The name of the optimizer whose state a checkpoint with this description has; one that was imported has none."""
    return stored["config"].get("optim", {}).get("name", "adamw")


def kinds_of(stored: Mapping[str, Any]) -> Kinds:
    return STATE_KINDS[optimizer_of(stored)]


def grown_parts(
    plan: Plan, source: StoredSource, stored: Mapping[str, Any], rank: int = 0, size: int = 1
) -> dict[str, list[LazyShard]]:
    """A rank's parts of every tensor of the grown checkpoint of one with this description."""
    has = partial(has_state, optimizer_of(stored))
    return grown_tensors(plan, source, kinds_of(stored), rank, size, has=has)


def chosen_by(arguments: Namespace, steps: Sequence[Step], stored: Mapping[str, Any]) -> Chosen:
    """The growth that the command line asks for, of a checkpoint with this description. ValueError for bad input."""
    known = {key: value for key, value in stored["config"].items() if key in Config.model_fields}
    entry = growth_entry(
        steps,
        at=stored["train"]["clock"]["tokens"],
        run=validated(known, (), arguments.checkpoint) if known and arguments.schedule is not None else None,
        moments=arguments.moments,
        rates=arguments.rates,
        schedule=arguments.schedule,
        verify=arguments.verify,
    )
    return Chosen(entry)


def decide(origin: Origin, source: StoredSource, chosen: Chosen, arguments: Namespace) -> Decision:
    """What becomes of the checkpoint's model and state. ValueError for a growth that cannot be made."""
    stored, entry = origin.description, chosen.entry
    where = f"{origin.location}/{origin.name}"
    before = TrainState.from_json(stored["train"])
    model = model_config(stored["model"], where)
    try:
        source.require(model, kinds_of(stored))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    seed = arguments.seed if arguments.seed is not None else stored["config"].get("run", {}).get("seed", 0)
    trials: list[MeshTrial] = []
    with ExitStack() as stack:
        plan = make_plan(
            model,
            entry.steps,
            moments=entry.moments,
            seed=seed,
            label=label_of(before),
            context=_context(origin, source, seed, stack, trials),
        )
    record = describe(plan, entry.steps, **policies(entry), seq_len=_seq_len(stored, arguments.seq_len))
    state = grown_state(before, plan, record, parent_of(origin), lambda name: counter(plan, name, COUNT, source))
    if plan.seq_len is not None and before.mixture:
        _reslice(state, stored["config"], plan.seq_len)
    if trials:
        record["learning_flops"] = sum(each.flops for each in trials)
        state.flops += record["learning_flops"]
    if chosen.probes:
        state.lineage[-1] |= {"probes": list(chosen.probes), "probe_steps": chosen.steps}
        state.flops += sum(probe["flops"] for probe in chosen.probes)
        clock = {"tokens": state.clock.tokens, "step": state.clock.step, "segment": before.segment}
        state.events.append({"event": "probe", **clock, "steps": chosen.steps, "probes": list(chosen.probes)})
    held = source.held(kinds_of(stored))
    trained = bool(stored["config"]) and any(pattern.startswith("optimizer.") for pattern in held)
    return Decision(plan, record, state, entry.verify == "logits", "all" if trained else "weights")


def _context(origin: Origin, source: StoredSource, seed: int, stack: ExitStack, trials: list[MeshTrial]) -> Context:
    """What operators may look at; the trials they ask for are kept in `trials`."""

    def trial(model: ModelConfig) -> MeshTrial:
        if not dist.is_initialized():
            raise ValueError("learns from batches, which a dry run does not read; with --steps 0 it shows the sizes")
        trials.append(stored_trial(origin.description, source, seed, stack, model))
        return trials[-1]

    def say(line: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(line, file=sys.stderr, flush=True)

    return Context(source.read, trial, seed, say=say)


def _seq_len(stored: dict[str, Any], given: int | None) -> int:
    """The length of the sequences before a growth, which FLOPs per token depend on."""
    known = stored["config"].get("data", {}).get("seq_len") or stored.get("imported", {}).get("seq_len")
    if known is None and given is None:
        raise ValueError("the checkpoint does not say how long its sequences are; give --seq-len")
    if known is not None and given not in (None, known):
        raise ValueError(f"--seq-len {given}: the checkpoint's sequences are of {known} tokens")
    return known or given


def _reslice(state: TrainState, config: dict[str, Any], seq_len: int) -> None:
    """Cut the run's data anew into sequences of another length, from where it stands."""
    try:
        known = {key: value for key, value in config.items() if key in Config.model_fields}
        changed = Config.model_validate(known | {"data": known["data"] | {"seq_len": seq_len}})
        sources = [(TokenFile(each.path), each.weight) for each in changed.data.sources]
    except ValueError as error:
        raise ValueError(f"sequences of {seq_len} tokens are cut from the run's data anew: {error}") from None
    history = resliced(Inputs(Layout(1, 1, 1, 1), sources, {}, None), changed, state.mixture, state.position)
    state.mixture, state.position, state.avoided = history.to_json(), 0, []


def dry_run(arguments: Namespace, steps: Sequence[Step]) -> str:
    """What the growth would be, as text; nothing is written."""
    with ExitStack() as stack:
        origin, source = open_parent(arguments.checkpoint, stack)
        decision = decide(origin, source, chosen_by(arguments, steps, origin.description), arguments)
        sizes = _checkpoint_bytes(decision.plan, source, origin.description)
    record = decision.record | {"checkpoint_bytes": sizes}
    if arguments.world_size is not None:
        record["memory"] = _memory(origin, decision.plan, arguments.world_size)
    return f"{_report(origin, decision, record)}\n\ndry run: nothing is written"


def _checkpoint_bytes(plan: Plan, source: StoredSource, stored: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the tensors of the checkpoint and of the grown one."""
    grown = (part for parts in grown_parts(plan, source, stored).values() for part in parts)
    return source.nbytes, sum(prod(part.sizes) * part.dtype.itemsize for part in grown)


def _memory(origin: Origin, plan: Plan, world_size: int) -> tuple[int, int]:
    """Bytes of the fullest device before and after, in the checkpoint's own run on so many processes."""

    def of(config: Config) -> int:
        layout = plan_layout(config.parallel, world_size, config.model, config.data.seq_len, *config.batches.sizes)
        return estimate(config, layout, device_type=supposed_device(config, world_size)).total

    stored = {key: value for key, value in origin.description["config"].items() if key in Config.model_fields}
    if not stored:
        raise ValueError("--world-size: the checkpoint was imported and belongs to no run, whose memory to estimate")
    try:
        before = Config.model_validate(stored | {"parallel": stored.get("parallel", {}) | {"data_shard": "auto"}})
        data = before.data.model_copy(update={"seq_len": plan.seq_len or before.data.seq_len})
        return of(before), of(before.model_copy(update={"model": plan.target, "data": data}))
    except ValueError as error:
        raise ValueError(f"--world-size {world_size}: {error}") from None


def _report(origin: Origin, decision: Decision, record: dict[str, Any]) -> str:
    """The table of a growth, what it preserves, and what it leaves in the optimizer."""
    plan, state = decision.plan, decision.state
    claims = [f"{name}: {find(name).preserves}" for name, _ in plan.steps]
    lines = [
        f"checkpoint   {origin.location}/{origin.name}, {state.clock.tokens:,} tokens, {state.flops:.4g} FLOPs",
        f"preserves    {'the logits' if plan.preserves else 'not the logits'} ({'; '.join(claims)})",
        f"fresh        numbers by seed {plan.seed}, {plan.label}",
        f"regions      {len(state.regions):,} of {len(plan.maps):,} parameters have entries with an age of their own",
        f"rates        {len(state.rates):,} of {len(plan.maps):,} parameters have a learning rate of their own",
    ]
    if "logits" in record:
        lines.append(f"logits       differ by {record['logits']:.2g} of the largest, on random tokens")
    return summary(None, None, record) + "\n" + "\n".join(f"  {line}" for line in lines)


def grow(arguments: Namespace, steps: Sequence[Step]) -> str:
    """Write the checkpoint that the command line asks for; a collective over torchrun's processes. What was written, as
    text. ValueError as of `grow_by`."""
    with all_processes() as (ranks, stack):
        ranks.broadcast(lambda: refuse_existing(arguments.out))
        origin, source = open_parent(arguments.checkpoint, stack)
        return _write(arguments, lambda: chosen_by(arguments, steps, origin.description), origin, source, ranks)


def grow_by(arguments: Namespace, chosen: Chosen, path: str, ranks: Ranks, stack: ExitStack) -> str:
    """Write the checkpoint at `path` grown in a chosen way, and say what was written; a collective.

    ValueError, on all processes and with nothing left behind, for bad input, for a growth that is to preserve and does
    not, and where it cannot be written.
    """
    ranks.broadcast(lambda: refuse_existing(arguments.out))
    return _write(arguments, lambda: chosen, *open_parent(path, stack), ranks)


def _write(
    arguments: Namespace, choose: Callable[[], Chosen], origin: Origin, source: StoredSource, ranks: Ranks
) -> str:
    decided: list[Decision] = []
    ranks.gather(lambda: decided.append(decide(origin, source, choose(), arguments)))
    (decision,) = decided
    plan, state, record = decision.plan, decision.state, decision.record
    if decision.verify and plan.preserves:
        record = record | ranks.broadcast(lambda: verify(plan, source))
    state.events.append(ranks.broadcast(lambda: _event(state, record)))
    with draft(arguments.out, ranks) as place:
        tensors = grown_parts(plan, source, origin.description, ranks.rank, ranks.size)
        name = str(Position(state.clock.tokens, state.segment))
        save(f"{place}/checkpoints", name, tensors, grown_description(origin.description, plan, state))
    record = record | {"checkpoint_bytes": _checkpoint_bytes(plan, source, origin.description)}
    return f"{_report(origin, decision, record)}\n\n{arguments.out}: {name}\n\n{_preset(arguments.out, decision)}"


def verify(plan: Plan, source: StoredSource) -> dict[str, float]:
    """The difference of the logits before and after, in float32 on random tokens, as a share of the largest.
    ValueError if it is more than rounding."""
    generator = torch.Generator().manual_seed(plan.seed)
    tokens = torch.randint(plan.source.vocab_size, (SEQUENCES, POSITIONS + 1), generator=generator)
    found = compare(*decoders(plan, source), tokens[:, :-1], tokens[:, 1:])
    if not found.is_rounding(torch.float32):
        raise ValueError(
            f"{', '.join(name for name, _ in plan.steps)} was to preserve the logits, but they differ by "
            f"{found.logits:.2g} of the largest (accepted in float32: {TOLERANCES[torch.float32]:g}); nothing is "
            "written, and --verify none would not look"
        )
    return {"logits": found.logits}


def _event(state: TrainState, record: Mapping[str, Any]) -> dict[str, Any]:
    """The growth as an event of the run."""
    clock = {"tokens": state.clock.tokens, "step": state.clock.step, "segment": state.segment}
    return {"event": "growth", **clock, **record, "time": time.time()}


def _preset(out: str, decision: Decision) -> str:
    """The sections of a preset that begin a run from what was written."""
    plan = decision.plan
    data = {} if plan.seq_len is None else {"data": {"seq_len": plan.seq_len}}
    model = plan.target.model_dump(exclude_none=True)
    return tomli_w.dumps({"model": model, **data, "start": {"from": out, "carry": decision.carry}}).rstrip()
