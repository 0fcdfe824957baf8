"""What the options of the architecture cost: time of a step with and without each, and memory of tied models.

    python benchmarks/architecture.py --shape small --pairs 20 --threads 1
    python benchmarks/architecture.py --parts norm_scaling mup own_norms --pairs 100 --threads 1
    python benchmarks/architecture.py --parts fsdp memory

Parts:

    tied      half as many blocks, each used twice, against the untied model of the same depth, one process
    streams   forward and backward of the blocks with P streams, against P times those of one stream
    prefix    padding the queries by the prefix's length, against our attention (prefix_attention.py), on a CPU
    norm_scaling, mup, own_norms    each option against the same model without
    fsdp      as tied, on two processes that shard the model, on one core each
    memory    bytes of parameters, gradients and moments that a rank holds on two processes, by blocks of one depth

A step is tokens to loss, backward, norm and clipping of the gradient, and AdamW, as the trainer's. What is compared
takes steps in turn in one process, in rounds that alternate the order, and a ratio is the median over rounds of the
times of that round, with a bootstrap interval; beside it stands the ratio of each one's fastest quarter of steps. One
process on one CPU thread is timed by the processor's clock, all else by the wall's.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import prefix_attention
from benchmarks.bench import (
    Shape,
    arguments,
    batches,
    headline,
    parse,
    ratio,
    this_device,
    timed,
    told,
    undisturbed,
    write,
)
from runtime.config import OptimConfig, ParallelConfig
from runtime.host_memory import keep_freed_memory
from runtime.model.config import ModelConfig
from runtime.model.decoder import Decoder
from runtime.model.initialization import initialize
from runtime.model.rotary import rotary_table
from runtime.optim.optimizers import build as build_optimizer
from runtime.parallel.gradients import gradient_norm, scale_gradients
from runtime.parallel.mesh import Mesh, plan_layout
from runtime.parallel.mesh import build as build_mesh
from runtime.parallel.parallelize import materialize, parallelize
from runtime.parallel.shards import local

OPTIONS = "norm_scaling", "mup", "own_norms"
BUILDS = 5
"""Of the two models of an option: where they lie in memory makes even equal ones differ by up to a per cent."""
LOOPS = 2
STREAMS = (2, 4)
PREFIX_LENGTH = 256
WORLD = 2
WARMUP = 3
Pass = Callable[[Tensor, Tensor], Any]
"""What is timed, given tokens and targets [b, s]."""
Found = dict[str, Any]
"""Of one comparison: the ratio with its interval, what was wished for, and all seconds."""


def changed(shape: Shape, **options: Any) -> ModelConfig:
    """The model of a shape, with these of its options."""
    return ModelConfig(**shape.config().model_dump() | options)


def tied(shape: Shape, loops: int = LOOPS, **options: Any) -> ModelConfig:
    return changed(shape, tying={"plan": "cycle", "loops": loops, **options} if loops > 1 else {})


def with_mup(shape: Shape) -> ModelConfig:
    """A base of half the width, so that no multiplier is 1."""
    base = {"base_hidden_size": shape.hidden_size // 2, "base_intermediate_size": shape.intermediate_size // 2}
    heads = {"base_num_heads": max(shape.num_heads // 2, 1), "base_head_dim": shape.config().head_dim}
    return changed(shape, parametrization={"kind": "mup", **base, **heads})


class Step:
    """One optimizer step of a model, as the trainer's."""

    def __init__(self, config: ModelConfig, device: torch.device, mesh: Mesh | None = None):
        if mesh is None:
            self.decoder = Decoder(config).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
            initialize(self.decoder, 0)
        else:
            with torch.device("meta"):
                decoder = Decoder(config)
            self.decoder = parallelize(decoder, mesh, ParallelConfig())
            materialize(self.decoder, device, 0)
        self.world = mesh.layout.world_size if mesh is not None else 1
        self.parameters = [each for each in self.decoder.parameters() if each.requires_grad]
        self.optimizer = build_optimizer(self.decoder, OptimConfig(lr=1e-3))

    def gradients(self, tokens: Tensor, targets: Tensor) -> None:
        (self.decoder(tokens, targets).total / (self.world * targets.numel())).backward()

    def __call__(self, tokens: Tensor, targets: Tensor) -> None:
        self.gradients(tokens, targets)
        scale_gradients(self.parameters, gradient_norm(self.parameters), 1.0)
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None


