"""A checkpoint's sharpness, measured on the mesh of the processes at hand."""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from growth.offline import StoredSource
from launch.between_runs import open_parent
from launch.new_checkpoint import all_processes
from launch.sharpness_report import Findings, Measured, Subject, report
from runtime.assembly import device_and_precision
from runtime.checkpoint.interchange import model_config
from runtime.config import Config
from runtime.curvature import STEP, Curvature
from runtime.data.evaluation_set import EvaluationSet
from runtime.data.loader import Batch, Loader
from runtime.inputs import Inputs, open_history, open_inputs
from runtime.lanczos import Extremes, extremes
from runtime.model.decoder import Decoder
from runtime.optim.adamw import AdamW
from runtime.optim.optimizers import build as build_optimizer
from runtime.optim.regions import prune
from runtime.origin import Origin
from runtime.parallel.mesh import Mesh, build
from runtime.parallel.parallelize import parallelize
from runtime.startup import agree
from runtime.state import TrainState, model_tensors
from runtime.timetable import Settings, build_timetable


@dataclass(frozen=True)
class Opened:
    """A checkpoint on the mesh, and what its run is about to do."""

    config: Config
    state: TrainState
    settings: Settings
    inputs: Inputs
    mesh: Mesh
    decoder: Decoder
    optimizer: AdamW | None
    """With the checkpoint's moments; None where it has none that can be used."""
    lacking: str | None
    """Why there is no optimizer."""


def measure(arguments: Namespace) -> str:
    """The table that `sharpness` prints; a collective over torchrun's processes. ValueError for bad input."""
    with all_processes() as (ranks, stack):
        origin, source = open_parent(arguments.checkpoint, stack)
        opened = _open(origin, source)
        layout, batch = opened.mesh.layout, opened.settings.sequences
        sequences = _sample_size(arguments, batch, layout.data)
        whole, parts = _batches(opened, arguments, sequences, stack)
        curvature = Curvature(opened.decoder, opened.mesh.data_group)

        def say(line: str) -> None:
            if ranks.is_first:
                print(line, file=sys.stderr, flush=True)

        def measured(title: str, root: Tensor | None) -> Measured:
            def of(name: str, batches: Sequence[Batch]) -> Extremes:
                def told(iteration: int, value: float, residual: float) -> None:
                    say(f"{title}, {name}: iteration {iteration}, largest {value:.4g}, residual {residual:.1g}")

                return _extremes(curvature, batches, root, arguments, told)

            found = of(f"{sequences} sequences", whole)
            return Measured(found, [of(f"part {k} of {len(parts)}", each) for k, each in enumerate(parts, 1)])

        plain = measured("Hessian", None)
        preconditioned = None
        if opened.optimizer is not None:
            preconditioned = measured("preconditioned Hessian", curvature.root_scale(opened.optimizer))
        subject = Subject(
            checkpoint=f"{origin.location}/{origin.name}",
            parameters=sum(each.numel() for each in opened.decoder.parameters()),
            processes=layout.world_size,
            device=device_and_precision(opened.config, opened.mesh)[0],
            data=f"held-out set {arguments.held_out}" if arguments.held_out else "the samples to come",
            sequences=sequences,
            seq_len=opened.config.data.seq_len,
            batch=batch,
            lr=opened.settings.lr,
            beta1=opened.config.optim.adam_betas[0],
        )
        return report(subject, Findings(plain, preconditioned, opened.lacking))


