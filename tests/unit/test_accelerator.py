"""A training step on an accelerator mixes no devices and never makes the host wait, whatever the options.

In a process of its own, on tensors that have a device and no data: no GPU is needed, and no kernel runs.
"""

import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch

from runtime.config import OptimConfig, ParallelConfig
from runtime.data.loader import Batch
from runtime.model.config import ModelConfig
from runtime.model.cross_entropy import FUSIBLE
from runtime.model.decoder import Decoder
from runtime.observe.memory import fake_world
from runtime.optim.ages import Ages
from runtime.optim.ema import EMA
from runtime.optim.optimizers import build as build_optimizer
from runtime.optim.regions import Regions
from runtime.parallel.mesh import build, plan_layout
from runtime.parallel.parallelize import parallelize
from runtime.parallel.pieces import Pieces
from runtime.parallel.shards import local
from runtime.resilience.guard import StepGuard
from runtime.step import StepResult, train_step
from tests import accelerator

SHAPE = {
    "vocab_size": 512,
    "num_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "z_loss": 1e-4,
}
BASE = {"base_hidden_size": 32, "base_intermediate_size": 64, "base_num_heads": 2, "base_head_dim": 16}
LOOP = {"plan": "cycle", "loops": 2}
MODELS = {
    "plain": {},
    "streams": {"streams": {"count": 2}},
    "experts": {"experts": {"count": 4, "top_k": 2}},
    "muP, norms": {"qk_norm": True, "sandwich_norm": "branch", "parametrization": {"kind": "mup", **BASE}},
    "depth": {"norm_scaling": "depth", "init": "normal", "tie_embeddings": True},
    "loops": {"tying": {**LOOP, "injection": "add", "own_norms": True, "exit_weight": 0.1}},
    "distillation": {"tying": {**LOOP, "injection": "linear", "exit_weight": 0.1, "exit_distillation": True}},
    "lora": {"tying": {**LOOP, "relaxation": "lora", "rank": 2}},
    "templates": {"templates": 2},
}
MESHES = {
    "one": (1, {}),
    "sharded": (2, {}),
    "replicas": (4, {"data_replicate": 2}),
    "tensor": (4, {"tensor": 2}),
    "recomputed": (2, {"recompute": "full"}),
    "selective": (2, {"recompute": "selective"}),
}
BIRTHS = [{"tokens": 0}, {"tokens": 32, "rewarm": {"start": 0.0, "peak": 1.0, "tokens": 640}}]


@pytest.fixture(scope="module")
def on_accelerator():
    """Calls a function in a process that has the accelerator."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_install) as pool:
        yield lambda *task: pool.submit(_told, *task).result(timeout=300)


def _install():
    global MODE
    torch.set_num_threads(1)
    MODE = accelerator.install()


def _told(function, *arguments):
    """Errors as text: those of torch may not be pickled, and list every kernel that there is."""
    try:
        return function(*arguments)
    except Exception as error:
        frames = "".join(traceback.format_tb(error.__traceback__)[-4:])
        raise AssertionError(f"{type(error).__name__}: {str(error)[:300]}\n{frames}") from None


def step(model, mesh, optim, documents):
    """The devices of what a step of two micro-batches leaves: results, parameters, and state of the optimizer."""
    world_size, parallel = MESHES[mesh]
    config = ModelConfig(**SHAPE | MODELS[model])
    parallel = ParallelConfig(precision="bf16", **parallel)
    with fake_world(world_size):
        mesh = build(plan_layout(parallel, world_size, config, 32, 2 * world_size), accelerator.NAME)
        with torch.device("meta"):
            decoder = Decoder(config)
        parallelize(decoder, mesh, parallel)
        decoder.cross_entropy.passes = FUSIBLE
        with MODE:
            decoder.to_empty(device=accelerator.NAME)
            result, kept = _step(decoder, mesh, OptimConfig(lr=1e-3, name=optim), documents)
            assert all(each.grad is None for each in decoder.parameters())
    left = [each for each in result if each is not None], decoder.parameters(), kept
    return [{each.device.type for each in tensors} for tensors in left]


def _step(decoder, mesh, optim, documents) -> tuple[StepResult, list[torch.Tensor]]:
    parameters = list(decoder.parameters())
    optimizer, ema = build_optimizer(decoder, optim), EMA(decoder, half_life=1000)
    guard = StepGuard(sigma=4.0, window=16, device=mesh.device)
    regions = Regions(decoder, BIRTHS, {})
    name = "embedding.weight"
    regions._ages = {name: _ages(local(decoder.get_parameter(name)))}
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    batch = Batch(tokens, tokens, tokens if documents else None)
    result = train_step(
        decoder,
        parameters,
        [batch, batch],
        judge=guard.judge,
        update=lambda skip: regions.step(optimizer, 64, 128, skip),
        grad_clip=1.0,
        data_group=mesh.data_group,
        pieces=Pieces(decoder, mesh),
    )
    ema.update(128, result.skip)
    return result, [*optimizer.tensors().values(), *ema.tensors().values(), *guard.tensors().values()]


def _ages(shard: torch.Tensor) -> Ages:
    """As `divide` has them of rows of two ages; it reads, once."""
    zeros = partial(torch.zeros, dtype=torch.int64, device=shard.device)
    return Ages([zeros(size) for size in shard.shape], zeros(2, 1), [(1, 0)])


@pytest.mark.parametrize(
    ("model", "mesh", "optim", "documents"),
    [
        *((model, "sharded", "adamw", True) for model in MODELS),
        *(("plain", mesh, "adamw", False) for mesh in MESHES),
        *(("plain", "tensor", optim, False) for optim in ("muon", "schedule_free")),
        *((model, "tensor", "adamw", False) for model in ("streams", "experts", "loops")),
    ],
)
def test_a_step_stays_on_its_device_and_never_waits(model, mesh, optim, documents, on_accelerator):
    assert on_accelerator(step, model, mesh, optim, documents) == [{accelerator.NAME}] * 3


def read():
    with MODE:
        return torch.zeros((), device=accelerator.NAME).item()


def copy():
    with MODE:
        return torch.zeros(2, device=accelerator.NAME).cpu()


def copy_into():
    with MODE:
        return torch.zeros(2).copy_(torch.zeros(2, device=accelerator.NAME))


def mix():
    with MODE:
        return torch.zeros(2, device=accelerator.NAME) + torch.zeros(2)


def test_the_accelerator_refuses_what_a_gpu_would(on_accelerator):
    with pytest.raises(AssertionError, match="DataDependentOutputException"):
        on_accelerator(read)
    for each in (copy, copy_into):
        with pytest.raises(AssertionError, match="the host would wait"):
            on_accelerator(each)
    with pytest.raises(AssertionError, match="at least two devices, phantom:0 and cpu"):
        on_accelerator(mix)
