"""Which elements each rank holds, and what it fills them with."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from runtime.config import ParallelConfig
from runtime.model.config import ModelConfig
from runtime.model.decoder import Decoder
from runtime.model.initialization import initialize
from runtime.parallel.mesh import build, plan_layout
from runtime.parallel.parallelize import materialize, parallelize
from runtime.parallel.shards import local_indices
from tests.workers import run_workers

# (shape, degree of tensor parallelism, its placement, data_replicate); the rest of four ranks shards by FSDP
SHARDED = [
    ((8, 3), 1, None, 1),
    ((10, 3), 1, None, 1),
    ((5, 3), 1, None, 1),
    ((3,), 1, None, 1),
    ((1, 2), 1, None, 1),
    ((7, 2), 1, None, 2),
    ((8, 6), 2, Shard(0), 1),
    ((6, 4), 2, Shard(0), 1),
    ((2, 4), 2, Shard(0), 1),
    ((14, 2), 2, Shard(0), 1),
    ((3, 4), 2, Shard(1), 1),
    ((5,), 2, Replicate(), 1),
    ((8, 2), 2, Shard(0), 2),
]


def compare_indices(rank: int) -> list[tuple[list[int], list[int]]]:
    """For each case what the shard of an arange holds, and what local_indices says it holds."""
    pairs = []
    for shape, tensor, placement, replicate in SHARDED:
        axes = ("data_replicate", "data_shard", "tensor")
        mesh = init_device_mesh("cpu", (replicate, 4 // tensor // replicate, tensor), mesh_dim_names=axes)
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        module = nn.Module()
        module.weight = nn.Parameter(
            whole if placement is None else distribute_tensor(whole, mesh["tensor"], [placement])
        )
        fully_shard(module, mesh=mesh[axes[:2]] if replicate > 1 else mesh["data_shard"])
        pairs.append(_held_and_expected(module.weight, whole))
    return pairs


def compare_placements(rank: int) -> list[tuple[list[int], list[int]]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    placements = [(Shard(0), Shard(1)), (Shard(0), Shard(0)), (Replicate(), Shard(0)), (Shard(1), Replicate())]
    whole = torch.arange(35.0).view(7, 5)
    return [_held_and_expected(distribute_tensor(whole, mesh, each), whole) for each in placements]


def _held_and_expected(tensor, whole):
    expected = whole[torch.meshgrid(*local_indices(tensor), indexing="ij")]
    assert torch.equal(tensor.full_tensor(), whole)
    return tensor.to_local().tolist(), expected.tolist()


@pytest.mark.parametrize("compare", [compare_indices, compare_placements])
def test_local_indices_are_what_a_shard_holds(compare):
    for pairs in run_workers(compare, 4):
        for held, expected in pairs:
            assert held == expected


def test_a_plain_tensor_holds_everything():
    assert [index.tolist() for index in local_indices(torch.zeros(2, 3))] == [[0, 1], [0, 1, 2]]


LAYOUTS = [
    (1, {}),
    (2, {}),
    (4, {}),
    (2, {"tensor": 2}),
    (4, {"tensor": 4}),
    (4, {"data_replicate": 2}),
    (4, {"tensor": 2}),
    (4, {"tensor": 2, "data_replicate": 2}),
]
MODELS = [
    {"vocab_size": 64, "qk_norm": True},
    {"vocab_size": 61, "tie_embeddings": True},
    {"vocab_size": 5, "hidden_size": 20, "head_dim": 6, "intermediate_size": 44, "norm": "layernorm"},
]


def differing_weights(rank: int, world_size: int, options: dict) -> list[str]:
    """Names of the weights that are not bit for bit those of an unsharded decoder."""
    parallel = ParallelConfig(**options)
    differing = []
    for shape in MODELS:
        base = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
        config = ModelConfig(**{**base, **shape})
        expected = Decoder(config)
        initialize(expected, seed=11)
        with torch.device("meta"):
            decoder = Decoder(config)
        mesh = build(plan_layout(parallel, world_size, config, 16, 8), "cpu")
        materialize(parallelize(decoder, mesh, parallel), mesh.device, seed=11)
        assert list(decoder.state_dict()) == list(expected.state_dict())
        for name, weight in decoder.named_parameters():
            full = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            if not torch.equal(full, expected.get_parameter(name)):
                differing.append(name)
    return differing


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS)
def test_every_mesh_starts_from_the_same_weights(world_size, parallel):
    assert run_workers(differing_weights, world_size, world_size, parallel) == [[]] * world_size
