"""That a training step issues the collectives which `runtime.parallel.communication` says, to the call and the byte."""

from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import torch

from runtime.config import OptimConfig, ParallelConfig
from runtime.data.loader import Batch
from runtime.model.config import ModelConfig
from runtime.model.decoder import Decoder
from runtime.observe.memory import fake_world
from runtime.optim.optimizers import build as build_optimizer
from runtime.parallel import communication
from runtime.parallel.communication import Kind, Network, Purpose, collectives, totals
from runtime.parallel.mesh import AXES, Layout, build, plan_layout
from runtime.parallel.parallelize import materialize, parallelize
from runtime.parallel.pieces import Pieces
from runtime.step import train_step
from tests.collectives import Recorder
from tests.distributed import parity
from tests.workers import run_workers

LENGTH = 16
SHAPE = {"num_layers": 3, "hidden_size": 36, "intermediate_size": 50, "num_heads": 6, "num_kv_heads": 2}
"""Neither the hidden nor the intermediate size is a multiple of every number of shards."""
CYCLE = {"num_layers": 4, "tying": {"plan": "cycle", "loops": 2}}


@dataclass(frozen=True)
class Case:
    model: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    sequences: int = 1
    measures_noise: bool = True
    chunk_elements: int | None = None
    loops: int | None = None


PAIRS = {
    "fsdp 2": Case(),
    "fsdp 2, bf16, two micro-batches": Case({}, {"precision": "bf16"}, micro_batches=2),
    "fsdp 2, kept gathered, one head with the embedding": Case(
        {"tie_embeddings": True}, {"reshard_after_forward": False}, micro_batches=2
    ),
    "fsdp 2, recomputed, no noise scale": Case({}, {"recompute": "full"}, measures_noise=False),
    "fsdp 2, tied": Case(CYCLE),
    "fsdp 2, tied apart": Case(CYCLE, {"looped_blocks": "apart", "recompute": "full"}, micro_batches=2),
    "fsdp 2, tied, more loops": Case(CYCLE, {}, loops=5),
    "replicas 2": Case({}, {"data_replicate": 2}, micro_batches=2),
    "tp 2": Case({}, {"tensor": 2}),
    "tp 2, bf16, chunks of the loss": Case({}, {"tensor": 2, "precision": "bf16"}, 2, 3, chunk_elements=32 * 20),
    "tp 2, recomputed": Case({}, {"tensor": 2, "recompute": "full"}, sequences=2),
    "tp 2, selectively": Case({}, {"tensor": 2, "recompute": "selective"}, sequences=2),
    "tp 2, a vocabulary that does not divide": Case({"vocab_size": 61}, {"tensor": 2}, micro_batches=2),
    "tp 2, tied, norms of queries": Case({**CYCLE, "qk_norm": True}, {"tensor": 2}, measures_noise=False),
}
FOURS = {
    "fsdp 4, uneven": Case({"vocab_size": 61}),
    "fsdp 4, two micro-batches, recomputed": Case({}, {"recompute": "full", "precision": "bf16"}, micro_batches=2),
    "hsdp 2x2": Case({}, {"data_replicate": 2}, micro_batches=2),
    "hsdp 2x2, tied": Case(CYCLE, {"data_replicate": 2}, measures_noise=False),
    "fsdp 2 x tp 2": Case({}, {"tensor": 2}, micro_batches=2),
    "fsdp 2 x tp 2, recomputed": Case({"qk_norm": True}, {"tensor": 2, "recompute": "full"}),
    "fsdp 2 x tp 2, tied apart": Case(CYCLE, {"tensor": 2, "looped_blocks": "apart", "recompute": "selective"}),
    "replicas 2 x tp 2": Case({}, {"data_replicate": 2, "tensor": 2}),
}
EXPERTS = {
    "experts, fsdp 2 x tp 2": Case({"experts": {"count": 3}}, {"tensor": 2}, micro_batches=2),
}


def model_of(case: Case) -> ModelConfig:
    return ModelConfig(**{**SHAPE, "head_dim": 6, "vocab_size": 64, **case.model})


def layout_of(case: Case, world_size: int) -> Layout:
    return plan_layout(ParallelConfig(**case.parallel), world_size, model_of(case), LENGTH, 2 * world_size)


