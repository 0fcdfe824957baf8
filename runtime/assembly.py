"""From a configuration to a trainer: everything opened, checked, built, loaded and in its place."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from runtime.checkpoint.store import CheckpointStore
from runtime.config import Config
from runtime.data.evaluation_set import EvaluationSet
from runtime.data.loader import Loader
from runtime.data.mixture import MixtureHistory
from runtime.data.tokenizer import load as load_tokenizer
from runtime.data.tokenizer import text_fingerprint
from runtime.data.tokens import TokenFile
from runtime.lock import RunLock
from runtime.model.counts import count, flops_per_token
from runtime.model.decoder import Decoder
from runtime.observe.devices import peak
from runtime.observe.identity import SourceIdentity, identity, with_segment
from runtime.observe.jsonl import read_rows
from runtime.observe.metrics import MetricsWriter, check_available
from runtime.observe.run_directory import RunDirectory
from runtime.optim.adamw import build as build_optimizer
from runtime.optim.ema import EMA
from runtime.optim.groups import parameter_groups
from runtime.origin import Origin, find_origin, is_resume, parent_of, refuse_finished
from runtime.parallel.mesh import Layout, Mesh, build, plan_layout
from runtime.parallel.parallelize import compute_dtype, materialize, parallelize
from runtime.persistence import Persistence, checkpoint_location
from runtime.reporting import Reporter
from runtime.resilience.guard import StepGuard
from runtime.resilience.signals import Interruption
from runtime.resilience.watchdog import Watchdog
from runtime.resume import refuse_changes
from runtime.startup import BadInput, agree, read_or_warn
from runtime.state import TrainState
from runtime.trainer import Trainer
from schedulers.learning_rate import build as build_schedule


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked, before a process has built or written anything."""

    layout: Layout
    sources: list[tuple[TokenFile, float]]
    held_out: dict[str, EvaluationSet]
    tokenizer: str | None


def open_inputs(config: Config, world_size: int) -> Inputs:
    """ValueError naming the first key or file that cannot be used."""
    check_available(config.observe)
    data, vocab_size = config.data, config.model.vocab_size
    layout = plan_layout(config.parallel, world_size, config.model, data.seq_len, config.batch.sequences)
    sources = [(TokenFile(each.path), each.weight) for each in data.sources]
    for source, _ in sources:
        source.check_vocabulary(vocab_size)
    held_out = {
        each.name: EvaluationSet(
            each.path,
            data.seq_len,
            vocab_size,
            max_sequences=config.evaluation.max_sequences,
            document_mask=data.document_mask,
        )
        for each in config.evaluation.sets
    }
    MixtureHistory(sources, config.run.seed, data.seq_len)
    return Inputs(layout, sources, held_out, read_tokenizer(config))


def read_tokenizer(config: Config) -> str | None:
    """Text of the tokenizer.json that the configuration names, or that lies beside the first source."""
    named = config.data.tokenizer
    path = Path(named) if named else Path(config.data.sources[0].path).parent / "tokenizer.json"
    if named is None and not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.tokenizer: cannot read {path}: {error}") from None
    load_tokenizer(path)
    return text


def open_history(inputs: Inputs, config: Config, saved: dict[str, Any], position: int) -> tuple[MixtureHistory, bool]:
    """The run's mixture over time, and whether it changes here.

    `saved` is the history of a loaded checkpoint, empty for a new run. Files may have moved: they are known by their
    fingerprints. ValueError if the sources differ from those in force and `data.on_change` does not allow it.
    """
    if not saved:
        return MixtureHistory(inputs.sources, config.run.seed, config.data.seq_len), False
    if (saved["seq_len"], saved["seed"]) != (config.data.seq_len, config.run.seed):
        raise ValueError(
            f"data.seq_len = {config.data.seq_len} and run.seed = {config.run.seed}, but the order of samples to go on "
            f'with has {saved["seq_len"]} and {saved["seed"]}; keep them, or set start.carry = "weights"'
        )
    at_hand = {source.fingerprint: source for source, _ in inputs.sources}
    was = {each["path"]: each["fingerprint"] for stage in saved["stages"] for each in stage["sources"]}
    history = MixtureHistory.from_json(saved, lambda path: at_hand.get(was[path]))
    renewed = MixtureHistory(inputs.sources, config.run.seed, config.data.seq_len).to_json()["stages"][0]["sources"]
    in_force = saved["stages"][-1]["sources"]
    if _mixture(renewed) == _mixture(in_force):
        return history, False
    if config.data.on_change == "refuse":
        raise ValueError(
            f"data.sources are {_told(renewed)}, but the run was trained on {_told(in_force)}; put them back, or set "
            'data.on_change = "switch" to change the mixture from here on'
        )
    history.change(position, inputs.sources)
    return history, True


