"""Products in float8: torchao's emulation against rounding by hand, and a run that does not depend on its mesh."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from runtime.config import ParallelConfig
from runtime.model.config import ModelConfig
from runtime.model.decoder import Decoder
from runtime.model.linear import Linear
from runtime.observe.jsonl import read_rows
from runtime.parallel import float8
from runtime.parallel.float8 import apply_float8, check_available, refuse_float8
from runtime.parallel.parallelize import compile_block
from tests.corpus import write_corpus
from tests.distributed.parity import SHAPE, TOLERANCE, Case, Trajectory, mismatches, train_alone, train_on_mesh
from tests.distributed.test_growth_live import BATCH, EXACT, GROWS_AT, STACK, slow, write_run
from tests.distributed.test_growth_live import train as train_and_grow
from tests.workers import run_workers

pytest.importorskip("torchao")

RECIPES = ("tensorwise", "rowwise")
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(x: Tensor, dtype: torch.dtype, dim: int | None) -> Tensor:
    """x as float8 has it, with the largest power of two as scale that keeps all of x, or of its lines along a dim."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(torch.finfo(dtype).max / largest.double()))).float()
    return (x * scale).to(dtype).double() / scale.double()


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_round_their_inputs_and_multiply_exactly(recipe):
    torch.manual_seed(0)
    layers = nn.ModuleDict({"q_proj": Linear(32, 48)})
    weight, x = layers["q_proj"].weight.detach().clone(), (3 * torch.randn(20, 32)).requires_grad_()
    outer = torch.randn(20, 48) * torch.logspace(-3, 0, 48)
    apply_float8(layers, recipe, emulate=True)
    y = layers["q_proj"](x)
    y.backward(outer)
    lines, backward = (None, BACKWARD) if recipe == "tensorwise" else (1, FORWARD)
    across = None if lines is None else 0
    one = rounded(x.detach(), FORWARD, lines) @ rounded(weight, FORWARD, lines).T
    two = rounded(outer, backward, lines) @ rounded(weight, FORWARD, across)
    three = rounded(outer, backward, across).T @ rounded(x.detach(), FORWARD, across)
    for found, expected in ((y, one), (x.grad, two), (layers["q_proj"].weight.grad, three)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, x @ weight.T, rtol=1e-3), "nothing was rounded"


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < float8.CAPABILITY,
    reason="no GPU of compute capability 8.9",
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpus_kernels_multiply_as_their_emulation(recipe):
    """Of bf16 numbers: what is rounded to float8 is the same, the sums differ by their precision."""
    found = []
    torch.manual_seed(0)
    weight, x, outer = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((96, 64), (128, 64), (128, 96)))
    for emulate in (False, True):
        layers = nn.ModuleDict({"q_proj": Linear(64, 96)}).to("cuda", torch.bfloat16)
        layers["q_proj"].weight.data.copy_(weight)
        apply_float8(layers, recipe, emulate=emulate)
        inputs = x.detach().clone().to("cuda").requires_grad_()
        y = layers["q_proj"](inputs)
        y.backward(outer.to("cuda"))
        found.append([each.detach().double() for each in (y, inputs.grad, layers["q_proj"].weight.grad)])
    for kernels, emulated in zip(*found, strict=True):
        assert (kernels - emulated).norm() < 1e-2 * emulated.norm()


ATTENTION = {f"attention.{each}_proj" for each in "qkvo"}
FEED_FORWARD = {f"feed_forward.{each}_proj" for each in ("gate", "up", "down")}


def converted(decoder: Decoder) -> set[str]:
    return {name for name, module in decoder.named_modules() if type(module).__name__ == "Float8Linear"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ATTENTION | FEED_FORWARD),
        ({"intermediate_size": 40}, ATTENTION),
        ({"experts": {"count": 4}}, ATTENTION),
        ({"streams": {"count": 2, "prefix_tokens": 3, "backbone": "frozen"}}, set()),
    ],
    ids=["dense", "an odd size", "experts", "frozen"],
)  # fmt: skip
def test_linears_of_blocks_are_taken_and_keep_their_names(options, expected):
    decoder = Decoder(ModelConfig(**SHAPE | options))
    names = {name: each.shape for name, each in decoder.named_parameters()}
    apply_float8(decoder.blocks, "tensorwise", emulate=True)
    assert converted(decoder) == {f"blocks.{block}.{name}" for block in range(2) for name in expected}
    assert {name: each.shape for name, each in decoder.named_parameters()} == names


def train(rank: int, case: Case, world_size: int, layout: dict[str, int], coarse: bool) -> Trajectory:
    if coarse:
        float8.replace = lambda config, **changes: replace(config, **changes | {"round_scales_to_power_of_2": False})
    try:
        return train_on_mesh(case, world_size, layout)
    finally:
        float8.replace = replace