class Blocks:
    """Forward and backward of the blocks alone, from a stream [P * b, s, hidden]."""

    def __init__(self, config: ModelConfig, device: torch.device):
        self.decoder = Decoder(config).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        initialize(self.decoder, 0)

    def __call__(self, tokens: Tensor, targets: Tensor) -> None:
        decoder, config = self.decoder, self.decoder.config
        x = decoder.embedding(tokens).detach().repeat(config.streams.count, 1, 1).requires_grad_()
        cos, sin = rotary_table(0, tokens.shape[1], config.head_dim, config.rope_theta, tokens.device, x.dtype)
        uses = decoder.uses(config.num_layers, tokens.device)
        y = decoder.blocks(x, decoder.route(None, wants_exits=False), uses, cos, sin, None).x
        y.backward(torch.ones_like(y))
        for parameter in decoder.parameters():
            parameter.grad = None


def measure(
    contenders: dict[str, Pass],
    source: Iterator[tuple[Tensor, Tensor]],
    rounds: int,
    timer: Callable[[Pass, tuple[Tensor, Tensor]], float] = timed,
) -> dict[str, list[float]]:
    """Seconds of each contender, in turn, after a few rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-WARMUP, rounds):
        batch = next(source)
        for name in contenders if turn % 2 == 0 else reversed(contenders):
            seconds = timer(contenders[name], batch)
            if turn >= 0:
                times[name].append(seconds)
    return times


def alone(step: Callable[..., Any], batch: tuple[Tensor, ...] = ()) -> float:
    """Seconds of a step of one process: on one CPU thread the processor's, which other work hardly lengthens."""
    if torch.cuda.is_available() or torch.get_num_threads() > 1:
        return timed(step, batch)
    start = time.process_time()
    step(*batch)
    return time.process_time() - start


def compared(times: dict[str, list[float]], above: str, below: str, wish: str, per: int = 1) -> Found:
    """The time of one contender over `per` times that of another."""
    base = [per * each for each in times[below]]
    return {
        "ratio": ratio(base, times[above]),
        "undisturbed": undisturbed(base, times[above]),
        "wish": wish,
        "seconds": times,
    }


def part_tied(shape: Shape, device: torch.device, pairs: int) -> dict[str, Found]:
    contenders = {"untied": Step(shape.config(), device), "tied": Step(tied(shape), device)}
    times = measure(contenders, batches(shape, device), pairs, alone)
    return {"tied / untied, a step of one process": compared(times, "tied", "untied", "at most 1.03")}


def part_streams(shape: Shape, device: torch.device, pairs: int) -> dict[str, Found]:
    found = {}
    for count in STREAMS:
        one, several = shape.config(), changed(shape, streams={"count": count})
        contenders = {"one": Blocks(one, device), "several": Blocks(several, device)}
        times = measure(contenders, batches(shape, device), pairs, alone)
        found[f"{count} streams / {count} x one, the blocks"] = compared(times, "several", "one", "at most 1.05", count)
        del contenders
    return found


def part_prefix(shape: Shape, device: torch.device, pairs: int) -> dict[str, Found]:
    found = {}
    for each in (each for each in prefix_attention.SHAPES if each.length == PREFIX_LENGTH):
        padded, ours = prefix_attention.compare(each, pairs)
        name = f"padded queries / ours, {each.heads} heads of {each.kv_heads}, sequence {each.length}"
        times = {"padded": padded, "ours": ours}
        found[name] = compared(times, "padded", "ours", "at least 1.1")
    return found


