"""Cross-entropy of a linear head without the full logits."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from runtime.model.linear import product, product_over_rows, zero_sum

IGNORE = -100
"""A target that is not predicted."""
_CPU_CHUNK, GPU_CHUNK = 2**20, 2**27
"""Logits that exist at a time."""
_TILE = 256
"""Rows that a GPU's products are cut into: a part of a tile takes as long as a whole one."""


class Loss(NamedTuple):
    """Sums over the valid targets, in float32 (float64 for a float64 model). Only their total may be differentiated."""

    cross_entropy: Tensor
    z: Tensor
    exits: Tensor | None = None
    """Of a looped decoder's earlier loops, weighted."""
    balance: Tensor | None = None
    """Of the experts, weighted; summed over all positions."""
    expert_counts: Tensor | None = None
    """[blocks, experts]: how often each was chosen; no loss."""

    @property
    def total(self) -> Tensor:
        """The training loss."""
        return sum((each for each in (self.z, self.exits, self.balance) if each is not None), start=self.cross_entropy)


class LinearCrossEntropy(nn.Module):
    """Cross-entropy of hidden @ weight^T, a chunk of positions at a time, gradients included.

    The gradients are computed in the forward while a chunk's logits exist, so that at most `chunk_elements` logits
    ever do (and a copy in the hidden state's precision). Logits are rounded to the hidden state's precision, all that
    follows is float32 or better.
    """

    def __init__(self, chunk_elements: int | None = None):
        super().__init__()
        self.chunk_elements = chunk_elements

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Loss:
        """hidden [n, h], weight [V, h], targets [n] with IGNORE where there is none; z_loss weights the squared
        log-normaliser (PaLM, arXiv 2204.02311, section 5)."""
        rows = self.chunk_rows(hidden.device, weight.shape[0])
        needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return Loss(*_LinearCrossEntropy.apply(hidden, weight, targets, z_loss, rows, needs_gradient))

    def distilled(self, students: Sequence[Tensor], teacher: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """-sum p log q over valid positions and students, 0-d: p is the teacher's distribution, without a gradient, q a
        student's. students and teacher [n, h]; targets [n] only say which positions are valid."""
        rows = self.chunk_rows(teacher.device, 2 * weight.shape[0])
        return distill(students, teacher, weight, targets, rows)

    def chunk_rows(self, device: torch.device, vocab_size: int) -> int:
        """Positions in a chunk. By default a CPU's chunk of logits stays in its cache, where that leaves enough rows
        for a matrix product. A GPU's has 512 MiB in float32, and whole tiles of rows where there is more than one."""
        if self.chunk_elements is None and device.type == "cpu":
            return max(64, _CPU_CHUNK // vocab_size)
        rows = max(1, (self.chunk_elements or GPU_CHUNK) // vocab_size)
        return rows - rows % _TILE if rows > _TILE else rows


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss, rows, needs_gradient):
        exact = torch.promote_types(hidden.dtype, torch.float32)
        cross_entropy, z = (hidden.new_zeros((), dtype=exact) for _ in range(2))
        hidden_grad = torch.empty_like(hidden) if needs_gradient else None
        weight_grad = zero_sum(weight, exact) if needs_gradient else None
        for start in range(0, len(hidden), rows):
            chunk = hidden[start : start + rows]
            index = targets[start : start + rows].unsqueeze(1)
            valid = (index != IGNORE).to(exact)
            index = index.where(index != IGNORE, 0)
            logits = product(chunk, weight).to(exact)
            target = logits.gather(1, index)
            largest = logits.amax(1, keepdim=True)
            exponentials = logits.sub_(largest).exp_()
            total = exponentials.sum(1, keepdim=True)
            normaliser = total.log() + largest
            cross_entropy += ((normaliser - target) * valid).sum()
            z += (normaliser.square() * valid).sum() * z_loss
            if needs_gradient:
                gradient = exponentials.mul_(valid * (1 + 2 * z_loss * normaliser) / total)
                gradient = gradient.scatter_add_(1, index, -valid).to(hidden.dtype)
                hidden_grad[start : start + rows] = product(gradient, weight.mT)
                weight_grad += product_over_rows(gradient, chunk)
        if needs_gradient:
            ctx.save_for_backward(hidden_grad, weight_grad)
            ctx.dtypes = hidden.dtype, weight.dtype
        return cross_entropy, z

    @staticmethod
    def backward(ctx, outer, outer_z):
        gradients = (
            torch.mul(grad, outer, out=grad.new_empty(grad.shape, dtype=dtype))
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None, None


def _alone(tensor: Tensor) -> None:
    pass


class Over(NamedTuple):
    """How numbers of a slice of the vocabulary become those of all of it, in place; of the whole, by nothing."""

    largest: Callable[[Tensor], None] = _alone
    total: Callable[[Tensor], None] = _alone


_WHOLE = Over()


def distill(
    students: Sequence[Tensor], teacher: Tensor, weight: Tensor, targets: Tensor, rows: int, over: Over = _WHOLE
) -> Tensor:
    """`LinearCrossEntropy.distilled` of a slice of the vocabulary, `rows` positions at a time."""
    together = torch.stack(list(students))
    needs_gradient = torch.is_grad_enabled() and (together.requires_grad or weight.requires_grad)
    return _Distillation.apply(together, teacher.detach(), weight, targets, rows, over, needs_gradient)


class _Distillation(torch.autograd.Function):
    """students [k, n, h]; a chunk's gradients are computed while its logits exist, as in `_LinearCrossEntropy`."""

    @staticmethod
    def forward(ctx, students, teacher, weight, targets, rows, over, needs_gradient):
        exact = torch.promote_types(teacher.dtype, torch.float32)
        loss = teacher.new_zeros((), dtype=exact)
        students_grad = torch.empty_like(students) if needs_gradient else None
        weight_grad = zero_sum(weight, exact) if needs_gradient else None
        for start in range(0, len(teacher), rows):
            valid = (targets[start : start + rows, None] != IGNORE).to(exact)
            expected, total, _ = _exponentials(product(teacher[start : start + rows], weight).to(exact), over)
            over.total(total)
            expected /= total
            for student, grad in zip(students, students_grad if needs_gradient else students, strict=True):
                chunk = student[start : start + rows]
                logits = product(chunk, weight).to(exact)
                agreement = (expected * logits).sum(1, keepdim=True)
                exponentials, total, largest = _exponentials(logits, over)
                sums = torch.stack((total, agreement))
                over.total(sums)
                total, agreement = sums
                loss += ((total.log() + largest - agreement) * valid).sum()
                if needs_gradient:
                    gradient = exponentials.div_(total).sub_(expected).mul_(valid).to(chunk.dtype)
                    grad[start : start + rows] = product(gradient, weight.mT)
                    weight_grad += product_over_rows(gradient, chunk)
        if needs_gradient:
            ctx.save_for_backward(students_grad, weight_grad)
            ctx.dtypes = students.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx, outer):
        gradients = ((grad * outer).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        students_grad, weight_grad = gradients
        return students_grad, None, weight_grad.contiguous(), *[None] * 4


def _exponentials(logits: Tensor, over: Over) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - largest) in the logits' place, this slice's sums of them, and the largest of all slices."""
    largest = logits.amax(1, keepdim=True)
    over.largest(largest)
    exponentials = logits.sub_(largest).exp_()
    return exponentials, exponentials.sum(1, keepdim=True), largest
