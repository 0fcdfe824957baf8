"""From a configuration to a trainer: everything opened, checked, built, loaded and in its place."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from runtime.checkpoint.interchange import model_config
from runtime.checkpoint.store import CheckpointStore
from runtime.config import Config
from runtime.data.loader import Loader
from runtime.data.mixture import MixtureHistory
from runtime.data.tokenizer import text_fingerprint
from runtime.inputs import Inputs, open_history
from runtime.model.counts import count, flops_per_token
from runtime.model.decoder import Decoder
from runtime.observe.devices import peak
from runtime.observe.identity import SourceIdentity, identity, with_segment
from runtime.observe.jsonl import read_rows
from runtime.observe.metrics import MetricsWriter
from runtime.observe.run_directory import RunDirectory
from runtime.optim.ema import EMA
from runtime.optim.optimizers import build as build_optimizer
from runtime.optim.regions import Regions, prune
from runtime.origin import Origin, is_resume, parent_of, refuse_finished, refuse_late_branch, refuse_merged
from runtime.parallel.mesh import Mesh
from runtime.parallel.parallelize import compute_dtype, materialize, parallelize
from runtime.parts import Parts
from runtime.persistence import Persistence
from runtime.reporting import Reporter
from runtime.resilience.guard import StepGuard
from runtime.resume import has_schedule, refuse_changes, refuse_other_optimizer
from runtime.session import Session, bad_input, open_session
from runtime.startup import agree, read_or_warn
from runtime.state import TrainState
from runtime.timetable import branch_event, build_timetable
from runtime.trainer import Trainer


def restore_state(config: Config, inputs: Inputs, origin: Origin | None) -> tuple[TrainState, MixtureHistory, bool]:
    """Clock, data order, and whether the mixture changes here. ValueError for what may not change on the way."""
    if origin is None:
        return TrainState(), *open_history(inputs, config, {}, 0)
    stored = origin.description
    where = f"checkpoint {origin.name}"
    if origin.carry == "own":
        refuse_changes(stored["config"], config, where)
    elif model_config(stored["model"], where) != config.model:
        raise ValueError(f"start.from: the model in {where} is {stored['model']}, not the one configured")
    if origin.carry == "weights":
        parent = parent_of(origin)
        return TrainState(lineage=[parent], flops=parent["flops"]), *open_history(inputs, config, {}, 0)
    state = TrainState.from_json(stored["train"])
    if origin.carry == "all":
        refuse_merged(origin, where)
        if config.schedule.branch.at is not None and not has_schedule(stored["config"], config):
            refuse_late_branch(state, config)
            state.events = [*state.events, branch_event(state.clock.tokens)]
        refuse_finished(state, config)
        refuse_other_optimizer(stored["config"], config, where)
        state.lineage = [*state.lineage, parent_of(origin)]
        state.segment, state.segment_start = 0, state.clock.tokens
    build_timetable(config, state.events)  # which may not go together, as a remap and an earlier end
    return state, *open_history(inputs, config, state.mixture, state.position)


@contextmanager
def open_trainer(config: Config, config_text: str) -> Iterator[Trainer]:
    """A trainer of a run of one segment, at its newest checkpoint or at its start; a collective. See `open_segment`."""
    with open_session([config], config_text) as session, open_segment(session, from_origin(session)) as trainer:
        yield trainer


@dataclass
class Beginning:
    """How a segment begins: where its state stands, and where its tensors come from.

    `fill` gives the tensors their values, a collective; None for a model's first weights. `changed` tells whether the
    mixture of sources changes here, `resumed` whether the segment goes on from a checkpoint of its own. `announce`
    tells the segment's reporter how it came about.
    """

    segment: int
    state: TrainState
    history: MixtureHistory
    fill: Callable[[Parts], None] | None
    changed: bool = False
    resumed: bool = False
    announce: Callable[[Reporter, TrainState], None] = lambda reporter, state: None


def from_origin(session: Session) -> Beginning:
    """The beginning of a launch: at the checkpoint it found, or new."""
    origin, segment = session.origin, session.segment
    config, inputs = session.configs[segment], session.inputs[segment]
    state, history, changed = agree(lambda: restore_state(config, inputs, origin))
    session.interruption.exit_if_asked()

    def fill(parts: Parts) -> None:
        session.interruption.exit_if_asked()
        session.watchdog.beat(state.clock.step, "loading a checkpoint")
        with bad_input(), session.watchdog.suspended():
            load(parts.persistence, origin)
        session.interruption.exit_if_asked()

    return Beginning(segment, state, history, fill if origin else None, changed, is_resume(origin))


@contextmanager
def open_segment(session: Session, beginning: Beginning) -> Iterator[Trainer]:
    """A trainer of one segment; a collective.

    BadInput, on every rank and before anything is written, for what the user can put right. `SystemExit` with its own
    code if a signal comes before the first step of a launch.
    """
    segment, state, history = beginning.segment, beginning.state, beginning.history
    config, inputs = session.configs[segment], session.inputs[segment]
    with ExitStack() as stack:
        session.watchdog.beat(state.clock.step, "building the model")
        mesh = session.mesh(segment)
        parts = build_parts(config, mesh, session.store, inputs, state, loaded=beginning.fill is not None)
        if beginning.fill is not None:
            beginning.fill(parts)

        agree(lambda: session.lock.acquire(create=True))
        directory = session.directory
        if dist.get_rank() == 0:
            directory.write_config(session.text)
            directory.write_identity(describe(config, inputs, mesh, directory, state, history, session.law))
        reporter = open_reporter(config, mesh, directory, state, resumed=beginning.resumed, started=session.started)
        stack.callback(reporter.close)
        while session.noticed:
            reporter.checkpoint(state, session.noticed.pop(0))
        beginning.announce(reporter, state)
        if beginning.changed:
            state.events.append(reporter.event("mixture_change", state, mixture=history.to_json()["stages"][-1]))
        state.mixture = history.to_json()
        resumed = beginning.resumed
        young = prune(state.births, state.regions, parts.optimizer, state.clock.tokens)
        del beginning  # it holds on to the segment before
        loader = stack.enter_context(
            closing(
                Loader(
                    history,
                    config.data.seq_len,
                    mesh.data_rank,
                    mesh.layout.data,
                    config.model.vocab_size,
                    config.data.document_mask,
                    config.data.prefetch,
                )
            )
        )
        yield Trainer(
            config=config,
            parts=parts,
            timetable=build_timetable(config, state.events),
            regions=Regions(parts.decoder, state.births, young),
            loader=loader,
            held_out=inputs.held_out,
            reporter=reporter,
            interruption=session.interruption,
            watchdog=session.watchdog,
            state=state,
            resumed=resumed,
        )


def build_parts(
    config: Config, mesh: Mesh, store: CheckpointStore, inputs: Inputs, state: TrainState, *, loaded: bool
) -> Parts:
    """The decoder and all that trains it. It has its first weights, or none yet if they are to be `loaded`."""
    with torch.device("meta"):
        decoder = Decoder(config.model)
    parallelize(decoder, mesh, config.parallel)
    if loaded:
        decoder.to_empty(device=mesh.device)
    else:
        materialize(decoder, mesh.device, config.run.seed)
    optim = config.optim
    optimizer = build_optimizer(decoder, optim, state.rates)
    ema = EMA(decoder, optim.ema_half_life) if optim.ema_half_life else None
    guard = StepGuard(config.guard.sigma, config.guard.window, mesh.device)
    persistence = Persistence(config, store, decoder, optimizer, ema, guard, inputs.tokenizer)
    return Parts(mesh, decoder, optimizer, ema, guard, persistence)


def load(persistence: Persistence, origin: Origin) -> None:
    """Fill the tensors from the checkpoint a launch begins from; a collective."""
    if origin.carry == "own":
        persistence.load(origin.name)
    elif origin.carry == "all":
        persistence.branch(origin.store, origin.name, origin.description)
    else:
        persistence.take_weights(origin.store, origin.name, origin.description)


def device_and_precision(config: Config, mesh: Mesh) -> tuple[str, str]:
    """The device's name and the precision it computes in, as run.json and the table of peaks know them."""
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
    bf16 = compute_dtype(config.parallel.precision, mesh.device) == torch.bfloat16
    return device, "bf16" if bf16 else "fp32"