def part_option(option: str, shape: Shape, device: torch.device, pairs: int) -> dict[str, Found]:
    other, without, changed_to = {
        "norm_scaling": ("plain", changed(shape, init="normal"), changed(shape, init="normal", norm_scaling="depth")),
        "mup": ("plain", changed(shape, init="normal"), with_mup(shape)),
        "own_norms": ("tied", tied(shape), tied(shape, own_norms=True)),
    }[option]
    configs = [(other, without), (option, changed_to)]
    times: dict[str, list[float]] = {other: [], option: []}
    for build in range(BUILDS):
        contenders = {name: Step(config, device) for name, config in configs[:: 1 if build % 2 else -1]}
        for name, seconds in measure(contenders, batches(shape, device), -(-pairs // BUILDS), alone).items():
            times[name] += seconds
    return {f"{option} / {other}, a step": compared(times, option, other, "below 1.01")}


def part_fsdp(shape: Shape, device: torch.device, pairs: int) -> dict[str, Found]:
    times = on_ranks(_steps_of_rank, shape, pairs)
    name = f"tied / untied, a step of {WORLD} processes under FSDP"
    return {name: compared(times, "tied", "untied", "below 1")}


def part_memory(shape: Shape, device: torch.device, pairs: int) -> dict[str, Found]:
    held = on_ranks(_bytes_of_rank, shape)
    for depths, kinds in held.items():
        told = ", ".join(f"{kind} {size / 2**20:.2f} MiB" for kind, size in kinds.items())
        print(f"a rank of {WORLD}, blocks used {depths} times: {told}")
    return {"bytes of a rank": held}


def on_ranks(job: Callable[..., Any], *arguments: Any) -> Any:
    """What `job(mesh, *arguments)` returns on the first of two processes that form a group."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (Path(folder), job, arguments), nprocs=WORLD)
        return json.loads((Path(folder) / "found.json").read_text())


def _rank(rank: int, folder: Path, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(max((os.cpu_count() or 1) // WORLD, 1))
    on_gpu = torch.cuda.device_count() >= WORLD
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        keep_freed_memory()
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD)
    shape = arguments[0]
    layout = plan_layout(ParallelConfig(), WORLD, shape.config(), shape.seq_len, WORLD)
    found = job(build_mesh(layout, "cuda" if on_gpu else "cpu"), *arguments)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _steps_of_rank(mesh: Mesh, shape: Shape, pairs: int) -> dict[str, list[float]]:
    contenders = {
        "untied": Step(shape.config(), mesh.device, mesh),
        "tied": Step(tied(shape), mesh.device, mesh),
    }
    return measure(contenders, batches(shape, mesh.device), pairs)


def _bytes_of_rank(mesh: Mesh, shape: Shape) -> dict[int, dict[str, int]]:
    """Of each number of uses of a block, at the same depth, once gradients are there."""
    found = {}
    for loops in (each for each in (1, 2, 4) if shape.num_layers % each == 0):
        step = Step(tied(shape, loops), mesh.device, mesh)
        step.gradients(*next(batches(shape, mesh.device)))
        kinds = {
            "parameters": step.parameters,
            "gradients": [each.grad for each in step.parameters],
            "moments": step.optimizer.tensors().values(),
        }
        found[loops] = {kind: sum(local(each).nbytes for each in tensors) for kind, tensors in kinds.items()}
    return found


PARTS = {
    "tied": part_tied,
    "streams": part_streams,
    "prefix": part_prefix,
    **{option: partial(part_option, option) for option in OPTIONS},
    "fsdp": part_fsdp,
    "memory": part_memory,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, 20, "rounds, each with one step of everything compared")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options, shape = parse(parser, argv)
    print(headline(options.shape, shape))
    found: dict[str, Found] = {}
    for part in options.parts:
        measured = PARTS[part](shape, this_device(), options.pairs)
        for name, each in measured.items():
            if "ratio" in each:
                print(f"{name}: {told(each)}  wished: {each['wish']}", flush=True)
        found |= measured
    write(options.json, shape, {"measured": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
