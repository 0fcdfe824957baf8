"""The step-time model: its limits, its arithmetic, the memory formula beside it, and the meshes it proposes."""

import json

import pytest

from benchmarks import cluster_model
from benchmarks.cluster_model import MESHES
from runtime.config import Config, ParallelConfig
from runtime.model.config import ModelConfig
from runtime.model.counts import count, flops_per_token
from runtime.observe.devices import NODES, node_of, peak
from runtime.observe.memory import estimate
from runtime.observe.memory_formula import memory
from runtime.observe.proposal import USABLE, configured, predict, propose
from runtime.observe.step_time import SHARES, Shares, StepTime, collective_seconds, step_time
from runtime.parallel.communication import Batch, Collective, Kind, Network, Purpose, collectives, rank_span
from runtime.parallel.mesh import Layout, plan_layout

H100 = NODES["h100"]
MODEL = ModelConfig(
    num_layers=4, hidden_size=2048, intermediate_size=8192, num_heads=16, num_kv_heads=8, vocab_size=32000
)
NETWORK = Network.of(MODEL)
BATCH = Batch(1, 1, 4096)


def timed(shards: int = 1, replicas: int = 1, tensor: int = 1, batch: Batch = BATCH, **parallel: object) -> StepTime:
    options = ParallelConfig(precision="bf16", tensor=tensor, data_replicate=replicas, **parallel)
    return step_time(NETWORK, options, Layout(shards * replicas * tensor, replicas, shards, tensor), batch, H100)


def config_of(sequences: int, micro: int, model: dict | None = None, **parallel: object) -> Config:
    raw = {
        "run": {"name": "meshes"},
        "model": {**MODEL.model_dump(), **(model or {})},
        "data": {"sources": [{"path": "absent"}], "seq_len": 4096},
        "batch": {"sequences": sequences, "micro_sequences": micro},
        "optim": {"lr": 1e-3},
        "schedule": {"horizon": "10B"},
        "parallel": {"precision": "bf16", **parallel},
    }
    return Config.model_validate(raw)


def layout_of(config: Config, world_size: int) -> Layout:
    return plan_layout(config.parallel, world_size, config.model, config.data.seq_len, config.batch.sequences)


@pytest.mark.parametrize("recompute, blocks", [("none", 3), ("selective", 3), ("full", 4)])
def test_one_rank_computes_and_sends_nothing(recompute, blocks):
    found = timed(recompute=recompute)
    head = 6 * MODEL.hidden_size * MODEL.vocab_size
    flops = (flops_per_token(MODEL, 4096) - head) * blocks / 3 + head
    rate = peak(H100.device, "bf16").flops * SHARES.compute
    assert found.seconds == pytest.approx(4096 * flops / rate)
    assert found.communication == found.exposed == found.share == 0
    assert found.mfu == pytest.approx(SHARES.compute * flops_per_token(MODEL, 4096) / flops)


@pytest.mark.parametrize("shards", [2, 8, 64])
def test_what_a_shard_sends_is_the_ring_formula(shards):
    """Parameters twice in bf16, those of the root once, gradients once in float32: each (n - 1) / n of them."""
    layout = Layout(shards, 1, shards, 1)
    found = collectives(NETWORK, ParallelConfig(precision="bf16"), layout, BATCH, device_type="cuda")
    sharding = [each for each in found if each.purpose in (Purpose.PARAMETERS, Purpose.GRADIENTS)]
    root = 2 * MODEL.vocab_size * MODEL.hidden_size + MODEL.hidden_size
    total = count(MODEL).total
    assert sum(each.payload * each.count for each in sharding) == 2 * (2 * (total - root) + root) + 4 * total


def test_a_ring_and_a_tree():
    """By hand: 7/8 of a GB over 0.8 of 450 GB/s and seven hops; a sum of four bytes takes the tree."""
    layout = Layout(8, 1, 8, 1)
    gather = Collective(Kind.ALL_GATHER, ("data_shard",), 10**9, 1, Purpose.PARAMETERS)
    assert collective_seconds(gather, layout, H100) == pytest.approx(7 / 8 * 1e9 / 360e9 + (8.4 + 7 * 3.4) * 1e-6)
    large = Collective(Kind.ALL_REDUCE, ("data_shard",), 10**9, 1, Purpose.GRADIENTS)
    assert collective_seconds(large, layout, H100) == pytest.approx(14 / 8 * 1e9 / 360e9 + (8.4 + 14 * 3.4) * 1e-6)
    small = Collective(Kind.ALL_REDUCE, ("data_shard",), 4, 1, Purpose.SCALARS)
    assert collective_seconds(small, layout, H100) == pytest.approx((4.4 + 14 * 0.52 * 1.8) * 1e-6, rel=1e-3)