def precision_label(config: Config, precision: str) -> str:
    """The precision as people and tables of runs are told it."""
    recipe = config.parallel.float8
    return precision if recipe == "none" else f"{precision}, float8 {recipe}"


def describe(
    config: Config,
    inputs: Inputs,
    mesh: Mesh,
    directory: RunDirectory,
    state: TrainState,
    history: MixtureHistory,
    law: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The contents of run.json: what is known of the run, and of the segment that begins or goes on."""
    device, precision = device_and_precision(config, mesh)
    contents = identity(
        config,
        sources=[SourceIdentity(each.path, each.fingerprint, each.num_tokens, w) for each, w in inputs.sources],
        evaluation_sets=[
            SourceIdentity(each.file.path, each.file.fingerprint, each.file.num_tokens, name=name)
            for name, each in inputs.held_out.items()
        ],
        order_fingerprint=history.fingerprint,
        tokenizer_fingerprint=text_fingerprint(inputs.tokenizer) if inputs.tokenizer else None,
        parent=next((each for each in reversed(state.lineage) if each["carry"] != "growth"), None),
        previous=read_or_warn(directory.read_identity, {}),
        law=law,
    )
    return with_segment(
        contents,
        state.segment,
        config,
        mesh.layout,
        start_tokens=state.segment_start,
        device=device,
        precision=precision_label(config, precision),
        peak=peak(device, precision),
    )


def open_reporter(
    config: Config, mesh: Mesh, directory: RunDirectory, state: TrainState, *, resumed: bool, started: float
) -> Reporter:
    """The reporter of a launch, which knows what was already evaluated where it begins; a collective."""
    on_record: list[Any] = [None]
    mine = directory if dist.get_rank() == 0 else None
    if mine is not None:
        rows = read_or_warn(lambda: read_rows(mine.path / "evaluations.jsonl"), [])
        here = [row for row in rows if row["tokens"] == state.clock.tokens]
        on_record[0] = [(row["tokens"], row["segment"], row["set"]) for row in here]
    dist.broadcast_object_list(on_record)
    identity = mine.read_identity() if mine is not None else {}
    writer = MetricsWriter(mine, config.observe, resumed_at=state.clock if resumed else None, run=identity)
    flops = flops_per_token(config.model, config.data.seq_len)
    reporter = Reporter(config, mesh, mine, writer, flops, peak(*device_and_precision(config, mesh)), started)
    reporter.restore(state.clock.tokens, map(tuple, on_record[0]))
    begins = "segment_start" if state.segment else "run_start"
    reporter.event("resume" if resumed else begins, state, mesh=asdict(mesh.layout))
    verb = "resumes" if resumed else "goes on" if state.segment else "begins"
    device, precision = device_and_precision(config, mesh)
    end = "goes on until it is stopped" if config.end is None else f"ends at {config.end:,} tokens"
    reporter.console.say(
        f"{config.run.name} {verb} at {state.clock.tokens:,} tokens: {count(config.model).total:,} parameters on "
        f"{dist.get_world_size()} x {device}, {precision_label(config, precision)}; {end}"
    )
    one_piece = mesh.layout.data == 1 and (config.batch.micro_sequences or math.inf) >= config.batch.sequences
    if config.noise_scale.enabled and one_piece:
        reporter.console.say("noise scale: not measured, a batch is one piece (batch.micro_sequences would divide it)")
    return reporter
