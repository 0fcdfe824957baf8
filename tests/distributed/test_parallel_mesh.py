import pytest
import torch
import torch.distributed as dist

from runtime.config import ParallelConfig
from runtime.model.config import ModelConfig
from runtime.parallel.mesh import build, plan_layout
from tests.workers import run_workers

MODEL = ModelConfig(num_layers=1, hidden_size=32, intermediate_size=48, num_heads=4, vocab_size=64)


def place(rank, world_size, options):
    mesh = build(plan_layout(ParallelConfig(**options), world_size, MODEL, 16, 8), "cpu")
    ranks_of_data = torch.zeros(world_size)
    ranks_of_data[rank] = 1
    dist.all_reduce(ranks_of_data, group=mesh.data_group)
    tensor_rank = 0 if mesh.tensor_group is None else dist.get_rank(mesh.tensor_group)
    return mesh.data_rank, tensor_rank, ranks_of_data.nonzero().flatten().tolist(), mesh.fsdp.mesh_dim_names


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(n, 0, [0, 1, 2, 3]) for n in range(4)]),
        ({"data_replicate": 2}, [(n, 0, [0, 1, 2, 3]) for n in range(4)]),
        ({"tensor": 2}, [(0, 0, [0, 2]), (0, 1, [1, 3]), (1, 0, [0, 2]), (1, 1, [1, 3])]),
        ({"data_replicate": 2, "tensor": 2}, [(0, 0, [0, 2]), (0, 1, [1, 3]), (1, 0, [0, 2]), (1, 1, [1, 3])]),
        ({"tensor": 4}, [(0, n, [n]) for n in range(4)]),
    ],
)
def test_neighbouring_ranks_share_tensors_and_the_others_read_different_data(options, expected):
    places = run_workers(place, 4, 4, options)
    assert [each[:3] for each in places] == expected
    axes = ("data_replicate", "data_shard") if "data_replicate" in options else ("data_shard",)
    assert {each[3] for each in places} == {axes}