@pytest.mark.parametrize(
    "layout, axes, ranks, bandwidth",
    [
        (Layout(8, 1, 8, 1), ("data_shard",), list(range(8)), 450e9),
        (Layout(8, 1, 2, 4), ("tensor",), [0, 1, 2, 3], 450e9),
        (Layout(8, 1, 2, 4), ("data_shard",), [0, 4], 450e9),
        (Layout(16, 1, 16, 1), ("data_shard",), list(range(16)), 400e9),
        (Layout(16, 1, 2, 8), ("data_shard",), [0, 8], 50e9),
        (Layout(32, 4, 8, 1), ("data_replicate",), [0, 8, 16, 24], 50e9),
        (Layout(32, 4, 4, 2), ("data_replicate", "data_shard"), list(range(0, 32, 2)), 200e9),
    ],
)
def test_a_group_has_the_links_of_its_place(layout, axes, ranks, bandwidth):
    """Inside a machine its own links; between machines, the ports of the members that one machine has."""
    assert rank_span(layout, axes) == ranks
    whole = Shares(bandwidth=1.0)
    short, long = (
        collective_seconds(Collective(Kind.ALL_GATHER, axes, size, 1, Purpose.PARAMETERS), layout, H100, whole)
        for size in (10**9, 2 * 10**9)
    )
    assert long - short == pytest.approx((len(ranks) - 1) / len(ranks) * 1e9 / bandwidth)


