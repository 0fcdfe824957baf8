"""The benchmarks run: each on the smallest shape, with few rounds."""

from dataclasses import replace
from functools import partial

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
