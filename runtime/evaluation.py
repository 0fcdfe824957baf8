"""Held-out loss, exact for any world size."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from runtime.data.evaluation_set import EvaluationSet
from runtime.model.cross_entropy import IGNORE
from runtime.parallel.mesh import Mesh


@torch.no_grad()
def evaluate(
    decoder: nn.Module, held_out: EvaluationSet, mesh: Mesh, micro_sequences: int, proceed: Callable[[], bool]
) -> dict[str, Any] | None:
    """Loss (nats per token), perplexity and bits per byte of one set; None if `proceed` called a halt.

    Every rank evaluates its share; sums and counts are added in float64, so the mean is over targets and not
    over batches. `proceed` is asked between batches, at the same places on every rank. `bits_per_byte` is
    absent where the bytes of the set are not known.
    """
    device = mesh.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in held_out.batches(mesh.data_rank, mesh.layout.data, micro_sequences):
        if not proceed():
            return None
        batch = batch.to(device)
        losses = decoder(batch.tokens, batch.targets, document_ids=batch.document_ids)
        sums += torch.stack((losses.cross_entropy.double(), (batch.targets != IGNORE).sum().double()))
    dist.all_reduce(sums, group=mesh.data_group)
    total, count = sums.tolist()
    loss = total / max(count, 1)
    row = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if held_out.bytes_per_token:
        row["bits_per_byte"] = loss / math.log(2) / held_out.bytes_per_token
    return row
