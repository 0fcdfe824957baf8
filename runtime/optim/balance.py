"""Experts kept equally used by a bias on their choice, which moves after each step."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_router_biases(decoder: nn.Module, counts: Tensor, skip: Tensor) -> None:
    """Raise the bias of experts that were chosen less often than the others of their block, and lower that of the rest,
    by `bias_rate` (Wang et al. 2024, arXiv 2408.15664, algorithm 1); not at all where `skip` (0-d) is 1.0.

    counts [blocks, experts]: choices in the whole global batch, so that neither micro-batches nor ranks decide. A bias
    is used from the next step on, and so sees nothing of the tokens that it chooses for. A frozen backbone's stays.
    """
    config = decoder.config
    if config.experts.balance != "bias" or config.streams.backbone == "frozen":
        return
    steps = (counts.mean(1, keepdim=True) - counts).sign() * config.experts.bias_rate
    steps = torch.where(skip.bool(), 0.0, steps)
    for block, step in zip(decoder.blocks, steps, strict=True):
        block.feed_forward.router.bias += step


def imbalance(counts: Tensor) -> Tensor:
    """How much more often than on average the most used expert was chosen, in the block where that is worst: 0-d, 1 to
    the number of experts over top_k. counts [blocks, experts]."""
    return (counts.amax(1) / counts.mean(1).clamp(min=1e-9)).amax()