def _mixture(sources: list[dict[str, Any]]) -> list[tuple[str, Fraction]]:
    """What decides the order of samples: neither the listing's order nor the weights' scale does."""
    total = sum(Fraction(each["weight"]) for each in sources)
    return sorted((each["fingerprint"], Fraction(each["weight"]) / total) for each in sources)


def _told(sources: list[dict[str, Any]]) -> str:
    return ", ".join(f"{each['path']} x {each['weight']} ({each['fingerprint'][:8]})" for each in sources)


def restore_state(config: Config, inputs: Inputs, origin: Origin | None) -> tuple[TrainState, MixtureHistory, bool]:
    """Clock, data order, and whether the mixture changes here. ValueError for what may not change on the way."""
    if origin is None:
        return TrainState(), *open_history(inputs, config, {}, 0)
    stored = origin.description
    where = f"checkpoint {origin.name}"
    if origin.carry == "own":
        refuse_changes(stored["config"], config, where)
    elif stored["model"] != config.model.model_dump(mode="json"):
        raise ValueError(f"start.from: the model in {where} is {stored['model']}, not the one configured")
    if origin.carry == "weights":
        parent = parent_of(origin)
        return TrainState(lineage=[parent], flops=parent["flops"]), *open_history(inputs, config, {}, 0)
    state = TrainState.from_json(stored["train"])
    if origin.carry == "all":
        refuse_finished(state, config)
        state.lineage = [*state.lineage, parent_of(origin)]
    return state, *open_history(inputs, config, state.mixture, state.position)


@contextmanager
def open_trainer(config: Config, config_text: str) -> Iterator[Trainer]:
    """A trainer at the newest checkpoint of its run, or at the start of a new one; a collective.

    BadInput, on every rank and before anything is written, for what the user can put right. `config_text` is the
    configuration as the run directory keeps it.
    `SystemExit` with its own code if a signal comes before the first step.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        watchdog = stack.enter_context(Watchdog(config.run.timeout_seconds))
        inputs = agree(lambda: open_inputs(config, dist.get_world_size()))
        torch.use_deterministic_algorithms(config.run.deterministic)
        mesh = build(inputs.layout, "cuda" if torch.cuda.is_available() else "cpu")
        directory = RunDirectory(Path(config.run.dir) / config.run.name)
        lock = stack.enter_context(closing(RunLock(directory.path)))
        agree(lambda: lock.acquire(create=False))
        watchdog.beat(0, "looking for checkpoints")
        with bad_input(), watchdog.suspended():
            location = checkpoint_location(config)
            noticed: list[dict[str, Any]] = []
            store = CheckpointStore(location, on_event=noticed.append)
            stack.callback(store.close)
            origin = find_origin(config, directory, location, store, stack)
        state, history, changed = agree(lambda: restore_state(config, inputs, origin))
        interruption.exit_if_asked()

        watchdog.beat(state.clock.step, "building the model")
        decoder, persistence, parts = build_parts(config, mesh, store, inputs, loaded=origin is not None)
        interruption.exit_if_asked()
        if origin is not None:
            watchdog.beat(state.clock.step, "loading a checkpoint")
            with bad_input(), watchdog.suspended():
                load(persistence, origin)
        interruption.exit_if_asked()

        agree(lambda: lock.acquire(create=True))
        if dist.get_rank() == 0:
            directory.write_config(config_text)
            directory.write_identity(describe(config, inputs, mesh, directory, state, history, origin))
        reporter = open_reporter(config, mesh, directory, state, resumed=is_resume(origin), started=started)
        stack.callback(reporter.close)
        for event in noticed:
            reporter.checkpoint(state, event)
        if changed:
            state.events.append(reporter.event("mixture_change", state, mixture=history.to_json()["stages"][-1]))
        state.mixture = history.to_json()
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
            mesh=mesh,
            decoder=decoder,
            persistence=persistence,
            loader=loader,
            held_out=inputs.held_out,
            reporter=reporter,
            interruption=interruption,
            watchdog=watchdog,
            state=state,
            resumed=is_resume(origin),
            **parts,
        )


@contextmanager
def bad_input() -> Iterator[None]:
    """What a collective on checkpoints refuses, it refuses on every rank."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error)) from error