def off(found: Trajectory, expected: Trajectory) -> float:
    """The largest relative difference of two trajectories."""
    return max(abs(a / b - 1) for pair in zip(found, expected, strict=True) for a, b in zip(*pair, strict=True) if b)


LAYOUTS = {
    "fsdp2": (2, {}, None),
    "fsdp4": (4, {}, None),
    "hsdp2x2": (4, {"data_replicate": 2}, None),
    "two micro-batches": (1, {}, 4),
    "selective recomputation": (1, {"recompute": "selective"}, None),
    "full recomputation, fsdp2": (2, {"recompute": "full"}, None),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_mesh_trains_like_one_process(recipe):
    case = Case("float8", {"init_std": 0.2}, {"float8": recipe}, steps=4)
    (alone,) = run_workers(train, 1, case, 1, {}, False)
    exact = train_alone(case)
    assert 1e-4 < off(alone, exact) < 0.05, "float8 is not exact, and not far off"
    for world_size, layout, micro in LAYOUTS.values():
        for found in run_workers(train, world_size, replace(case, micro_sequences=micro), world_size, layout, False):
            assert mismatches(found, alone) == []


def test_other_scales_than_powers_of_two_depend_on_the_mesh():
    """The defect that the parity above is to see."""
    case = Case("float8", {"init_std": 0.2}, {"float8": "tensorwise"}, steps=4)
    (alone,) = run_workers(train, 1, case, 1, {}, True)
    assert all(off(found, alone) > 100 * TOLERANCE for found in run_workers(train, 2, case, 2, {}, True))


OPTIONS = {
    "bf16, two processes": (2, {"parallel": {"precision": "bf16"}}),
    "streams, two processes": (2, {"model": {"streams": {"count": 2, "prefix_tokens": 4}}}),
    "one process": (1, {}),
}


@pytest.mark.parametrize("name", ["bf16, two processes", *(slow(each) for each in OPTIONS if "bf16" not in each)])
def test_a_run_grows_and_resumes_bit_for_bit(tmp_path, name):
    """Stopped before its growth and after it."""
    write_corpus(tmp_path / "data" / "train")
    write_corpus(tmp_path / "data" / "heldout", documents=20, seed=1)
    processes, sections = OPTIONS[name]

    def rows(run: str, recipe: str, *stops: int) -> list[list[float]]:
        parallel = {"float8": recipe, **sections.get("parallel", {})}
        path = write_run(tmp_path, run, STACK, **sections | {"parallel": parallel})
        for until in stops:
            folder = train_and_grow(path, processes, f"run.until={until * BATCH}")
        return [[row[key] for key in EXACT] for row in read_rows(folder / "metrics.jsonl")]

    whole = rows("whole", "rowwise", 12)
    assert whole == rows("parts", "rowwise", 4, 7, 12)
    assert [row[EXACT.index("segment")] for row in whole] == [0] * (GROWS_AT // BATCH) + [1] * 6
    loss = EXACT.index("loss")
    off = max(abs(ours[loss] / plain[loss] - 1) for ours, plain in zip(whole, rows("plain", "none", 12), strict=True))
    assert 1e-5 < off < 0.05, "float8 is not exact, and not far off"


@pytest.mark.slow
def test_blocks_compile_to_one_graph():
    decoder, tokens = Decoder(ModelConfig(**SHAPE)), torch.arange(20).reshape(2, 10)
    apply_float8(decoder.blocks, "tensorwise", emulate=True)
    eager = decoder(tokens, tokens).total
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for block in decoder.blocks:
        compile_block(block)
    decoder(tokens, tokens).total.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(decoder(tokens, tokens).total, eager, rtol=1e-4, atol=1e-4)


REFUSED: list[tuple[dict, dict, str]] = [
    ({"data_shard": 1}, {"seq_len": 1000}, r"multiples of 16 as data\.seq_len, which is 1000"),
    ({"tensor": 2}, {}, r'parallel\.float8 = "tensorwise" and parallel\.tensor = 2'),
    ({}, {"templates": 2}, r"without model\.tying\.relaxation and model\.templates"),
    (
        {},
        {"tying": {"plan": "cycle", "loops": 2, "relaxation": "lora", "rank": 2}},
        r"without model\.tying\.relaxation",
    ),
]


@pytest.mark.parametrize(("parallel", "model", "message"), REFUSED)
def test_what_has_no_float8_is_refused(parallel, model, message):
    model = dict(model)
    seq_len = model.pop("seq_len", 16)
    with pytest.raises(ValueError, match=message):
        refuse_float8(ParallelConfig(float8="tensorwise", **parallel), ModelConfig(**SHAPE | model), seq_len)


def test_a_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"torchao.*meristem\[float8\]"):
        check_available(ParallelConfig(float8="rowwise"))