def test_more_ranks_take_less_time_until_communication_is_left():
    """A batch of 64 sequences on 1 to 64 ranks: always faster, ever further from proportional."""
    ranks = [1, 2, 4, 8, 16, 32, 64]
    times = [timed(each, batch=Batch(64 // each, 1, 4096)).seconds for each in ranks]
    assert times == sorted(times, reverse=True)
    assert all(more <= less + 1e-12 for less, more in zip(_efficiency(times), _efficiency(times)[1:], strict=False))
    # The same tokens cut ever finer do not: in the end a step is its communication.
    short = [timed(each, batch=Batch(1, 1, 65536 // each)) for each in (8, 64, 512, 4096)]
    shares = [each.share for each in short]
    assert shares == sorted(shares) and shares[0] < 0.1 and shares[-1] > 0.9
    assert short[-1].seconds > short[-2].seconds


def _efficiency(times: list[float]) -> list[float]:
    return [times[0] / time / 2**power for power, time in enumerate(times)]


def test_gathers_hide_behind_compute_and_tensor_parallelism_does_not():
    sharded, split = timed(8, batch=Batch(1, 4, 4096)), timed(1, tensor=8, batch=Batch(1, 4, 4096))
    assert sharded.exposed < 0.5 * sharded.communication
    assert split.exposed == pytest.approx(split.communication)
    kept = timed(8, batch=Batch(8, 4, 4096), reshard_after_forward=False)
    assert kept.communication < timed(8, batch=Batch(8, 4, 4096)).communication


def test_replicas_reduce_once_a_step():
    """Between machines: sharded over all of them, each micro-batch crosses the network; replicated, the last one."""
    many = Batch(8, 1, 4096)
    assert timed(8, replicas=16, batch=many).communication < timed(128, batch=many).communication


def test_an_unknown_device_is_not_guessed():
    for name, node in NODES.items():
        assert node_of(name) is node_of(name.upper()) is node_of(node.device) is node
        assert peak(node.device, "bf16") is not None and node.source
    assert node_of("h1000") is node_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None


FITTED = {
    "sharded": (8, 16, 2, {}, {}),
    "split": (8, 4, 2, {}, {"tensor": 4}),
    "split, selectively": (8, 4, 2, {}, {"tensor": 4, "recompute": "selective"}),
    "recomputed, accumulated": (8, 64, 4, {}, {"recompute": "full"}),
    "kept gathered, replicas": (
        16,
        32,
        2,
        {},
        {"recompute": "full", "reshard_after_forward": False, "data_replicate": 2},
    ),
    "compiled, a large head": (8, 8, 1, {"vocab_size": 128256}, {"compile": True}),
    "tied": (8, 16, 2, {"tying": {"plan": "cycle", "loops": 2}}, {"recompute": "selective"}),
}
"""World size, sequences, those of a micro-batch, model and parallel options."""


@pytest.mark.parametrize("case", FITTED)
def test_the_memory_formula_is_within_a_tenth_of_the_trace(case):
    world_size, sequences, micro, model, parallel = FITTED[case]
    config = config_of(sequences, micro, model, **parallel)
    present = configured(config, layout_of(config, world_size))
    found = memory(Network.of(config.model), present.parallel, present.layout, present.batch)
    traced = estimate(config, present.layout, device_type="cuda").total
    assert found == pytest.approx(traced, rel=0.1)


def proposed(config: Config, world_size: int, node=H100):
    network, present = Network.of(config.model), configured(config, layout_of(config, world_size))
    traced = estimate(config, present.layout, device_type="cuda").total
    return network, present, traced, propose(config, network, present, traced, node)


def test_a_faster_mesh_is_named_and_fits():
    config = config_of(16, 1, tensor=8, recompute="full")
    network, present, _, found = proposed(config, 8)
    assert found.candidate.layout.tensor == 1 and found.candidate.parallel.recompute == "none"
    assert found.time.tokens_per_second > 1.2 * predict(config, network, present, H100).tokens_per_second
    assert found.memory <= USABLE * H100.memory
    assert {"parallel.tensor=1", "parallel.recompute=none"} <= set(found.candidate.keys(present))


def test_what_is_proposed_has_nothing_better():
    config = config_of(16, 1, tensor=8, recompute="full")
    *_, found = proposed(config, 8)
    parallel = found.candidate.parallel
    again = config_of(
        16,
        found.candidate.batch.sequences,
        **{key: getattr(parallel, key) for key in ("tensor", "data_replicate", "recompute", "reshard_after_forward")},
    )
    assert proposed(again, 8)[-1] is None


def test_a_mesh_that_does_not_fit_is_replaced_by_one_that_does():
    config = config_of(512, 64)
    *_, traced, found = proposed(config, 8)
    assert traced > H100.memory
    assert found.memory <= USABLE * H100.memory and found.candidate.batch.sequences < 64


def test_loops_of_no_fixed_number_get_no_proposal():
    tying = {"plan": "cycle", "loops": 2, "sampling": "poisson"}
    config = config_of(4, 1, {"tying": tying}, tensor=2)
    present = configured(config, layout_of(config, 2))
    assert propose(config, Network.of(config.model), present, 10**9, H100) is None


def test_the_table_of_large_models(tmp_path, capsys):
    """A model that does not fit has a line without numbers; the file has the rows of the table."""
    options = ["--models", "1B", "70B", "--devices", "16", "--sequences", "64", "--json", str(tmp_path / "rows.json")]
    assert cluster_model.main(options) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["model"], row["mesh"]) for row in rows] == [(m, mesh) for m in ("1B", "70B") for mesh in MESHES]
    assert printed.count("does not fit") == 3 and all(row["seconds"] is None for row in rows[3:])
    sharded, _, split = rows[:3]
    assert sharded["waiting"] < split["waiting"] and sharded["tokens_per_second"] > split["tokens_per_second"]
    assert f"{sharded['tokens_per_second']:,.0f}" in printed
    assert cluster_model.main(["--device", "h1000"]) == 2


@pytest.mark.parametrize(
    ("devices", "sequences", "missing"),
    [
        (8, 64, {"HSDP": "two or more whole machines of 8 devices"}),
        (12, 96, {"HSDP": "two or more whole machines of 8 devices", "FSDP x TP 8": "parallel.tensor = 8"}),
        (24, 96, {}),
        (24, 64, dict.fromkeys(("FSDP", "HSDP", "FSDP x TP 8"), "batch.sequences = 64")),
        (4, 64, {"HSDP": "two or more whole machines of 8 devices", "FSDP x TP 8": "does not divide the 4 processes"}),
    ],
)
def test_the_table_tells_no_such_mesh_from_one_that_does_not_fit(devices, sequences, missing, capsys):
    """HSDP on one machine would be FSDP."""
    assert cluster_model.main(["--models", "1B", "--devices", str(devices), "--sequences", str(sequences)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("1B")]
    found = {mesh: line for mesh in MESHES for line in lines if f"  {mesh}  " in line}
    assert len(lines) == len(found) == len(MESHES)
    assert {mesh for mesh, line in found.items() if "no such mesh" in line} == set(missing)
    assert all(missing[mesh] in found[mesh] for mesh in missing)
    assert not any("does not fit" in line for line in lines)


@pytest.mark.parametrize("option", ["--devices", "--sequences", "--seq-len"])
@pytest.mark.parametrize("value", ["0", "-8", "1.5", "many"])
def test_the_table_refuses_what_is_no_number_of_something(option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        cluster_model.main([f"{option}={value}"])
    assert ended.value.code == 2
    assert f"{option}: {value}: accepted are whole numbers from 1 on" in capsys.readouterr().err
