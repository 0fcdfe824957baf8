"""Fully sharded data parallelism: one unit a block, and the root with the embedding, the last norm and the head."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from runtime.model.decoder import Decoder


def apply_fsdp(decoder: Decoder, mesh: DeviceMesh, compute: torch.dtype, reshard_after_forward: bool) -> None:
    """Shard a decoder over a mesh of one axis, or replicate and shard it over one of two.

    Parameters stay in their own precision and are gathered in `compute`; gradients are reduced in float32, and
    summed: a loss is a sum of tokens that has been divided by all ranks' valid targets.
    """
    # Inputs are not cast, because the rotary tables are float32 on purpose; the embedding sets the stream's precision.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in decoder.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # The root is needed first in the backward, so gathering it again would buy nothing.
    fully_shard(decoder, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in fsdp_modules(decoder):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    decoder.register_forward_hook(_reshard_after_evaluation)


def fsdp_modules(decoder: nn.Module) -> list[FSDPModule]:
    return [module for module in decoder.modules() if isinstance(module, FSDPModule)]


def _reshard_after_evaluation(decoder: nn.Module, args: object, output: object) -> None:
    """A forward without a backward would leave some units gathered, and blind to later changes of the shards."""
    if not torch.is_grad_enabled():
        for module in fsdp_modules(decoder):
            module.reshard()
