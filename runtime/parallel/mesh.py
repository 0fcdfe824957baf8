"""The device mesh: which processes share data, shards and tensors."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from runtime.config import ParallelConfig
from runtime.model.config import ModelConfig
from runtime.parallel.float8 import refuse_float8

AXES = ("data_replicate", "data_shard", "tensor")


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; their product is the world size. Neighbouring ranks share tensors, then shards."""

    world_size: int
    data_replicate: int
    data_shard: int
    tensor: int

    @property
    def data(self) -> int:
        """Number of ranks that read different sequences."""
        return self.data_replicate * self.data_shard


def plan_layout(parallel: ParallelConfig, world_size: int, model: ModelConfig, seq_len: int, *batches: int) -> Layout:
    """The layout a configuration asks for on `world_size` processes, for global batches of so many sequences, the first
    one first. ValueError for one that cannot be built."""
    replicate, tensor = parallel.data_replicate, parallel.tensor
    if world_size % (replicate * tensor):
        raise ValueError(
            f"parallel.data_replicate = {replicate} times parallel.tensor = {tensor} is {replicate * tensor}, "
            f"which does not divide the {world_size} processes"
        )
    left = world_size // (replicate * tensor)
    shard = left if parallel.data_shard == "auto" else parallel.data_shard
    if shard != left:
        raise ValueError(
            f"parallel.data_shard = {shard}, data_replicate = {replicate} and tensor = {tensor} need "
            f"{shard * replicate * tensor} processes, there are {world_size}; "
            f'accepted here: data_shard = {left} or "auto"'
        )
    split = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads,
        "model.intermediate_size": model.intermediate_size,
        "data.seq_len": seq_len,
    }
    for key, value in split.items():
        if value % tensor:
            raise ValueError(f"parallel.tensor = {tensor} does not divide {key} = {value}, which it splits evenly")
    if uneven := [sequences for sequences in batches if sequences % (replicate * shard)]:
        named = "batch.sequences =" if uneven[0] == batches[0] else "the batch comes to a size that cannot be shared:"
        raise ValueError(
            f"{named} {uneven[0]} is not a multiple of the {replicate * shard} data-parallel ranks "
            f"(data_replicate = {replicate} times data_shard = {shard})"
        )
    refuse_float8(parallel, model, seq_len)
    return Layout(world_size, replicate, shard, tensor)


@dataclass(frozen=True)
class Mesh:
    """A layout over the processes of the default group, and this rank's place in it."""

    layout: Layout
    device_mesh: DeviceMesh
    """Axes `AXES`, all of them, also where the degree is 1."""
    device: torch.device
    data_rank: int
    """Which slice of a global batch this rank reads: 0 .. layout.data - 1."""
    data_group: dist.ProcessGroup
    """The ranks that read different sequences of one batch."""
    tensor_group: dist.ProcessGroup | None
    """The ranks that share this rank's sequences; None where the degree is 1."""

    @property
    def fsdp(self) -> DeviceMesh:
        """The mesh of `fully_shard`: (replicate, shard), or only the shards where there are no replicas."""
        return self.device_mesh[AXES[:2]] if self.layout.data_replicate > 1 else self.device_mesh["data_shard"]


def build(layout: Layout, device_type: str) -> Mesh:
    """Place a layout on the default process group; a collective. On GPUs a rank takes its current device."""
    degrees = (layout.data_replicate, layout.data_shard, layout.tensor)
    if device_type == "cpu":
        device = torch.device("cpu")
    else:
        device = torch.device(device_type, getattr(torch, device_type).current_device())
    device_mesh = init_device_mesh(device_type, degrees, mesh_dim_names=AXES)
    data = device_mesh[AXES[:2]]._flatten("data") if layout.data_replicate > 1 else device_mesh["data_shard"]
    return Mesh(
        layout=layout,
        device_mesh=device_mesh,
        device=device,
        data_rank=data.get_local_rank(),
        data_group=data.get_group(),
        tensor_group=device_mesh.get_group("tensor") if layout.tensor > 1 else None,
    )
