"""What measuring the gradient noise scale costs: time of a step with and without, and bytes that it sends more.

    python benchmarks/noise_scale.py --shape small --pairs 40 --threads 1
    torchrun --nproc-per-node 8 benchmarks/noise_scale.py --shape 0.3B

Parts:

    alone     one process, whose pieces are its micro-batches
    ranks     two processes that shard the model, on one core or GPU each; under torchrun, its own
    traffic   bytes of the collectives of a step on two ranks, counted

A step is the trainer's: forward and backward of each micro-batch, the norm of the gradient, clipping, and AdamW. One
model takes it with and without measuring in turn, in rounds that alternate the order, and the ratio is the median over
rounds of the times of that round, with a bootstrap interval; beside it stands the ratio of the fastest quarters.
One process on one CPU thread is timed by the processor's clock, all else by the wall's.
"""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.architecture import WORLD, Found, Pass, alone, compared, measure, on_ranks
from benchmarks.bench import Shape, arguments, batches, headline, parse, this_device, timed, told, write
from runtime.config import OptimConfig, ParallelConfig
from runtime.data.loader import Batch
from runtime.model.decoder import Decoder
from runtime.observe.memory import fake_world
from runtime.optim.optimizers import build as build_optimizer
from runtime.parallel.mesh import Mesh, plan_layout
from runtime.parallel.mesh import build as build_mesh
from runtime.parallel.parallelize import materialize, parallelize
from runtime.parallel.pieces import Pieces
from runtime.startup import process_group
from runtime.step import train_step

NAME = "measured / not, a step of {}"
WISH = "below 1.01"


class Step:
    """Optimizer steps of a model on a mesh, as the trainer's, with or without measuring."""

    def __init__(self, shape: Shape, mesh: Mesh, micro_batches: int, parallel: ParallelConfig | None = None):
        with torch.device("meta"):
            decoder = Decoder(shape.config())
        parallel = parallel or ParallelConfig(recompute="full" if shape.recompute else "none")
        self.decoder = parallelize(decoder, mesh, parallel)
        materialize(self.decoder, mesh.device, 0)
        self.parameters = list(self.decoder.parameters())
        self.optimizer = build_optimizer(self.decoder, OptimConfig(lr=1e-3))
        self.pieces = Pieces(self.decoder, mesh)
        self.mesh, self.micro_batches = mesh, micro_batches
        self.never = torch.zeros((), device=mesh.device)

    def __call__(self, tokens: Tensor, targets: Tensor, *, is_measured: bool = False) -> None:
        parts = zip(tokens.chunk(self.micro_batches), targets.chunk(self.micro_batches), strict=True)
        result = train_step(
            self.decoder,
            self.parameters,
            [Batch(*part, None) for part in parts],
            judge=lambda loss, norm: self.never,
            update=self.optimizer.step,
            grad_clip=1.0,
            data_group=self.mesh.data_group,
            pieces=self.pieces if is_measured else None,
        )
        assert (result.pieces is not None) == is_measured, "a step is one piece: give it more micro-batches"


class Traffic(TorchDispatchMode):
    """Counts collectives by name, and the bytes of all tensors that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls[func.name()] += 1
            self.bytes += sum(each.nbytes for each in tree_leaves(args) if isinstance(each, Tensor))
        return func(*args, **(kwargs or {}))


def contenders(mesh: Mesh, shape: Shape, micro_batches: int) -> dict[str, Pass]:
    """Steps of one model: two would differ by where they lie in memory, by up to a per cent."""
    step = Step(shape, mesh, micro_batches)
    return {"measured": partial(step, is_measured=True), "not measured": step}


def part_alone(shape: Shape, pairs: int, micro_batches: int) -> dict[str, Found]:
    with process_group(600):
        mesh = build_mesh(plan_layout(ParallelConfig(), 1, shape.config(), shape.seq_len, 1), this_device().type)
        both = contenders(mesh, shape, micro_batches)
        times = measure(both, batches(shape, mesh.device), pairs, alone)
    return {NAME.format("one process"): compared(times, "measured", "not measured", WISH)}


def part_ranks(shape: Shape, pairs: int, micro_batches: int) -> dict[str, Found]:
    if "WORLD_SIZE" in os.environ:
        with process_group(600):
            world = dist.get_world_size()
            layout = plan_layout(ParallelConfig(), world, shape.config(), shape.seq_len, world)
            times = _steps_of_rank(build_mesh(layout, this_device().type), shape, pairs, micro_batches)
    else:
        world, times = WORLD, on_ranks(_steps_of_rank, shape, pairs, micro_batches)
    return {NAME.format(f"{world} processes under FSDP"): compared(times, "measured", "not measured", WISH)}


def _steps_of_rank(mesh: Mesh, shape: Shape, pairs: int, micro_batches: int) -> dict[str, list[float]]:
    return measure(contenders(mesh, shape, micro_batches), batches(shape, mesh.device), pairs, timed)


def part_traffic(shape: Shape, pairs: int, micro_batches: int) -> dict[str, Any]:
    with fake_world(WORLD):
        mesh = build_mesh(plan_layout(ParallelConfig(), WORLD, shape.config(), shape.seq_len, WORLD), "cpu")
        sent = {name: traffic(step, shape) for name, step in contenders(mesh, shape, micro_batches).items()}
    extra = sent["measured"][1] - sent["not measured"][1]
    calls = sum(sent["measured"][0].values()) - sum(sent["not measured"][0].values())
    print(f"a step on {WORLD} ranks sends {extra} bytes more, in {calls} more collectives  wished: at most 64 bytes")
    return {"bytes more a step": extra, "collectives more a step": calls}


def traffic(step: Pass, shape: Shape) -> tuple[Counter[str], int]:
    """Calls and bytes of a step's collectives."""
    batch = next(batches(shape, torch.device("cpu")))
    with Traffic() as counted:
        step(*batch)
    return counted.calls, counted.bytes


PARTS = {"alone": part_alone, "ranks": part_ranks, "traffic": part_traffic}


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, 40, "rounds, each with one step of both")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="all by default; under torchrun, ranks alone")
    parser.add_argument("--micro-batches", type=int, default=2, help="of a rank's step")
    options, shape = parse(parser, argv)
    if options.micro_batches < 1 or shape.batch % options.micro_batches:
        parser.error(f"--micro-batches {options.micro_batches} does not divide a batch of {shape.batch}")
    launched, is_first = "WORLD_SIZE" in os.environ, int(os.environ.get("RANK", 0)) == 0
    say = partial(print, flush=True) if is_first else lambda *_: None
    say(f"{headline(options.shape, shape)}, {options.micro_batches} micro-batches")
    found: dict[str, Any] = {}
    for part in options.parts or (["ranks"] if launched else PARTS):
        measured = PARTS[part](shape, options.pairs, options.micro_batches)
        for name, each in measured.items():
            if isinstance(each, dict):
                say(f"{name}: {told(each)}  wished: {each['wish']}")
        found |= measured
    write(options.json if is_first else None, shape, {"micro_batches": options.micro_batches, "measured": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
