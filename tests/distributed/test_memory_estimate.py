"""The dry run's memory against the CPU allocator's own count of a real step."""

import gc

import pytest
import torch
from torch._C._profiler import _EventType

from runtime.config import Config
from runtime.data.loader import Batch
from runtime.model.config import ModelConfig
from runtime.model.counts import count
from runtime.model.decoder import Decoder
from runtime.observe.memory import estimate, fake_world, micro_batches
from runtime.optim.ema import EMA
from runtime.optim.optimizers import build as build_optimizer
from runtime.parallel.mesh import build, plan_layout
from runtime.parallel.parallelize import materialize, parallelize
from runtime.step import train_step
from tests.distributed.parity import every_bool, nested
from tests.workers import run_workers

WIDE = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 1024}
DEEP = {"num_layers": 8, "hidden_size": 64, "intermediate_size": 192, "vocab_size": 512}
SMALL = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 192, "vocab_size": 512}
VOCABULARY = {"num_layers": 1, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 8192}

CASES = [
    (1, {"model": WIDE}),
    (1, {"model": WIDE, "parallel": {"recompute": "full"}}),
    (1, {"model": WIDE, "parallel": {"recompute": "selective"}}),
    (1, {"model": WIDE, "parallel": {"precision": "bf16"}}),
    (1, {"model": WIDE, "seq_len": 256}),
    (1, {"model": WIDE, "seq_len": 256, "parallel": {"recompute": "selective"}}),
    (1, {"model": DEEP, "batch": {"sequences": 8, "micro_sequences": 2}}),
    (1, {"model": VOCABULARY, "batch": {"sequences": 2}}),
    (1, {"model": {**WIDE, "tie_embeddings": True, "qk_norm": True}, "optim": {"lr": 1e-3, "ema_half_life": 1000}}),
    (1, {"model": {**WIDE, "templates": 2}, "parallel": {"precision": "bf16"}}),
    (2, {"model": WIDE}),
    (2, {"model": WIDE, "parallel": {"precision": "bf16", "recompute": "full"}}),
    (2, {"model": {**DEEP, "templates": 3}}),
    (2, {"model": DEEP, "parallel": {"recompute": "full"}}),
    (2, {"model": VOCABULARY, "batch": {"sequences": 4, "micro_sequences": 1}}),
    (2, {"model": WIDE, "parallel": {"tensor": 2}}),
    (2, {"model": WIDE, "parallel": {"tensor": 2, "recompute": "full"}}),
    (2, {"model": WIDE, "seq_len": 256, "parallel": {"tensor": 2}}),
    (2, {"model": VOCABULARY, "batch": {"sequences": 2}, "parallel": {"tensor": 2}}),
    (4, {"model": WIDE, "parallel": {"tensor": 2, "recompute": "selective"}}),
    (4, {"model": {**WIDE, "templates": 2}, "parallel": {"tensor": 2, "recompute": "full"}}),
    (4, {"model": WIDE, "parallel": {"data_replicate": 2, "reshard_after_forward": False}}),
    (2, {"model": {**DEEP, "tying": {"plan": "cycle", "loops": 4, "relaxation": "lora", "exit_weight": 0.1}}}),
    (1, {"model": {**DEEP, "tying": {"plan": "cycle", "loops": 4, "backprop_loops": 2, "injection": "add"}}}),
    (1, {"model": {**WIDE, "streams": {"count": 2, "backbone": "frozen"}}}),
    (2, {"model": {**WIDE, "experts": {"count": 4}}, "parallel": {"recompute": "selective"}}),
    (2, {"model": {**SMALL, **nested(every_bool(ModelConfig))}, "parallel": {"tensor": 2}}),
]
ON_GLOO = [(2, {"model": WIDE}), (2, {"model": WIDE, "parallel": {"tensor": 2, "recompute": "full"}})]


def config_of(changes: dict) -> Config:
    raw = {
        "run": {"name": "memory"},
        "model": {"num_layers": 3, "num_heads": 4, "num_kv_heads": 2, **changes["model"]},
        "data": {"sources": [{"path": "unused"}], "seq_len": changes.get("seq_len", 128)},
        "batch": changes.get("batch", {"sequences": 8}),
        "optim": changes.get("optim", {"lr": 1e-3}),
        "schedule": {"horizon": 100_000},
        "parallel": changes.get("parallel", {}),
    }
    return Config.model_validate(raw)


def layout_of(config: Config, world_size: int):
    return plan_layout(config.parallel, world_size, config.model, config.data.seq_len, config.batch.sequences)


def measured_peak(rank: int, config: Config) -> int:
    """Bytes that the CPU allocator holds at most while this rank builds a run and takes two steps."""
    gc.collect()  # what an earlier test left must not be freed in between
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        base = torch.ones(1000)
        _train(config, torch.distributed.get_world_size())
    levels = list(levels_of(recorded.profiler.kineto_results.experimental_event_tree()))
    return max(levels) - (levels[0] - base.nbytes)


