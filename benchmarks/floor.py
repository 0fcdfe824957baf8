"""Where the time of a training step goes, term by term, beside the least that each term could take.

    python benchmarks/floor.py --shape small --threads 1
    python benchmarks/floor.py --shape 1B --compile --json floor.json

The step is the trainer's: forward and backward, the norm of the gradient, clipping, AdamW. Its operations are traced by
torch's profiler and put into terms; a term's time is that of its operations themselves, of kernels on a GPU and of
operators on a CPU. The floor of matrix products and of attention is their FLOPs over the rate of a large product,
measured here; the floor of all else is the bytes that one pass over its tensors moves, over the bandwidth of a copy,
measured here. What neither operators nor kernels account for, Python and gaps, is the last term.

On one CPU thread the processor's clock counts, which other work on the machine hardly lengthens. The profiler has the
wall's alone; there its times are multiplied by what the processor's clock says of the whole traced step over what the
wall's does.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.architecture import alone
from benchmarks.bench import Shape, arguments, batches, headline, parse, this_device, write
from benchmarks.noise_scale import Step
from runtime.config import ParallelConfig
from runtime.model.counts import count, flops_per_token
from runtime.model.linear import product
from runtime.parallel.mesh import build as build_mesh
from runtime.parallel.mesh import plan_layout
from runtime.startup import process_group

WARMUP, TRACED = 3, 5
LARGEST_COPY = 2 * 10**9
"""Bytes: a larger one is no faster, and may not fit beside a large model."""
PRODUCTS = ("::mm", "::bmm", "::addmm", "_linear_pointwise", "meristem::product", "::grouped_product")
ATTENTION = ("scaled_dot_product", "tiled_attention")
FUSED = "compiled, fused"
CALLERS: Mapping[str, tuple[str, ...]] = {
    "loss": ("CrossEntropy",),
    "norms": ("_RMSNorm", "rms_norm", "layer_norm"),
    "rotary": ("_Rotate",),
    "gate": ("silu", "Silu", "MulBackward"),
    "norm of the gradient, clipping": ("_foreach_norm", "_foreach_mul_"),
    "optimizer": ("_fused_adamw", "_foreach_add_", "_foreach_sub_"),
    "embedding": ("embedding", "EmbeddingBackward"),
    "gathers and casts of FSDP": ("FSDP::",),
    FUSED: ("fused", "CompiledFunction", "Torch-Compiled"),
}
"""What an operation that is no product belongs to, by the first caller that has one of these in its name."""
SUMS = "sums on the stream"
PLAIN: Mapping[str, str] = {"aten::mul": "gate", "aten::add": SUMS, "aten::add_": SUMS}
"""What an operation of this very name belongs to where no caller tells: the gate's product, which the model writes out,
and what a block adds to the stream."""
ENGINE = "autograd::engine::evaluate_function"
"""The caller that adds the gradients of a tensor with several uses."""


@dataclass(frozen=True)
class Floor:
    """What a term cannot do without, of one step."""

    flops: float = 0.0
    bytes: float = 0.0

    def seconds(self, rate: float, bandwidth: float) -> float:
        return self.flops / rate + self.bytes / bandwidth


def floors(shape: Shape, element: int) -> dict[str, Floor]:
    """Of each term. `element`: bytes of a number of the stream; parameters, gradients and moments have 4.

    Bytes are those of one pass that reads its inputs and writes its outputs once, forward and backward, as if every
    term were one kernel that nothing before or after is fused with.
    """
    config, tokens = shape.config(), shape.batch * shape.seq_len
    hidden = tokens * shape.hidden_size * element
    inner = tokens * shape.intermediate_size * element
    rotated = tokens * config.head_dim * (shape.num_heads + shape.num_kv_heads) * element
    attention = 12 * shape.num_heads * config.head_dim * shape.seq_len * shape.num_layers * tokens
    head = 6 * shape.hidden_size * shape.vocab_size * tokens
    again = 1 / 3 if shape.recompute else 0  # a forward once more, of the blocks alone
    all_flops = flops_per_token(config, shape.seq_len) * tokens
    parameters = 4 * count(config).total
    layers, forwards = shape.num_layers, 1 + shape.recompute
    return {
        "products of blocks": Floor(flops=(all_flops - attention - head) * (1 + again)),
        "attention": Floor(flops=attention / 2 * (1 + again)),  # half of the square is masked
        "loss": Floor(flops=head, bytes=3 * hidden),
        "norms": Floor(bytes=(2 * layers * (2 * forwards + 3) + 5) * hidden),  # x to y; x and dy to dx
        "rotary": Floor(bytes=layers * (2 * forwards + 2) * rotated),
        "gate": Floor(bytes=layers * (3 * forwards + 5) * inner),  # two to one; three to two
        # two writes to the stream; their gradients, and those of what q, k and v, and gate and up, read together
        SUMS: Floor(bytes=layers * (2 * 3 * forwards + 2 * 3 + 4 + 3) * hidden),
        "optimizer": Floor(bytes=7 * parameters),  # p, g, m and v are read, three of them written
        "norm of the gradient, clipping": Floor(bytes=3 * parameters),
        "embedding": Floor(bytes=2 * hidden + parameters * shape.vocab_size * shape.hidden_size // count(config).total),
    }


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product large enough that nothing but arithmetic counts."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: product(a, b))


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes/s, read and written, of a copy of so many bytes, or of the largest that is tried."""
    source = torch.ones(max(min(size, LARGEST_COPY) // 4, 1), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source))


def bandwidth_to_host(device: torch.device, size: int) -> float:
    """Bytes/s of a copy of so many bytes to the host's memory, pinned where the device is a GPU."""
    source = torch.ones(max(min(size, LARGEST_COPY) // 4, 1), device=device)
    target = torch.empty(source.shape, pin_memory=device.type == "cuda")
    return source.nbytes / _fastest(lambda: target.copy_(source, non_blocking=True))


def _fastest(action: Callable[[], Any], rounds: int = 12) -> float:
    for _ in range(3):
        action()
    return min(alone(action) for _ in range(rounds))


def term_of(event: Any) -> str:
    """The term that an operation counts to, by its own name or that of the first caller that tells. (Not the outermost:
    a block that is computed again has an operation of the backward as its caller.)"""
    if any(part in event.name for part in ATTENTION):
        return "attention"
    is_product = any(part in event.name for part in PRODUCTS)
    plain, caller = None, event
    while caller is not None:
        plain = plain or PLAIN.get(caller.name)
        if plain == SUMS and caller.cpu_parent is not None and caller.cpu_parent.name.startswith(ENGINE):
            return SUMS
        for term, parts in CALLERS.items():
            if any(part in caller.name for part in parts) and not (term == FUSED and (is_product or in_loss(caller))):
                return term
        if any(part in caller.name for part in ATTENTION):
            return "attention"
        is_product = is_product or any(part in caller.name for part in PRODUCTS)
        caller = caller.cpu_parent
    return "products of blocks" if is_product else plain or "other operations"


def in_loss(event: Any) -> bool:
    """Whether a caller is the loss, whose own passes over the logits may be compiled."""
    while event is not None and not any(part in event.name for part in CALLERS["loss"]):
        event = event.cpu_parent
    return event is not None


def traced(step: Step, shape: Shape, device: torch.device) -> dict[str, float]:
    """Seconds of each term, a step: the median of a few."""
    source, found = batches(shape, device), []
    for _ in range(TRACED):
        operations, share = events(step, next(source), device)
        found.append({term: share * seconds for term, seconds in summed(operations, device).items()})
    return {term: statistics.median(each.get(term, 0.0) for each in found) for term in found[0]}


def events(step: Step, batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[list[Any], float]:
    """The operations of a step, as the host called them, and how much of their time by the wall's clock is theirs."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * (device.type == "cuda")) as profile:
        start = time.perf_counter()
        seconds = alone(step, batch)
        share = min(seconds / (time.perf_counter() - start), 1.0)
    operations = [each for each in profile.events() if each.device_type == torch.autograd.DeviceType.CPU]
    return operations, share


def summed(operations: list[Any], device: torch.device) -> dict[str, float]:
    """Seconds of each term by the profiler's clock."""
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found: dict[str, float] = defaultdict(float)
    for event in operations:
        found[term_of(event)] += getattr(event, own) / 1e6
    return dict(found)


def measure(shape: Shape, device: torch.device, is_compiled: bool, rounds: int) -> dict[str, Any]:
    """All that the table says. A profiled step is a slower one, and the times of its operations are left so."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    step = built(shape, device, is_compiled)
    source = batches(shape, device)
    for _ in range(WARMUP):
        step(*next(source))
    seconds = statistics.median(alone(step, next(source)) for _ in range(rounds))
    stream = shape.batch * shape.seq_len * shape.hidden_size * dtype.itemsize
    return {
        "seconds": seconds,
        "rate": rate(device, dtype),
        "bandwidth": {"stream": bandwidth(device, stream), "parameters": bandwidth(device, 4 * count_of(shape))},
        "terms": traced(step, shape, device),
        "element": dtype.itemsize,
    }


def built(shape: Shape, device: torch.device, is_compiled: bool = False) -> Step:
    """The trainer's step of a shape, on a process group of one."""
    parallel = ParallelConfig(recompute="full" if shape.recompute else "none", compile=is_compiled)
    mesh = build_mesh(plan_layout(parallel, 1, shape.config(), shape.seq_len, 1), device.type)
    return Step(shape, mesh, 1, parallel)


def count_of(shape: Shape) -> int:
    return count(shape.config()).total


def table(shape: Shape, found: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
    """Term, milliseconds measured, and milliseconds of its floor; the largest gap first, then what has no floor."""
    known = floors(shape, found["element"])
    rows = []
    for term, floor in known.items():
        wide = found["bandwidth"]["parameters" if term in ("optimizer", "norm of the gradient, clipping") else "stream"]
        rows.append((term, 1e3 * found["terms"].get(term, 0.0), 1e3 * floor.seconds(found["rate"], wide)))
    rows.sort(key=lambda row: row[2] - row[1])
    rest = [(term, 1e3 * each, None) for term, each in found["terms"].items() if term not in known]
    between = 1e3 * (found["seconds"] - sum(found["terms"].values()))
    return [*rows, *sorted(rest, key=lambda row: -row[1]), ("between operations", between, None)]


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, 10, "steps that are timed without the profiler")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, as parallel.compile does")
    options, shape = parse(parser, argv)
    began = time.monotonic()
    with process_group(600):
        found = measure(shape, this_device(), options.compile, options.pairs)
    print(headline(options.shape, shape))
    wide = found["bandwidth"]
    print(
        f"a large product {found['rate'] / 1e9:,.0f} GFLOP/s; a copy the size of the stream "
        f"{wide['stream'] / 1e9:.1f} GB/s, of the parameters {wide['parameters'] / 1e9:.1f} GB/s"
    )
    print(f"{'term':32}{'ms a step':>12}{'floor':>10}{'times':>8}")
    for term, milliseconds, floor in table(shape, found):
        least = f"{floor:10.1f}{milliseconds / floor:8.2f}" if floor else ""
        print(f"{term:32}{milliseconds:12.1f}{least}")
    total = 1e3 * found["seconds"]
    least = sum(row[2] for row in table(shape, found) if row[2])
    print(f"{'step':32}{total:12.1f}{least:10.1f}{total / least:8.2f}")
    write(options.json, shape, {"compiled": options.compile, **found})
    print(f"measured in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
