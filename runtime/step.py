"""One optimizer step: micro-batches, the loss over global tokens, clipping, the guard."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.data.loader import Batch
from runtime.model.cross_entropy import IGNORE
from runtime.parallel.gradients import gradient_norm, scale_gradients


class StepResult(NamedTuple):
    """0-d device tensors, equal on every rank; reading one waits for the device."""

    loss: Tensor
    """Cross-entropy in nats per valid target of the whole global batch."""
    grad_norm: Tensor
    """L2 norm of the gradient before clipping."""
    skip: Tensor
    """1.0 where the guard kept this step from the weights, else 0.0."""


def train_step(
    decoder: nn.Module,
    parameters: Sequence[nn.Parameter],
    micro_batches: Sequence[Batch],
    *,
    judge: Callable[[Tensor, Tensor], Tensor],
    update: Callable[[Tensor], None],
    grad_clip: float,
    data_group: dist.ProcessGroup,
) -> StepResult:
    """Accumulate the micro-batches, judge the step, and update the weights unless it is skipped.

    The loss is the sum over tokens divided by the valid targets of the whole global batch, so neither
    micro-batches nor ranks of unequal lengths weigh a token differently. `judge(loss, grad_norm)` returns the
    skip flag, `update(skip)` applies the optimizer; nothing here waits for the device.
    """
    device = parameters[0].device
    valid = sum((batch.targets != IGNORE).sum() for batch in micro_batches).to(device, torch.float32)
    dist.all_reduce(valid, group=data_group)
    valid = valid.clamp(min=1.0)

    total = torch.zeros((), device=device)
    for batch in micro_batches:
        batch = batch.to(device)
        losses = decoder(batch.tokens, batch.targets, document_ids=batch.document_ids)
        ((losses.cross_entropy + losses.z) / valid).backward()
        total += losses.cross_entropy.detach()
    dist.all_reduce(total, group=data_group)
    loss = total / valid

    grad_norm = gradient_norm(parameters)
    skip = judge(loss, grad_norm)
    if grad_clip > 0:
        scale_gradients(parameters, grad_norm, grad_clip)
    update(skip)
    for parameter in parameters:
        parameter.grad = None
    return StepResult(loss, grad_norm, skip)