def levels_of(events):
    """What the allocator holds after each of its allocations."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.extra_fields.total_allocated
        yield from levels_of(event.children)


def _train(config: Config, world_size: int) -> None:
    layout = layout_of(config, world_size)
    mesh = build(layout, "cpu")
    with torch.device("meta"):
        decoder = Decoder(config.model)
    decoder = parallelize(decoder, mesh, config.parallel)
    materialize(decoder, mesh.device, seed=0)
    optimizer = build_optimizer(decoder, config.optim)
    ema = EMA(decoder, config.optim.ema_half_life) if config.optim.ema_half_life else None

    number, sequences = micro_batches(config, layout)
    tokens = torch.randint(config.model.vocab_size, (sequences, config.data.seq_len))
    for _ in range(2):
        result = train_step(
            decoder,
            list(decoder.parameters()),
            [Batch(tokens, tokens, None)] * number,
            judge=lambda loss, norm: torch.zeros(()),
            update=optimizer.step,
            grad_clip=1.0,
            data_group=mesh.data_group,
        )
        if ema is not None:
            ema.update(config.batch.sequences * config.data.seq_len, result.skip)


@pytest.mark.parametrize("world_size, changes", CASES)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(world_size, changes):
    """One rank on real tensors. Its collectives are no-ops: gloo's copy what they send, a GPU's do not."""
    config = config_of(changes)
    with fake_world(world_size):
        measured = measured_peak(0, config)
    estimated = estimate(config, layout_of(config, world_size))
    assert estimated.total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("world_size, changes", ON_GLOO)
def test_real_processes_need_the_estimate_and_the_copies_of_gloo(world_size, changes):
    """The least of a few tries: how many of the copies are held at once is by chance, half as much again at times."""
    config = config_of(changes)
    measured = min(max(run_workers(measured_peak, world_size, config)) for _ in range(5))
    estimated = estimate(config, layout_of(config, world_size))
    assert estimated.total / 1.1 < measured < estimated.total * 1.4


def test_kinds_follow_from_the_shapes():
    config = config_of({"model": WIDE, "optim": {"lr": 1e-3, "ema_half_life": 1000}})
    by_kind = estimate(config, layout_of(config, 2)).by_kind
    shards = 4 * count(config.model).total / 2
    assert by_kind["parameters"] == by_kind["ema"] == pytest.approx(shards, rel=0.01)
    assert by_kind["optimizer"] == pytest.approx(2 * shards, rel=0.01)


def test_tied_blocks_are_held_once():
    config = config_of({"model": {**DEEP, "tying": {"plan": "cycle", "loops": 4}}})
    by_kind = estimate(config, layout_of(config, 2)).by_kind
    shards = 4 * count(config.model).total / 2
    assert by_kind["parameters"] == pytest.approx(shards, rel=0.01)
    assert by_kind["optimizer"] == pytest.approx(2 * shards, rel=0.01)


def test_sampled_loops_need_the_memory_of_the_most_that_are_drawn():
    tying = {"plan": "cycle", "loops": 2}
    fixed, most, sampled = (
        estimate(config, layout_of(config, 1)).by_kind["activations"]
        for config in (
            config_of({"model": {**SMALL, "num_layers": depth, "tying": {**tying, **changes}}})
            for depth, changes in ((2, {}), (8, {"loops": 8}), (2, {"sampling": "poisson"}))
        )
    )
    assert sampled == most > 2 * fixed


def test_a_gpu_keeps_no_probabilities():
    config = config_of({"model": WIDE, "seq_len": 512, "parallel": {"precision": "fp32"}})
    cpu, gpu = (
        estimate(config, layout_of(config, 1), device_type=device).by_kind["activations"] for device in ("cpu", "cuda")
    )
    sequences, layers, heads = 8, 3, 4
    probabilities = 4 * sequences * layers * heads * sum(64 * end for end in range(64, 513, 64))
    assert cpu - gpu > 0.8 * probabilities


def test_a_gpu_keeps_keys_and_values_that_are_repeated_for_a_mask():
    model = {**WIDE, "num_kv_heads": 1}
    config = config_of({"model": model, "seq_len": 512, "parallel": {"precision": "bf16"}})
    masked = config.model_copy(update={"data": config.data.model_copy(update={"document_mask": True})})
    cpu, gpu = (
        [estimate(each, layout_of(each, 1), device_type=device).by_kind["activations"] for each in (config, masked)]
        for device in ("cpu", "cuda")
    )
    sequences, layers, more_heads, head_dim = 8, 3, 3, 32
    repeated = 2 * 2 * sequences * 512 * layers * more_heads * head_dim
    assert (gpu[1] - gpu[0]) - (cpu[1] - cpu[0]) == repeated


def test_recomputation_keeps_less_and_in_order():
    totals = [
        estimate(config, layout_of(config, 1)).by_kind["activations"]
        for mode in ("none", "selective", "full")
        for config in [config_of({"model": DEEP, "parallel": {"recompute": mode}})]
    ]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0] / 2
