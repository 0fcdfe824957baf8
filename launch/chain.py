"""A run as a chain of segments: train one, grow its state in memory, train the next."""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from growth.context import Context, Trial
from growth.evolution import decided, describe, grown_state
from growth.plan import Plan, Target, counter, make_plan, transfer
from growth.verification import TOLERANCES, compare
from launch.growth_config import GrowthConfig, RunConfiguration, policies, segments
from launch.growth_report import summary
from launch.trial import MeshTrial, make_trial, upcoming
from runtime.assembly import Beginning, from_origin, open_segment
from runtime.config import Config
from runtime.data.loader import Batch
from runtime.data.mixture import MixtureHistory
from runtime.inputs import Inputs, open_history, resliced
from runtime.model.config import ModelConfig
from runtime.optim.optimizer import COUNT
from runtime.optim.optimizers import STATE_KINDS
from runtime.parallel.parallelize import compute_dtype
from runtime.parallel.shards import gather_whole, local, local_indices
from runtime.parts import Parts
from runtime.persistence import checkpoint_location, checkpoint_name
from runtime.reporting import Reporter
from runtime.session import Session, open_session
from runtime.startup import BadInput, agree
from runtime.state import TrainState
from runtime.trainer import Outcome, Trainer

MOST_POSITIONS = 512
"""Positions of a sequence whose logits are compared."""


class GrowthRefused(Exception):
    """A growth that was to preserve the model's function does not."""


class GrowthHalted(Exception):
    """The ranks have agreed to stop while an operator learns; the argument is the outcome."""


def run(config: RunConfiguration, text: str) -> Outcome:
    """One launch of a run, through as many segments as it reaches; a collective. BadInput as of `open_segment`."""
    refuse_other_texts(text)
    with ExitStack() as launch:
        session = launch.enter_context(open_session(segments(config), text, config.law_record))
        refuse_other_growths(config, session)
        stack = launch.enter_context(ExitStack())
        trainer = stack.enter_context(open_segment(session, from_origin(session)))
        while True:
            entry = next(iter(config.growth[trainer.state.segment :]), None)
            trainer.grows_at = entry.at if entry else None
            outcome = trainer.run()
            if outcome is not Outcome.GROWS:
                return outcome
            following = launch.enter_context(ExitStack())
            try:
                grown = following.enter_context(open_segment(session, growing(session, trainer, entry)))
            except GrowthHalted as halt:
                return trainer.end_with(*halt.args)
            except GrowthRefused as refusal:
                trainer.reporter.console.say(f"the growth is given up: {refusal}")
                trainer.reporter.event("growth_refused", trainer.state, reason=str(refusal))
                return trainer.end_with(Outcome.REFUSED)
            stack.close()
            stack, trainer = following, grown
            del grown
            torch.compiler.reset()  # one code object holds few graphs, and a segment has its own
            gc.collect()  # modules and their hooks refer to each other; the old ones' memory is wanted now
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def refuse_other_texts(text: str) -> None:
    """BadInput if the processes are about to train by different configurations; a collective. A preset may be another
    on another machine, and a run may save a newer checkpoint while its branches are being started."""
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    other = next((rank for rank, each in enumerate(texts) if each != texts[0]), None)
    if other is not None:
        raise BadInput(
            f"ranks 0 and {other} read different configurations; give both the same file, and of a run that is being "
            "trained the checkpoint by its folder"
        )


def refuse_other_growths(config: RunConfiguration, session: Session) -> None:
    """BadInput if the run has grown otherwise than its configuration now says."""
    if session.segment == 0:
        return
    grown = [each for each in session.origin.description["train"]["events"] if each["event"] == "growth"]
    for number, (event, entry) in enumerate(zip(grown[-session.segment :], config.growth, strict=False)):
        configured = {"at": entry.at, "operators": decided(entry.steps), **policies(entry)}
        for key, now in configured.items():
            if event.get(key, now) != now:  # an older record lacks some
                raise BadInput(
                    f"growth.{number}: {key} is {now!r}, but the run has grown with {event[key]!r}; put it back, or "
                    "begin a new run from a checkpoint of before, with another run.name and start.from"
                )


def growing(session: Session, trainer: Trainer, entry: GrowthConfig) -> Beginning:
    """The beginning of the next segment: the trainer's state, grown. The trainer stays as it is until then.

    BadInput for a growth that cannot be made; filling its tensors raises `GrowthRefused` for one that was to preserve
    and does not.
    """

    def beat() -> None:
        session.watchdog.beat(trainer.state.clock.step, "growing")

    beat()
    before, segment = trainer.state, trainer.state.segment + 1
    config = session.configs[segment]
    source = LiveSource(trainer.parts.persistence.tensors(), beat)
    chosen = policies(entry)
    parent = {"checkpoint": f"{checkpoint_location(config)}/{checkpoint_name(before)}", "run": config.run.name}

    def decide() -> tuple[Plan, dict[str, Any], TrainState, MixtureHistory]:
        plan, spent = plan_growth(session, trainer, entry, source)
        record = {"at": entry.at, **describe(plan, entry.steps, **chosen, seq_len=trainer.config.data.seq_len)}
        state = grown_state(before, plan, record, parent, lambda name: counter(plan, name, COUNT, source))
        if spent:
            record["learning_flops"] = spent
            state.flops += spent
        return plan, record, state, continued(session.inputs[segment], config, state)

    plan, record, state, history = agree(decide)
    gc.collect()  # what operators tried their maps on
    measured: dict[str, Any] = {"bytes_before": held(trainer.parts)}

    def fill(parts: Parts) -> None:
        transfer(plan, targets(parts), source, STATE_KINDS[config.optim.name])
        measured["bytes_after"] = held(parts)
        beat()
        if entry.verify == "logits":
            measured.update(verify(trainer, parts, plan))
        source.close()

    def announce(reporter: Reporter, state: TrainState) -> None:
        state.lineage[-1]["hash"] = session.store.hash_of_saved(checkpoint_name(before))
        state.events.append(reporter.event("growth", state, **record, **measured))
        reporter.growth(state, summary(session.configs[segment - 1], config, record | measured), record["after"])

    return Beginning(segment, state, history, fill, announce=announce)


