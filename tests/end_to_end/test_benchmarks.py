"""The benchmarks run: each on the smallest shape, with few rounds."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import throughput
from benchmarks.bench import SHAPES, batches

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
