"""Cross-entropy of a linear head over the ranks of a tensor-parallel group.

Both take the hidden state [n, h] and the weight [V, h] as DTensors on one axis, the targets [n] whole on each rank, and
return the sums of `LinearCrossEntropy`, equal on each rank.
"""

from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

from runtime.model.cross_entropy import LinearCrossEntropy, Loss, Over, distill


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
        mesh = weight.device_mesh
        first = mesh.get_local_rank() * (weight.shape[0] // mesh.size())
        hidden = hidden.to_local(grad_placements=[Partial()])
        return self.of_slice(hidden, weight.to_local(), targets, z_loss, first, _over(mesh))

    def distilled(self, students: Sequence[DTensor], teacher: DTensor, weight: DTensor, targets: Tensor) -> Tensor:
        students = [each.to_local(grad_placements=[Partial()]) for each in students]
        over, weight = _over(weight.device_mesh), weight.to_local()
        rows = self.chunk_rows(teacher.device, 2 * weight.shape[0])
        return distill(students, teacher.to_local(), weight, targets, rows, over)


def _over(mesh: DeviceMesh) -> Over:
    reduce = partial(dist.all_reduce, group=mesh.get_group())
    return Over(partial(reduce, op=dist.ReduceOp.MAX), reduce)
