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


def _alone(tensor: Tensor) -> None:
    pass


class Over(NamedTuple):
    """How numbers of a slice of the vocabulary become those of all of it, in place; of the whole, by nothing."""

    largest: Callable[[Tensor], None] = _alone
    total: Callable[[Tensor], None] = _alone


_WHOLE = Over()


class Passes(NamedTuple):
    """The two passes over a chunk's logits [n, v], in its precision; all else has rows alone, [n, 1] in `exact`.

    reduce(logits, index): what `gradient` reads, each row's largest logit, its sum of exp(logit - largest), and its
    logit at the index. gradient(read, largest, factor, index, at_index): exp(logits - largest) * factor, with at_index
    added at the index. Both may overwrite what they are given.
    """

    reduce: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def exact(dtype: torch.dtype) -> torch.dtype:
    """The precision that follows on logits of a precision."""
    return torch.promote_types(dtype, torch.float32)


def _exponentials(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = logits.to(exact(logits.dtype))
    at_index = logits.gather(1, index)
    largest = logits.amax(1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()
    return exponentials, largest, exponentials.sum(1, keepdim=True), at_index


def _scaled(exponentials: Tensor, largest: Tensor, factor: Tensor, index: Tensor, at_index: Tensor) -> Tensor:
    return exponentials.mul_(factor).scatter_add_(1, index, at_index)


def _sums(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = logits.to(exact(logits.dtype))
    largest = wide.amax(1, keepdim=True)
    return logits, largest, (wide - largest).exp().sum(1, keepdim=True), wide.gather(1, index)


def _computed_again(logits: Tensor, largest: Tensor, factor: Tensor, index: Tensor, at_index: Tensor) -> Tensor:
    columns = torch.arange(logits.shape[1], device=logits.device)
    exponentials = (logits.to(largest.dtype) - largest).exp()
    return logits.copy_(exponentials * factor + torch.where(columns == index, at_index, 0))


EAGER = Passes(_exponentials, _scaled)
"""Operator by operator: the exponentials are kept between the passes, in the logits' place where these are exact."""
FUSIBLE = Passes(_sums, _computed_again)
"""For a compiler, which makes each pass one kernel: the exponentials are computed anew, in no memory of their own."""


def compiled() -> Passes:
    """`FUSIBLE`, compiled."""
    return Passes(*(torch.compile(each, fullgraph=True) for each in FUSIBLE))


class LinearCrossEntropy(nn.Module):
    """Cross-entropy of hidden @ weight^T, a chunk of positions at a time, gradients included.

    The gradients are computed in the forward while a chunk's logits exist, so that at most `chunk_elements` logits
    ever do (and a copy in float32 where `passes` are eager). Logits are rounded to the hidden state's precision, all
    that follows is float32 or better.
    """

    def __init__(self, chunk_elements: int | None = None):
        super().__init__()
        self.chunk_elements = chunk_elements
        self.passes = EAGER

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Loss:
        """hidden [n, h], weight [V, h], targets [n] with IGNORE where there is none; z_loss weights the squared
        log-normaliser (PaLM, arXiv 2204.02311, section 5)."""
        return self.of_slice(hidden, weight, targets, z_loss)

    def of_slice(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, first: int = 0, over: Over = _WHOLE
    ) -> Loss:
        """The loss where `weight` is the vocabulary's slice that begins at `first`."""
        rows = self.chunk_rows(hidden.device, weight.shape[0])
        needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        chunks = Chunks(rows, self.passes, first, over, needs_gradient)
        return Loss(*_LinearCrossEntropy.apply(hidden, weight, targets, z_loss, chunks))

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


class Chunks(NamedTuple):
    """How a loss is computed, chunk by chunk."""

    rows: int
    passes: Passes
    first: int
    """The vocabulary's entry that the weight begins with."""
    over: Over
    needs_gradient: bool


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss, chunks):
        rows, passes, first, over, needs_gradient = chunks
        wide = exact(hidden.dtype)
        cross_entropy, z = (hidden.new_zeros((), dtype=wide) for _ in range(2))
        hidden_grad = torch.empty_like(hidden) if needs_gradient else None
        weight_grad = zero_sum(weight, wide) if needs_gradient else None
        for start in range(0, len(hidden), rows):
            chunk, target = hidden[start : start + rows], targets[start : start + rows, None]
            here = target != IGNORE
            valid, index = here.to(wide), (target - first).where(here, 0)
            if over is not _WHOLE:  # of which a target that is in no slice is refused by the kernel that looks it up
                here = here & (index >= 0) & (index < weight.shape[0])
                index = index.where(here, 0)
            read, own, total, at_index = passes.reduce(product(chunk, weight), index)
            largest = own.clone()
            over.largest(largest)
            share = (own - largest).exp()
            sums = torch.stack((total * share, at_index.where(here, 0)))
            over.total(sums)
            total, at_target = sums
            normaliser = total.log() + largest
            cross_entropy += ((normaliser - at_target) * valid).sum()
            z += (normaliser.square() * valid).sum() * z_loss
            if needs_gradient:
                factor = valid * (1 + 2 * z_loss * normaliser) * share / total
                gradient = passes.gradient(read, own, factor, index, -valid * here).to(hidden.dtype)
                hidden_grad[start : start + rows] = product(gradient, weight.mT)
                weight_grad += product_over_rows(gradient, chunk)
                del gradient
            del read  # the next chunk's logits need no memory beside these
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
        return *gradients, None, None, None


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
        wide = exact(teacher.dtype)
        loss = teacher.new_zeros((), dtype=wide)
        students_grad = torch.empty_like(students) if needs_gradient else None
        weight_grad = zero_sum(weight, wide) if needs_gradient else None
        for start in range(0, len(teacher), rows):
            valid = (targets[start : start + rows, None] != IGNORE).to(wide)
            expected, total, _ = _exponentials_over(product(teacher[start : start + rows], weight).to(wide), over)
            over.total(total)
            expected /= total
            for student, grad in zip(students, students_grad if needs_gradient else students, strict=True):
                chunk = student[start : start + rows]
                logits = product(chunk, weight).to(wide)
                agreement = (expected * logits).sum(1, keepdim=True)
                exponentials, total, largest = _exponentials_over(logits, over)
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


def _exponentials_over(logits: Tensor, over: Over) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - largest) in the logits' place, this slice's sums of them, and the largest of all slices."""
    largest = logits.amax(1, keepdim=True)
    over.largest(largest)
    exponentials = logits.sub_(largest).exp_()
    return exponentials, exponentials.sum(1, keepdim=True), largest
