"""Memory of a device at its fullest moment, from one training step that allocates nothing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor

from runtime.config import Config
from runtime.data.loader import Batch
from runtime.model.attention import Attention
from runtime.model.cross_entropy import GPU_CHUNK, Passes, exact
from runtime.model.decoder import Decoder
from runtime.model.normalization import RMSNorm, scaled
from runtime.model.tying import most_loops
from runtime.observe.allocation import EMA as EMA_KIND
from runtime.observe.allocation import GRADIENTS, KINDS, LOGITS, OPTIMIZER, PARAMETERS, AllocationTracker
from runtime.optim.ema import EMA
from runtime.optim.optimizers import build as build_optimizer
from runtime.parallel.mesh import Layout, Mesh, build
from runtime.parallel.parallelize import compute_dtype, parallelize
from runtime.step import train_step


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest device at its fullest moment, by kind."""

    by_kind: dict[str, int]
    """parameters, gradients, optimizer, ema, gathered (whole parameters of the units in use), activations (saved or in
    use, collectives and an optimizer's whole matrices included) and logits (the loss's chunk and its gradients)."""

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


def estimate(config: Config, layout: Layout, *, device_type: str = "cpu") -> MemoryEstimate:
    """Memory of rank 0, which holds the largest shards, in a step of `config` on `layout`.

    Runs the very step that trains, parallel plan included, on fake tensors and a fake process group, and
    follows its allocations; needs no device, and a process without a process group. `torch.compile` is
    approximated by selective recomputation (measured on small CPU runs: 0.87 to 1.03 of the truth). Where loops
    are sampled, the step draws as many as it can. Kernel workspaces, the allocator's rounding and the collectives' own
    buffers come on top.
    """
    with fake_world(layout.world_size):
        mesh = build(layout, "cpu")
        # The plan computes with the ranks of the mesh, so only what comes after it may be fake.
        decoder = _build_decoder(config, mesh, device_type)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            decoder.to_empty(device="cpu")
            _take_kernels(decoder, device_type, config.parallel.compile)
            tracker = AllocationTracker(fake)
            _follow_step(config, mesh, decoder, tracker, device_type)
    return MemoryEstimate({kind: tracker.peak[kind] for kind in KINDS})


@contextmanager
def fake_world(world_size: int) -> Iterator[None]:
    """This process as rank 0 of a group of `world_size`, whose collectives return at once and move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a fake process group needs a process that is not in a real one"
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _build_decoder(config: Config, mesh: Mesh, device_type: str) -> Decoder:
    """The decoder on meta under the whole parallel plan, with the precision and the loss's chunks of `device_type`."""
    with torch.device("meta"):
        decoder = Decoder(config.model)
    if device_type != "cpu":
        decoder.cross_entropy.chunk_elements = GPU_CHUNK  # the trace runs on fake CPU tensors
    precision = _precision(config.parallel.precision, device_type)
    plan = config.parallel.model_copy(update={"compile": False, "precision": precision, "float8": "none"})
    if config.parallel.compile and plan.recompute == "none":
        # The compiler keeps what matrix products and attention return and computes the rest again in the
        # backward (min-cut rematerialisation), which is what "selective" does.
        plan = plan.model_copy(update={"recompute": "selective"})
    return parallelize(decoder, mesh, plan)


