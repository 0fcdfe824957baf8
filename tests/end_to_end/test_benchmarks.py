"""The benchmarks run: each on the smallest shape, with few rounds."""

import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import architecture, bench, extras, floor, noise_scale, overhead, throughput, tiled_attention
from benchmarks.bench import SHAPES, batches
from runtime.observe.memory import fake_world
from runtime.parallel.mesh import build, plan_layout

TINY = ["--shape", "tiny", "--threads", "1"]
CPU = torch.device("cpu")


@pytest.fixture
def quickly_compiled(monkeypatch):
    """Blocks as graphs, without the minutes that code for them takes."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("name", [name for name in throughput.CONTENDERS if name.startswith("ours")])
def test_our_contenders_take_a_step_with_recomputation(name, quickly_compiled):
    """As the 8B shape has it; the losses are those of the plain step."""
    if "float8" in name:
        pytest.importorskip("torchao")
    shape, losses = replace(SHAPES["tiny"], num_layers=2), []
    for each, recompute in ((name, True), ("ours", False)):
        step = throughput.CONTENDERS[each](replace(shape, recompute=recompute), CPU, torch.float32)
        source = batches(shape, CPU)
        losses.append([step(*next(source)).item() for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if "float8" in name else 1e-5)
    assert losses[0][1] != losses[0][0]


@pytest.mark.parametrize("build", [throughput.ours, throughput.hugging_face, throughput.plain])
def test_contenders_are_built_in_their_precision(build, monkeypatch):
    if build is throughput.hugging_face:
        pytest.importorskip("transformers")
    models = []
    monkeypatch.setattr(throughput, "optimize", lambda model, loss: models.append(model))
    build(SHAPES["tiny"], CPU, torch.bfloat16, False)
    assert {each.dtype for each in models[0].parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("shape", "gigabytes", "most"), [("8B", 150, 2), ("8B", 80, 0), ("1B", 80, 5), ("1B", 150, 12)]
)
def test_a_gpu_takes_as_many_contenders_as_it_can_hold(shape, gigabytes, most):
    """Of the 8B shape each keeps 48 GB, so that an H200 has room for two; all six of the 1B shape fit it."""
    assert throughput.most_at_once(SHAPES[shape], 2, gigabytes * 1e9) == most


def test_more_contenders_than_a_gpu_can_hold_are_refused_before_any_is_built(monkeypatch, capsys):
    monkeypatch.setattr(throughput, "this_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(throughput, "measure", lambda names, *_: pytest.fail(f"{names} were built"))
    memory = SimpleNamespace(total_memory=150 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: memory)
    with pytest.raises(SystemExit) as ended:
        throughput.main(["--shape", "8B"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "6 of shape 8B do not fit the GPU's 150 GB at once" in told
    assert told.endswith("accepted are at most 2, as in --contenders ours ours-compiled\n")


@pytest.mark.parametrize(
    ("benchmark", "options", "told"),
    [
        (throughput, ["--contenders", "ours", "plain"], ["ours is", "x as fast as plain"]),
        (throughput, ["--contenders", "ours", "hf"], ["x as fast as hf"]),
        (floor, [], ["products of blocks", "sums on the stream", "step"]),
        (overhead, [], ["trainer / bare loop"]),
        (extras, ["--parts", "ema", "checkpoint"], ["ema", "checkpoint: stall, steps", "while it is written"]),
        (extras, ["--parts", "growth"], ["growth: stall, steps"]),
        (architecture, ["--parts", "own_norms"], ["own_norms / tied, a step"]),
        (noise_scale, ["--parts", "alone", "traffic"], ["measured / not, a step of one process", "bytes more"]),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_benchmark_runs_and_writes_what_it_tells(benchmark, options, told, tmp_path, capsys):
    threads = torch.get_num_threads()
    if "hf" in options:
        pytest.importorskip("transformers")
    try:
        assert benchmark.main([*TINY, "--pairs", "2", *options, "--json", str(tmp_path / "found.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert all(each in printed for each in told)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["shape"]["hidden_size"] == SHAPES["tiny"].hidden_size and found["machine"]["threads"] == 1


def test_the_bare_loop_computes_and_recomputes_as_the_trainer(tmp_path):
    shape = replace(SHAPES["tiny"], num_layers=2, recompute=True)
    config = overhead.configuration(shape, tmp_path, 1)
    assert config.parallel.recompute == "full"
    parallel = config.parallel.model_copy(update={"precision": "bf16"})
    with fake_world(1):
        mesh = build(plan_layout(parallel, 1, shape.config(), shape.seq_len, 1), "cpu")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            overhead.bare(shape, mesh, parallel)()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::silu"] == 2 * shape.num_layers * overhead.STEPS
    assert any("FSDP" in name for name in calls), "bf16 is FSDP's"


def test_what_was_measured_names_the_machine(monkeypatch):
    """Of a GPU the driver too, and the versions of what was imported."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="580.82\n580.82\n"))
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(__version__="0.18"))
    found = bench.machine(torch.device("cuda"))
    expected = {"gpu": "NVIDIA H200", "cuda": "13.0", "driver": "580.82", "torchao": "0.18", "torch": torch.__version__}
    assert expected.items() <= found.items()
    assert not {"gpu", "cuda", "driver"} & bench.machine(CPU).keys()


def test_a_driver_that_does_not_tell_its_version_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert bench.driver() == "unknown"


def test_the_bench_of_attention_in_tiles_says_where_they_are_taken(monkeypatch, capsys):
    shapes = [tiled_attention.Shape(2, 2, 1, length, 32) for length in (64, 256)]
    monkeypatch.setattr(tiled_attention, "SHAPES", shapes)
    tiled_attention.main(["--rounds", "2"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[5] for row in rows] == ["causal", "documents"] * 2
    assert [row.split()[-1] for row in rows] == ["no", "no", "yes", "yes"]
