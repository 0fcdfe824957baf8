"""How a decoder is spread over devices: the whole plan in reading order."""

from types import MethodType
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from runtime.config import ParallelConfig
from runtime.model.cross_entropy import compiled
from runtime.model.decoder import Decoder
from runtime.model.initialization import fill
from runtime.parallel.float8 import apply_float8
from runtime.parallel.fsdp import apply_fsdp
from runtime.parallel.mesh import Mesh
from runtime.parallel.recompute import recompute
from runtime.parallel.shards import local_indices
from runtime.parallel.tensor_parallel import apply_tensor_parallel

_GRAPHS = 32
"""That blocks may have. Training and evaluation, loops without a backward and micro-batches of a few sizes, the last
one of one sequence, are a graph each: a looped model comes to more than torch's 8, beyond which it is an error."""


def parallelize(decoder: Decoder, mesh: Mesh, parallel: ParallelConfig) -> Decoder:
    """Spread a decoder, best one on the meta device, over a mesh, in place.

    FSDP comes last, so that each unit gathers what the others have split. Its mixed precision is wanted at degree 1
    too; for one process in float32 it would only copy the parameters (4 % of a step on a CPU, 24 % of a short one).
    """
    if mesh.layout.tensor > 1:
        apply_tensor_parallel(decoder, mesh.device_mesh["tensor"])
    if parallel.float8 != "none":
        apply_float8(decoder.blocks, parallel.float8, emulate=mesh.device.type == "cpu")
    # Compiled around the recomputation, a block leaves out what its backward does not need. Of whole blocks with
    # collectives in them, torch 2.13's compiler fails to save the device mesh: those it compiles inside.
    inside = parallel.recompute == "full" and mesh.layout.tensor > 1
    for block in decoder.blocks:
        if parallel.compile and inside:
            compile_block(block)
        recompute(block, parallel.recompute)
        if parallel.compile and not inside:
            compile_block(block)
    if parallel.compile:
        compile_loss(decoder, mesh.device)
    compute = compute_dtype(parallel.precision, mesh.device)
    if mesh.layout.world_size > 1 or compute != torch.float32:
        apply_fsdp(decoder, mesh.fsdp, compute, parallel.reshard_after_forward, parallel.looped_blocks)
    return decoder


def compute_dtype(precision: Literal["auto", "bf16", "fp32"], device: torch.device) -> torch.dtype:
    """The precision of forward and backward that a configuration means on a device."""
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def compile_block(block: nn.Module) -> None:
    """Compile a block's forward as one graph, which equal blocks and all depths share. Generation and observation,
    which need Python objects and the depth as a number, stay eager."""
    torch._dynamo.config.recompile_limit = _GRAPHS
    eager, compiled = block.forward, torch.compile(block.forward, fullgraph=True)

    def forward(_: nn.Module, x, cos, sin, mask, use, cache=None, probe=None, depth=0):
        if cache is None and probe is None:
            return compiled(x, cos, sin, mask, use)
        return eager(x, cos, sin, mask, use, cache, probe, depth=depth)

    block.forward = MethodType(forward, block)


def compile_loss(decoder: Decoder, device: torch.device) -> None:
    """Compile the loss's passes over its logits, but on a CPU: its chunk stays in the cache, and nothing is gained."""
    if device.type != "cpu":
        torch._dynamo.config.recompile_limit = _GRAPHS
        decoder.cross_entropy.passes = compiled()


@torch.no_grad()
def materialize(decoder: Decoder, device: torch.device, seed: int) -> None:
    """Allocate a parallelised decoder and give it first values, each rank only its own shards.

    A value depends on (seed, name, global index) alone: every mesh starts from the weights of `initialize`.
    """
    decoder.to_empty(device=device)
    for name, parameter in decoder.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        fill(local, local_indices(parameter), parameter.shape, decoder.config, seed, name)