def _open(origin: Origin, source: StoredSource) -> Opened:
    """ValueError for a checkpoint of no run, for data that is not where it was, and for a mesh that does not fit."""
    description, where = origin.description, f"{origin.location}/{origin.name}"
    stored = {key: value for key, value in description["config"].items() if key in Config.model_fields}
    if not stored:
        raise ValueError(f"{where} was imported and belongs to no run, whose data its loss could be measured on")
    # Differences of gradients need float32; blocks are compiled for thousands of passes, not for hundreds.
    parallel = stored.get("parallel", {}) | {
        "data_shard": "auto",
        "data_replicate": 1,
        "precision": "fp32",
        "compile": False,
        "float8": "none",
    }
    config = Config.model_validate(stored | {"parallel": parallel, "model": model_config(stored["model"], where)})
    state = TrainState.from_json(description["train"])
    began = state.clock.tokens > state.segment_start
    settings = build_timetable(config, state.events).at(state.clock.tokens - (state.batch_tokens if began else 0))
    inputs = agree(lambda: open_inputs(config, dist.get_world_size()))
    mesh = build(inputs.layout, "cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        decoder = Decoder(config.model)
    parallelize(decoder, mesh, config.parallel)
    decoder.to_empty(device=mesh.device)
    origin.store.load(origin.name, model_tensors(decoder), partial_load=True)
    optimizer, lacking = _optimizer(origin, source, config, state, settings, decoder)
    return Opened(config, state, settings, inputs, mesh, decoder, optimizer, lacking)


def _optimizer(
    origin: Origin, source: StoredSource, config: Config, state: TrainState, settings: Settings, decoder: Decoder
) -> tuple[AdamW | None, str | None]:
    """The optimizer with the checkpoint's second moments and counters, or None and why."""
    if config.optim.name != "adamw":
        return None, f"the preconditioner is AdamW's, and the optimizer is {config.optim.name}"
    optimizer = build_optimizer(decoder, config.optim, state.rates)
    assert isinstance(optimizer, AdamW)
    optimizer.couple(settings.beta2, 1.0)
    tensors = {
        f"optimizer.{name}": each
        for name, each in optimizer.tensors().items()
        if name.endswith((".exp_avg_sq", ".step"))
    }
    if any(source.shape(name) is None for name in tensors):
        return None, "the checkpoint has no state of an optimizer"
    origin.store.load(origin.name, tensors, partial_load=True)
    if not any(each.item() for name, each in tensors.items() if name.endswith(".step")):
        return None, "the optimizer has not taken a step yet"
    if prune(state.births, state.regions, optimizer, state.clock.tokens):
        return None, "a growth has left entries with an age of their own in the optimizer"
    return optimizer, None


def _sample_size(arguments: Namespace, batch: int, data_ranks: int) -> int:
    unit = arguments.batches * data_ranks
    if arguments.sequences is None:
        return -(-2 * batch // unit) * unit
    if arguments.sequences % unit:
        raise ValueError(
            f"--sequences {arguments.sequences} is not a multiple of {unit}: --batches {arguments.batches} parts, each "
            f"shared evenly by {data_ranks} data-parallel ranks"
        )
    return arguments.sequences


def _batches(
    opened: Opened, arguments: Namespace, sequences: int, stack: ExitStack
) -> tuple[Sequence[Batch], list[Sequence[Batch]]]:
    """This rank's micro-batches of the whole sample, and of each of its parts."""
    fetch = _from_held_out if arguments.held_out is not None else _from_training
    of = fetch(opened, arguments, sequences, stack)
    return of(0, 1), [of(k, arguments.batches) for k in range(arguments.batches)]


def _micro_sequences(opened: Opened) -> int:
    config = opened.config.batch
    return config.micro_sequences or config.sequences // opened.mesh.layout.data


def _from_training(
    opened: Opened, arguments: Namespace, sequences: int, stack: ExitStack
) -> Callable[[int, int], Sequence[Batch]]:
    """Part k of n of the samples that the run would train on next."""
    config, state, mesh = opened.config, opened.state, opened.mesh
    history, _ = agree(lambda: open_history(opened.inputs, config, state.mixture, state.position))
    loader = Loader(
        history,
        config.data.seq_len,
        mesh.data_rank,
        mesh.layout.data,
        config.model.vocab_size,
        config.data.document_mask,
        prefetch=0,
    )
    stack.enter_context(closing(loader))
    first, micro = state.next_position(sequences), _micro_sequences(opened)

    def part(k: int, n: int) -> Sequence[Batch]:
        return agree(lambda: loader.batch(first + k * (sequences // n), sequences // n, micro))

    return part


def _from_held_out(
    opened: Opened, arguments: Namespace, sequences: int, stack: ExitStack
) -> Callable[[int, int], Sequence[Batch]]:
    """Part k of n of windows evenly spaced over a held-out set. ValueError for a set that is not there or too small."""
    config, mesh = opened.config, opened.mesh
    known = {each.name: each.path for each in config.evaluation.sets}
    if arguments.held_out not in known:
        raise ValueError(f"--held-out {arguments.held_out}: the run has {', '.join(known) or 'no held-out sets'}")
    windows = agree(
        lambda: EvaluationSet(
            known[arguments.held_out],
            config.data.seq_len,
            config.model.vocab_size,
            max_sequences=sequences,
            document_mask=config.data.document_mask,
        )
    )
    if windows.num_sequences < sequences:
        raise ValueError(
            f"--held-out {arguments.held_out}: the set has {windows.num_sequences} sequences of "
            f"{config.data.seq_len} tokens, and the sample is to have {sequences}; give fewer --sequences"
        )
    size, micro = mesh.layout.data, _micro_sequences(opened)

    def part(k: int, n: int) -> Sequence[Batch]:
        return agree(lambda: list(windows.batches(k * size + mesh.data_rank, n * size, micro)))

    return part


def _extremes(
    curvature: Curvature,
    batches: Sequence[Batch],
    root: Tensor | None,
    arguments: Namespace,
    progress: Callable[[int, float, float], None],
) -> Extremes:
    """Of the Hessian of a batch's loss, or of R H R for a diagonal R. Its residuals are those of differences twice as
    fine, so that they show what the differences leave as well."""

    def product(vector: Tensor, step: float = STEP) -> Tensor:
        if root is None:
            return curvature.product(batches, vector, step)
        return curvature.product(batches, root * vector, step).mul_(root)

    return extremes(
        product,
        curvature.start(arguments.seed),
        iterations=arguments.iterations,
        tolerance=arguments.tolerance,
        total=curvature.total,
        check=lambda vector: product(vector, STEP / 2),
        progress=progress,
    )
