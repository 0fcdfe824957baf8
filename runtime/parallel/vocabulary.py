"""Cross-entropy of a linear head over the ranks of a tensor-parallel group.

Both take the hidden state [n, h] and the weight [V, h] as DTensors on one axis, the targets [n] whole on each rank, and
return the sums of `LinearCrossEntropy`, equal on each rank.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from runtime.model.cross_entropy import IGNORE, LinearCrossEntropy, Loss, Over, distill
from runtime.model.linear import product, product_over_rows, zero_sum


class SequenceSplitCrossEntropy(LinearCrossEntropy):
    """Each rank holds the whole weight, and computes the loss of its share of the positions."""

    def forward(self, hidden: DTensor, weight: DTensor, targets: Tensor, z_loss: float = 0.0) -> Loss:
        mesh = weight.device_mesh
        rank, share = mesh.get_local_rank(), len(targets) // mesh.size()
        own = slice(rank * share, (rank + 1) * share)
        hidden = hidden.to_local(grad_placements=[Partial()])
        weight = weight.to_local(grad_placements=[Partial()])
        sums = super().forward(hidden[own], weight, targets[own], z_loss)[:2]
        # Cloned, because FSDP warns of outputs that are views.
        whole = (DTensor.from_local(each, mesh, [Partial()], run_check=False).full_tensor().clone() for each in sums)
        return Loss(*whole)

    def distilled(self, students: Sequence[DTensor], teacher: DTensor, weight: DTensor, targets: Tensor) -> Tensor:
        mesh = weight.device_mesh
        share = len(targets) // mesh.size()
        own = slice(mesh.get_local_rank() * share, (mesh.get_local_rank() + 1) * share)
        students = [each.to_local(grad_placements=[Partial()])[own] for each in students]
        weight = weight.to_local(grad_placements=[Partial()])
        total = super().distilled(students, teacher.to_local()[own], weight, targets[own])
        return DTensor.from_local(total, mesh, [Partial()], run_check=False).full_tensor().clone()


class VocabularyParallelCrossEntropy(LinearCrossEntropy):
    """Each rank holds a slice of the vocabulary, computes its logits, and exchanges three numbers a position: the
    largest logit, the sum of exponentials and the target's logit."""

    def forward(self, hidden: DTensor, weight: DTensor, targets: Tensor, z_loss: float = 0.0) -> Loss:
        group = weight.device_mesh.get_group()
        first = weight.device_mesh.get_local_rank() * (weight.shape[0] // weight.device_mesh.size())
        hidden = hidden.to_local(grad_placements=[Partial()])
        weight = weight.to_local()
        rows = self.chunk_rows(hidden.device, weight.shape[0])
        needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return Loss(*_VocabularyParallel.apply(hidden, weight, targets, first, group, z_loss, rows, needs_gradient))

    def distilled(self, students: Sequence[DTensor], teacher: DTensor, weight: DTensor, targets: Tensor) -> Tensor:
        reduce = partial(dist.all_reduce, group=weight.device_mesh.get_group())
        students = [each.to_local(grad_placements=[Partial()]) for each in students]
        weight = weight.to_local()
        rows = self.chunk_rows(teacher.device, 2 * weight.shape[0])
        over = Over(partial(reduce, op=dist.ReduceOp.MAX), reduce)
        return distill(students, teacher.to_local(), weight, targets, rows, over)


class _VocabularyParallel(torch.autograd.Function):
    """`_LinearCrossEntropy` of a slice of the vocabulary that begins at `first`."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, first, group, z_loss, rows, needs_gradient):
        exact = torch.promote_types(hidden.dtype, torch.float32)
        cross_entropy = hidden.new_zeros((), dtype=exact)
        z = hidden.new_zeros((), dtype=exact)
        hidden_grad = torch.empty_like(hidden) if needs_gradient else None
        weight_grad = zero_sum(weight, exact) if needs_gradient else None
        for start in range(0, len(hidden), rows):
            chunk = hidden[start : start + rows]
            valid = (targets[start : start + rows, None] != IGNORE).to(exact)
            index = targets[start : start + rows, None] - first
            here = (index >= 0) & (index < weight.shape[0])
            index = index.where(here, 0)
            logits = product(chunk, weight).to(exact)
            target = logits.gather(1, index).where(here, 0.0)
            largest = logits.amax(1, keepdim=True)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            exponentials = logits.sub_(largest).exp_()
            sums = torch.stack((exponentials.sum(1, keepdim=True), target))
            dist.all_reduce(sums, group=group)
            total, target = sums
            normaliser = total.log() + largest
            cross_entropy += ((normaliser - target) * valid).sum()
            z += (normaliser.square() * valid).sum() * z_loss
            if needs_gradient:
                gradient = exponentials.mul_(valid * (1 + 2 * z_loss * normaliser) / total)
                gradient = gradient.scatter_add_(1, index, -valid * here).to(hidden.dtype)
                hidden_grad[start : start + rows] = product(gradient, weight.mT)
                weight_grad += product_over_rows(gradient, chunk)
        if needs_gradient:
            ctx.save_for_backward(hidden_grad, weight_grad)
            ctx.dtypes = hidden.dtype, weight.dtype
        return cross_entropy, z

    @staticmethod
    def backward(ctx, outer, outer_z):
        hidden_grad, weight_grad = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        gradients = (hidden_grad * outer).to(hidden_dtype), (weight_grad * outer).to(weight_dtype).contiguous()
        return (*gradients, *[None] * 6)
