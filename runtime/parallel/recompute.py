"""Activation recomputation: keep less for the backward, compute it again."""

from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import runtime.model.grouped  # (defines meristem::grouped_product)
import runtime.model.linear  # (defines meristem::product)
import runtime.model.tiled_attention  # noqa: F401  (defines meristem::tiled_attention)

_aten = torch.ops.aten
_EXPENSIVE = {
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten._scaled_mm.default,
    torch.ops.meristem.product.default,
    torch.ops.meristem.grouped_product.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.meristem.tiled_attention.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}
"""What "selective" keeps: matrix products, attention and the collectives of tensor parallelism."""


def recompute(block: nn.Module, mode: Literal["none", "selective", "full"]) -> None:
    """Make a block's backward compute its activations again, all of them or only the cheap ones.

    The block's own `forward` is replaced, so its parameters keep their names and FSDP's hooks stay outside: the
    recomputation runs on parameters that are already gathered.
    """
    if mode == "none":
        return
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "selective" else {}
    inner = block.forward.__func__

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(inner, block, *args, use_reentrant=False, preserve_rng_state=False, **contexts, **kwargs)

    block.forward = MethodType(forward, block)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
