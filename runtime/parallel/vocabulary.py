"""Cross-entropy of a linear head over the ranks of a tensor-parallel group.

Both take the hidden state [n, h] and the weight [V, h] as DTensors on one axis, the targets [n] whole on each rank, and
return the sums of `LinearCrossEntropy`, equal on each rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from runtime.model.cross_entropy import IGNORE, LinearCrossEntropy, Loss


class SequenceSplitCrossEntropy(LinearCrossEntropy):
    """Each rank holds the whole weight, and computes the loss of its share of the positions."""

    def forward(self, hidden: DTensor, weight: DTensor, targets: Tensor, z_loss: float = 0.0) -> Loss:
        mesh = weight.device_mesh
        rank, share = mesh.get_local_rank(), len(targets) // mesh.size()
        own = slice(rank * share, (rank + 1) * share)
        hidden = hidden.to_local(grad_placements=[Partial()])
        weight = weight.to_local(grad_placements=[Partial()])
        sums = super().forward(hidden[own], weight, targets[own], z_loss)
        return Loss(*(DTensor.from_local(each, mesh, [Partial()], run_check=False).full_tensor() for each in sums))


class VocabularyParallelCrossEntropy(LinearCrossEntropy):
    """Each rank holds a slice of the vocabulary, computes its logits, and exchanges three numbers a position: the
    largest logit, the sum of exponentials and the target's logit."""

    def forward(self, hidden: DTensor, weight: DTensor, targets: Tensor, z_loss: float = 0.0) -> Loss:
        group = weight.device_mesh.get_group()
        first = weight.device_mesh.get_local_rank() * (weight.shape[0] // weight.device_mesh.size())
        hidden = hidden.to_local(grad_placements=[Partial()])
        weight = weight.to_local()
        elements = self.chunk_elements or (2**20 if hidden.device.type == "cpu" else 2**27)
        rows = max(1, elements // weight.shape[0])
        needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return Loss(*_VocabularyParallel.apply(hidden, weight, targets, first, group, z_loss, rows, needs_gradient))


class _VocabularyParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, first, group, z_loss, rows, needs_gradient):
        exact = torch.promote_types(hidden.dtype, torch.float32)
        cross_entropy = hidden.new_zeros((), dtype=exact)
        z = hidden.new_zeros((), dtype=exact)
        hidden_grad = torch.empty_like(hidden) if needs_gradient else None
        weight_grad = torch.zeros_like(weight, dtype=exact) if needs_gradient else None
        for start in range(0, len(hidden), rows):
            chunk, chunk_targets = hidden[start : start + rows], targets[start : start + rows]
            index = chunk_targets - first
            here = (index >= 0) & (index < weight.shape[0])
            index = torch.where(here, index, 0).unsqueeze(1)
            valid = (chunk_targets != IGNORE).to(exact)
            logits = (chunk @ weight.mT).to(exact)
            target, normaliser = _exchange(logits, index, here, group)
            cross_entropy += ((normaliser - target) * valid).sum()
            if z_loss:
                z += (normaliser.square() * valid).sum() * z_loss
            if needs_gradient:
                scale = valid * (1 + 2 * z_loss * normaliser)
                gradient = logits.sub_(normaliser.unsqueeze(1)).exp_().mul_(scale.unsqueeze(1))
                gradient.scatter_add_(1, index, -(valid * here).unsqueeze(1))
                gradient = gradient.to(hidden.dtype)
                hidden_grad[start : start + rows] = gradient @ weight
                weight_grad += (gradient.mT @ chunk).to(exact)
        if needs_gradient:
            ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype))
        return cross_entropy, z

    @staticmethod
    def backward(ctx, outer, outer_z):
        hidden_grad, weight_grad = ctx.saved_tensors
        gradients = hidden_grad * outer.to(hidden_grad.dtype), weight_grad * outer.to(weight_grad.dtype)
        return (*gradients, *[None] * 6)


def _exchange(logits: Tensor, index: Tensor, here: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The target's logit and the log-normaliser of each position, from each rank's slice of the logits."""
    largest = logits.amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    exponentials = (logits - largest.unsqueeze(1)).exp_().sum(-1)
    target = torch.where(here, logits.gather(1, index).squeeze(1), 0.0)
    sums = torch.stack((target, exponentials))
    dist.all_reduce(sums, group=group)
    return sums[0], sums[1].log() + largest