def counted(case: Case, world_size: int) -> dict[str, Any]:
    """What this rank's training step of a case issues."""
    parallel = ParallelConfig(**case.parallel)
    mesh = build(layout_of(case, world_size), "cpu")
    with torch.device("meta"):
        decoder = Decoder(model_of(case))
    decoder.cross_entropy.chunk_elements = case.chunk_elements
    materialize(parallelize(decoder, mesh, parallel), mesh.device, seed=0)
    optimizer = build_optimizer(decoder, OptimConfig(lr=1e-3))
    tokens = torch.zeros(case.sequences, LENGTH, dtype=torch.int64)
    with Recorder(mesh) as recorder:
        train_step(
            decoder,
            list(decoder.parameters()),
            [Batch(tokens, tokens, None)] * case.micro_batches,
            judge=lambda loss, norm: torch.zeros_like(loss),
            update=optimizer.step,
            grad_clip=1.0,
            data_group=mesh.data_group,
            loops=case.loops,
            pieces=Pieces(decoder, mesh) if case.measures_noise else None,
        )
    return recorder.totals


def foretold(case: Case, world_size: int) -> dict[str, Any]:
    network = Network.of(model_of(case), case.loops)
    batch = communication.Batch(case.micro_batches, case.sequences, LENGTH)
    parallel, layout = ParallelConfig(**case.parallel), layout_of(case, world_size)
    options = {"measures_noise": case.measures_noise, "chunk_elements": case.chunk_elements}
    return totals(collectives(network, parallel, layout, batch, device_type="cpu", **options))


def count_all(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any]]:
    return [counted(case, world_size) for case in cases]


@pytest.mark.parametrize("world_size, cases", [(2, PAIRS), (4, FOURS | EXPERTS)])
def test_a_step_on_gloo_issues_what_is_foretold_on_every_rank(world_size, cases):
    by_rank = run_workers(count_all, world_size, world_size, list(cases.values()))
    for number, (name, case) in enumerate(cases.items()):
        for found in by_rank:
            assert found[number] == foretold(case, world_size), name


OPTIONS = {
    f"{path} = {value}": parity.nested({"num_layers": 2, "init_std": 0.1, **companions, path: value})
    for path, value, companions in parity.enumerated(ModelConfig)
}
"""Each value of each option of a model, with what it needs."""


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_a_model_is_foretold(option):
    """On a group that moves nothing and issues the same."""
    case = Case(OPTIONS[option], {"tensor": 2, "recompute": "full"})
    with fake_world(4):
        found = counted(case, 4)
    assert found == foretold(case, 4)


def test_one_process_sends_nothing():
    assert foretold(Case(micro_batches=4), 1) == {}
    with fake_world(1):
        assert counted(Case(micro_batches=4), 1) == {}


def test_a_wrong_shape_would_be_seen():
    """The comparison is not of two empty things: a wider block, and one that is gathered once more, differ."""
    case = Case()
    assert foretold(case, 2) != foretold(Case({"intermediate_size": 52}), 2)
    assert foretold(case, 2) != foretold(Case({}, {"reshard_after_forward": False}), 2)
    assert set(foretold(case, 2)) == {(kind, ("data_shard",)) for kind in Kind}


def test_each_collective_says_what_it_carries():
    case = Case({}, {"tensor": 2, "data_replicate": 2}, micro_batches=2)
    batch = communication.Batch(2, 1, LENGTH)
    layout = layout_of(case, 8)
    found = collectives(Network.of(model_of(case)), ParallelConfig(**case.parallel), layout, batch, device_type="cuda")
    axes = {purpose: {each.axes for each in found if each.purpose is purpose} for purpose in Purpose}
    assert axes == {
        Purpose.PARAMETERS: {("data_shard",)},
        Purpose.GRADIENTS: {("data_shard",), ("data_replicate",)},
        Purpose.ACTIVATIONS: {("tensor",)},
        Purpose.WHOLE_WEIGHTS: {("tensor",)},
        Purpose.LOSS: {("tensor",)},
        Purpose.SCALARS: {("data_replicate", "data_shard"), AXES},
    }
    assert all(asdict(each)["count"] > 0 and each.payload > 0 for each in found)