def build_parts(
    config: Config, mesh: Mesh, store: CheckpointStore, inputs: Inputs, loaded: bool
) -> tuple[Decoder, Persistence, dict[str, Any]]:
    """The decoder, what is kept of it, and all that trains it by `Trainer`'s field names. It has its first weights,
    or none yet if they are to be `loaded`."""
    with torch.device("meta"):
        decoder = Decoder(config.model)
    parallelize(decoder, mesh, config.parallel)
    if loaded:
        decoder.to_empty(device=mesh.device)
    else:
        materialize(decoder, mesh.device, config.run.seed)
    optim, schedule = config.optim, config.schedule
    optimizer = build_optimizer(parameter_groups(decoder, optim.weight_decay), optim)
    ema = EMA(decoder, optim.ema_half_life) if optim.ema_half_life else None
    guard = StepGuard(config.guard.sigma, config.guard.window, mesh.device)
    persistence = Persistence(config, store, decoder, optimizer, ema, guard, inputs.tokenizer)
    rate = build_schedule(
        schedule.kind,
        peak=optim.lr,
        warmup=schedule.warmup,
        horizon=schedule.horizon,
        decay=schedule.decay,
        tail=schedule.tail,
        final=schedule.final,
    )
    return decoder, persistence, {"optimizer": optimizer, "ema": ema, "guard": guard, "schedule": rate}


def load(persistence: Persistence, origin: Origin) -> None:
    """Fill the tensors from the checkpoint a launch begins from; a collective."""
    if origin.carry == "own":
        persistence.load(origin.name)
    elif origin.carry == "all":
        persistence.branch(origin.store, origin.name, origin.description)
    else:
        persistence.take_weights(origin.store, origin.name)


def device_and_precision(config: Config, mesh: Mesh) -> tuple[str, str]:
    """The device's name and the precision it computes in, as run.json and the table of peaks know them."""
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
    bf16 = compute_dtype(config.parallel.precision, mesh.device) == torch.bfloat16
    return device, "bf16" if bf16 else "fp32"


def describe(
    config: Config,
    inputs: Inputs,
    mesh: Mesh,
    directory: RunDirectory,
    state: TrainState,
    history: MixtureHistory,
    origin: Origin | None,
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
        parent=state.lineage[-1] if state.lineage else None,
        previous=read_or_warn(directory.read_identity, {}),
    )
    begun = [each["start_tokens"] for each in contents["segments"] if each["index"] == state.segment]
    return with_segment(
        contents,
        state.segment,
        config,
        mesh.layout,
        start_tokens=begun[0] if begun and is_resume(origin) else state.clock.tokens,
        device=device,
        precision=precision,
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
        on_record[0] = [(row["tokens"], row["set"]) for row in rows if row["tokens"] == state.clock.tokens]
    dist.broadcast_object_list(on_record)
    identity = mine.read_identity() if mine is not None else {}
    writer = MetricsWriter(mine, config.observe, resumed_at=state.clock if resumed else None, run=identity)
    flops = flops_per_token(config.model, config.data.seq_len)
    reporter = Reporter(config, mesh, mine, writer, flops, peak(*device_and_precision(config, mesh)), started)
    reporter.restore(state.skipped, map(tuple, on_record[0]))
    reporter.event("resume" if resumed else "run_start", state, mesh=asdict(mesh.layout))
    verb = f"resumes at {state.clock.tokens:,} tokens" if resumed else f"begins at {state.clock.tokens:,} tokens"
    device, precision = device_and_precision(config, mesh)
    reporter.console.say(
        f"{config.run.name} {verb}: {count(config.model).total:,} parameters on {dist.get_world_size()} "
        f"x {device}, {precision}; ends at {config.run.until or config.schedule.horizon:,} tokens"
    )
    return reporter
