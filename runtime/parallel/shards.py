"""Which elements of a distributed tensor this rank holds."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def local_indices(tensor: Tensor) -> list[Tensor]:
    """For each dim the global indices of this rank's shard, int64 and ascending; empty where it holds nothing, and all
    of them for a tensor that is not distributed.

    FSDP over tensor parallelism shards from the last axis to the first, which a placement tells by its strides:
    such an axis divides what the axes after it have left. Every division is torch.chunk's: equal pieces, the last
    one shorter, and none for the ranks after it.
    """
    indices = [torch.arange(size) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return indices
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not part of the tensor's mesh"
    sharded = [(axis, place) for axis, place in enumerate(tensor.placements) if not place.is_replicate()]
    in_order = [each for each in sharded if not isinstance(each[1], _StridedShard)]
    strided = [each for each in sharded if isinstance(each[1], _StridedShard)]
    for axis, placement in in_order + strided[::-1]:
        assert isinstance(placement, Shard | _StridedShard), f"{placement} holds no elements of its own"
        parts = tensor.device_mesh.size(axis)
        indices[placement.dim] = _chunk(indices[placement.dim], parts, coordinate[axis])
    return indices


def _chunk(index: Tensor, parts: int, which: int) -> Tensor:
    length = -(-len(index) // parts)
    return index[which * length : (which + 1) * length]