def _precision(asked: Literal["auto", "bf16", "fp32"], device_type: str) -> Literal["bf16", "fp32"]:
    dtype = compute_dtype(asked, torch.device(device_type))
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def micro_batches(config: Config, layout: Layout) -> tuple[int, int]:
    """(micro-batches of the largest batch on one rank, sequences of the largest of them)."""
    share = config.largest_batch // layout.data
    sequences = min(config.batch.micro_sequences or config.batch.sequences // layout.data, share)
    return -(-share // sequences), sequences


def _follow_step(config: Config, mesh: Mesh, decoder: nn.Module, tracker: AllocationTracker, device_type: str) -> None:
    """The last micro-batch of a step: the optimizer's state is there, and the gradients of the ones before it."""
    parameters = list(decoder.parameters())
    muon = config.optim.muon.model_copy(update={"precision": _precision(config.optim.muon.precision, device_type)})
    optimizer = build_optimizer(decoder, config.optim.model_copy(update={"muon": muon}))
    ema = EMA(decoder, config.optim.ema_half_life) if config.optim.ema_half_life else None
    number, sequences = micro_batches(config, mesh.layout)
    tokens = torch.zeros(sequences, config.data.seq_len, dtype=torch.int64)
    batch = Batch(tokens, tokens, tokens if config.data.document_mask else None)

    for tensor in parameters:
        tracker.adopt(tensor, PARAMETERS)
    for tensor in optimizer.tensors().values():
        tracker.adopt(tensor, OPTIMIZER)
    for tensor in ema.tensors().values() if ema else ():
        tracker.adopt(tensor, EMA_KIND)
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if number > 1:
            parameter.grad = torch.zeros_like(parameter)
            tracker.adopt(parameter.grad, GRADIENTS)
        parameter.register_post_accumulate_grad_hook(lambda each: tracker.adopt(each.grad, GRADIENTS))
    _mark_logits(decoder.cross_entropy, tracker)
    with tracker:
        result = train_step(
            decoder,
            parameters,
            [batch],
            judge=lambda loss, norm: torch.zeros_like(loss),
            # The rest is in place; fake tensors do not know the optimizer's kernel, and would copy all it touches.
            update=optimizer.prepare,
            grad_clip=config.optim.grad_clip,
            data_group=mesh.data_group,
            loops=most_loops(config.model.tying) if config.model.tying.is_looped else None,
        )
        if ema is not None:
            ema.update(config.batch.sequences * config.data.seq_len, result.skip)


def _take_kernels(decoder: Decoder, device_type: str, is_compiled: bool) -> None:
    """Give norms, attention and loss the memory of the kernels of `device_type`, which fake tensors would not take.

    On a GPU, `F.rms_norm` keeps its input; the model's own kernel for plain tensors on a CPU keeps the
    normalised input, and has room for the gradient once more. Attention in tiles is a CPU's alone, and keys and
    values that are repeated for a mask are a GPU's, as is a loss that is compiled.
    """
    if is_compiled and device_type != "cpu":
        decoder.cross_entropy.passes = Passes(_row_sums, lambda logits, *_: logits)
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(_fused_norm, module, module.forward, device_type == "cpu")
        elif isinstance(module, Attention):
            module.as_on_gpu = device_type != "cpu"


def _fused_norm(
    module: RMSNorm,
    composed: Callable[..., Tensor],
    on_cpu: bool,
    x: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | float | None = None,
) -> Tensor:
    if on_cpu and (isinstance(x, DTensor) or x.dtype == torch.bfloat16):
        return composed(x, weight=weight, scale=scale)
    return _FusedNorm.apply(x, scaled(module.weight if weight is None else weight, scale), on_cpu)


def _row_sums(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocates what the compiled loss's `reduce` would, and computes nothing of use."""
    return logits, *(logits.new_empty(index.shape, dtype=exact(logits.dtype)) for _ in range(3))


class _FusedNorm(torch.autograd.Function):
    """Allocates what a fused RMSNorm would, and computes nothing of use."""

    @staticmethod
    def forward(ctx, x, weight, keeps_normalised):
        kept = x * 1.0 if keeps_normalised else x
        ctx.save_for_backward(kept, weight, x.sum(-1, keepdim=True))
        ctx.keeps_normalised = keeps_normalised
        return kept * weight

    @staticmethod
    def backward(ctx, grad):
        kept, weight, _ = ctx.saved_tensors
        product = grad * kept if ctx.keeps_normalised else grad
        return grad * weight, product.flatten(0, -2).sum(0), None


def _mark_logits(cross_entropy: nn.Module, tracker: AllocationTracker) -> None:
    marks: list[AbstractContextManager] = []

    def enter(*_: object) -> None:
        marks.append(tracker.kind(LOGITS))
        marks[-1].__enter__()

    def leave(*_: object) -> None:
        marks.pop().__exit__(None, None, None)

    cross_entropy.register_forward_pre_hook(enter)
    cross_entropy.register_forward_hook(leave)