def label_of(state: TrainState) -> str:
    """The name of a state's next growth, which no other of its ancestry has: what it draws is its own."""
    return f"growth-{len(state.births)}-at-{state.clock.tokens}"


def plan_growth(session: Session, trainer: Trainer, entry: GrowthConfig, source: "LiveSource") -> tuple[Plan, int]:
    """The plan, and the FLOPs that operators spent on learning; maybe a collective. ValueError, naming the entry, for
    an operator that cannot be applied."""
    state, config = trainer.state, trainer.config
    number, sequences = state.segment, trainer.sequences
    trials: list[MeshTrial] = []

    def fetch(first_sample: int) -> Sequence[Batch]:
        session.watchdog.beat(state.clock.step, "learning a growth")
        if outcome := trainer.halted():
            raise GrowthHalted(outcome)
        return trainer.fetch(first_sample)

    def trial(model: ModelConfig) -> Trial:
        batches = upcoming(fetch, state, sequences)
        trials.append(make_trial(config, session.mesh(number), source, batches, sequences, model))
        return trials[-1]

    try:
        plan = make_plan(
            config.model,
            entry.steps,
            moments=entry.moments,
            seed=config.run.seed,
            label=label_of(state),
            context=Context(source.read, trial, config.run.seed, say=trainer.reporter.console.say),
        )
    except ValueError as error:
        raise ValueError(f"growth.{number}: {error}") from None
    return plan, sum(each.flops for each in trials)


def continued(inputs: Inputs, config: Config, state: TrainState) -> MixtureHistory:
    """The order of samples after a growth: as it was, or cut anew where the sequences have another length."""
    if state.mixture["seq_len"] == config.data.seq_len:
        return open_history(inputs, config, state.mixture, state.position)[0]
    history = resliced(inputs, config, state.mixture, state.position)
    state.position, state.avoided = 0, []
    return history


def targets(parts: Parts) -> Iterator[Target]:
    """This rank's part of every tensor that a growth fills; the guard begins empty."""
    indices: dict[Any, list[Tensor]] = {}
    for name, tensor in parts.persistence.tensors().items():
        if name.startswith("guard."):
            continue
        alike = tensor.shape, getattr(tensor, "placements", None)
        if alike not in indices:
            indices[alike] = local_indices(tensor)
        yield Target(name, local(tensor.detach()), indices[alike])


def held(parts: Parts) -> int:
    """Bytes of weights, averages and optimizer state on this rank."""
    return sum(local(each).nbytes for each in parts.persistence.tensors().values())


def verify(trainer: Trainer, parts: Parts, plan: Plan) -> dict[str, float]:
    """Compare the models before and after on a sequence of the batch to come; a collective. GrowthRefused if the plan
    was to preserve and what lies between them is more than rounding."""
    state, config = trainer.state, trainer.config
    first_sample = state.next_position(trainer.sequences)
    batch = trainer.fetch(first_sample, micro_sequences=1)[0].to(parts.mesh.device)
    length = min(batch.tokens.shape[1], MOST_POSITIONS)
    length -= length % math.lcm(trainer.mesh.layout.tensor, parts.mesh.layout.tensor)
    # The two meshes may divide the data differently, so every rank takes the first one's sequence.
    tokens, targets = (each[:1, :length].contiguous() for each in (batch.tokens, batch.targets))
    for each in (tokens, targets):
        dist.broadcast(each, 0)
    found = compare(trainer.decoder, parts.decoder, tokens, targets, dist.group.WORLD)
    precision = compute_dtype(config.parallel.precision, parts.mesh.device)
    if plan.preserves and not found.is_rounding(precision):
        raise GrowthRefused(
            f"{', '.join(name for name, _ in plan.steps)} was to preserve the logits, but they differ by "
            f"{found.logits:.2g} of the largest (accepted in {precision}: {TOLERANCES[precision]:g})"
        )
    return found._asdict()


class LiveSource:
    """The tensors of a running segment as a `growth.transfer.Source`: one at a time is gathered, and kept until the
    next is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], beat: Callable[[], None] = lambda: None):
        """`beat` is called with each tensor, so that a growth of many shows that it makes progress."""
        self._tensors, self._beat = dict(tensors), beat
        self._gathered: tuple[str, Tensor] | None = None

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._tensors[name].shape) if name in self._tensors else None

    def box(self, name: str, bounds: Sequence[tuple[int, int]]) -> Tensor:
        self._beat()
        if self._gathered is None or self._gathered[0] != name:
            self._gathered = None
            self._gathered = name, gather_whole(self._tensors[name])
        box = self._gathered[1]
        for dim, (first, end) in enumerate(bounds):
            box = box.narrow(dim, first, end - first)
        return box

    def read(self, parameter: str) -> Tensor:
        """A whole weight in float64 on the host; a collective."""
        self._beat()
        return gather_whole(self._tensors[f"model.{parameter}"]).double().cpu()

    def close(self) -> None:
        """Let go of everything: the segment that was grown ends here."""
        self._tensors, self._gathered = {}, None
