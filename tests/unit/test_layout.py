import pytest

from runtime.config import ParallelConfig
from runtime.model.config import ModelConfig
from runtime.parallel.mesh import Layout, plan_layout

MODEL = ModelConfig(num_layers=1, hidden_size=48, intermediate_size=96, num_heads=6, num_kv_heads=2, vocab_size=97)


def plan(world_size: int, *, seq_len: int = 32, batch_sequences: int = 16, model: ModelConfig = MODEL, **parallel):
    return plan_layout(ParallelConfig(**parallel), world_size, model, seq_len, batch_sequences)


@pytest.mark.parametrize(
    ("world_size", "parallel", "expected"),
    [
        (1, {}, (1, 1, 1)),
        (8, {}, (1, 8, 1)),
        (8, {"data_shard": 8}, (1, 8, 1)),
        (8, {"tensor": 2}, (1, 4, 2)),
        (8, {"data_replicate": 2}, (2, 4, 1)),
        (8, {"data_replicate": 8}, (8, 1, 1)),
        (8, {"data_replicate": 2, "data_shard": 2, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_the_degrees_multiply_up_to_the_world(world_size, parallel, expected):
    layout = plan(world_size, **parallel)
    assert layout == Layout(world_size, *expected)
    assert layout.data * layout.tensor == world_size


@pytest.mark.parametrize(
    ("world_size", "options", "words"),
    [
        (6, {"tensor": 4}, ["parallel.tensor = 4", "6 processes"]),
        (4, {"data_replicate": 3}, ["parallel.data_replicate = 3", "4 processes"]),
        (2, {"data_replicate": 2, "tensor": 2}, ["is 4", "2 processes"]),
        (8, {"data_shard": 3}, ["parallel.data_shard = 3", "need 3 processes, there are 8", "data_shard = 8"]),
        (8, {"data_shard": 4, "data_replicate": 2, "tensor": 2}, ["need 16 processes, there are 8", "data_shard = 2"]),
        (6, {"tensor": 6}, ["parallel.tensor = 6", "model.num_kv_heads = 2"]),
        (4, {"tensor": 4}, ["parallel.tensor = 4", "model.num_heads = 6"]),
        (
            2,
            {"tensor": 2, "model": MODEL.model_copy(update={"intermediate_size": 95})},
            ["parallel.tensor = 2", "model.intermediate_size = 95"],
        ),
        (2, {"tensor": 2, "seq_len": 31}, ["parallel.tensor = 2", "data.seq_len = 31"]),
        (4, {"batch_sequences": 6}, ["batch.sequences = 6", "4 data-parallel ranks"]),
    ],
)
def test_an_impossible_mesh_is_refused_with_its_key_and_value(world_size, options, words):
    with pytest.raises(ValueError) as refusal:
        plan(world_size, **options)
    for word in words:
        assert word in str(refusal.value)


def test_a_vocabulary_need_not_divide():
    assert plan(2, tensor=2).tensor == 2
