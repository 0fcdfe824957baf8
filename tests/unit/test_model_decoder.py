"""The decoder as a whole: what attends to what, caches, probes, precisions, and equality with Hugging Face's."""

import itertools
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.model import attention, linear
from runtime.model.attention import largest_logit
from runtime.model.cache import KeyValueCache
from runtime.model.config import ModelConfig
from runtime.model.cross_entropy import IGNORE
from runtime.model.decoder import Decoder
from runtime.model.initialization import initialize
from runtime.parallel.parallelize import compile_block
from runtime.parallel.recompute import recompute

BASE = {"num_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 59, "init_std": 0.2}
OPTIONS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "multi-query, wide heads": {"num_kv_heads": 1, "head_dim": 16},
    "tied": {"tie_embeddings": True},
    "qk-norm": {"qk_norm": True, "num_kv_heads": 2},
    "layernorm": {"norm": "layernorm"},
}


def build(dtype=torch.float64, **options):
    decoder = Decoder(ModelConfig(**BASE | options)).to(dtype)
    initialize(decoder, 0)
    return decoder


def draw(*shape, seed=0):
    return torch.randint(BASE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@each_option
def test_a_later_token_changes_nothing_earlier(options):
    decoder, tokens = build(**options), draw(2, 12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % BASE["vocab_size"]
    before, after = decoder(tokens), decoder(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()


@each_option
def test_documents_do_not_see_each_other(options):
    decoder = build(**options)
    tokens = draw(2, 12)
    ids = torch.tensor([[0] * 5 + [1] * 7, [3] * 2 + [4] * 6 + [5] * 4])
    packed = decoder(tokens, document_ids=ids)
    for row, lengths in enumerate(((5, 7), (2, 6, 4))):
        alone = torch.cat([decoder(part[None])[0] for part in tokens[row].split(lengths)])
        torch.testing.assert_close(packed[row], alone, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(packed, decoder(tokens), atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "head_dim": 16},
        {"num_kv_heads": 2, "streams": {"count": 2, "prefix_tokens": 3}},
        {"num_kv_heads": 2, "streams": {"count": 2, "prefix_tokens": 3, "quiet": True}},
    ],
    ids=str,
)
def test_heads_repeated_for_a_mask_change_nothing(options, monkeypatch):
    """As on a GPU, whose kernels with a mask take no groups; gradients too."""
    tokens, ids, found, widths = draw(2, 12), torch.tensor([[0] * 5 + [1] * 7, [3] * 2 + [4] * 10]), [], []
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, k, *rest: widths.append(k.shape[1]) or attend(q, k, *rest))
    for repeats in (False, True):
        decoder = build(**options)
        for block in decoder.blocks:
            block.attention.as_on_gpu = repeats
        loss = decoder(tokens, tokens, document_ids=ids).total
        loss.backward()
        found.append([loss, *(each.grad for each in decoder.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    assert set(widths) == {options["num_kv_heads"], BASE["num_heads"]}


@each_option
@pytest.mark.parametrize("steps", [(12,), (1,) * 12, (5, 1, 1, 4, 1)])
def test_generation_with_a_cache_equals_the_full_forward(options, steps):
    decoder, tokens = build(**options), draw(2, 12)
    cache = KeyValueCache(len(decoder.depth_plan))
    with torch.no_grad():
        parts = [decoder(part, cache=cache) for part in tokens.split(steps, 1)]
        assert cache.length == 12
        torch.testing.assert_close(torch.cat(parts, 1), decoder(tokens), rtol=1e-10, atol=1e-10)


@each_option
def test_loss_equals_that_of_the_logits(options):
    decoder = build(z_loss=1e-2, **options)
    tokens, targets = draw(2, 12), draw(2, 12, seed=1)
    targets[0, 3:6] = IGNORE
    loss = decoder(tokens, targets)
    logits = decoder(tokens)
    valid = targets != IGNORE
    expected = torch.nn.functional.cross_entropy(logits[valid], targets[valid], reduction="sum")
    z = 1e-2 * logits.logsumexp(-1)[valid].square().sum()
    torch.testing.assert_close((loss.cross_entropy, loss.z), (expected, z), rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss.total, list(decoder.parameters()))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected + z, list(decoder.parameters())))


@each_option
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_lower_precisions_agree_with_float64(options, dtype, tolerance):
    tokens = draw(2, 24)
    exact, rounded = (build(each, **options) for each in (torch.float64, dtype))
    losses = [each(tokens, tokens) for each in (exact, rounded)]
    for loss in losses:
        loss.cross_entropy.backward()
    torch.testing.assert_close(losses[1].cross_entropy.double(), losses[0].cross_entropy, rtol=tolerance, atol=0)
    for (name, ours), reference in zip(rounded.named_parameters(), exact.parameters(), strict=True):
        assert (ours.grad - reference.grad).norm() < tolerance * reference.grad.norm(), name


def test_tied_head_is_one_parameter():
    decoder = build(tie_embeddings=True)
    names = [name for name, _ in decoder.named_parameters(remove_duplicate=False)]
    assert "embedding.weight" in names and not any("head." in name for name in names)


def test_parameter_names_are_the_contract():
    names = {name for name, _ in build(qk_norm=True, num_layers=1).named_parameters()}
    attention = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    assert names == {
        "embedding.weight", "norm.weight", "head.weight", "blocks.0.attention_norm.weight",
        "blocks.0.feed_forward_norm.weight", *(f"blocks.0.attention.{each}.weight" for each in attention),
        *(f"blocks.0.feed_forward.{each}_proj.weight" for each in ("gate", "up", "down")),
    }  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Recorder:
    def __init__(self):
        self.outputs, self.logits = {}, {}

    def depth_output(self, depth, x):
        self.outputs[depth] = x

    def attention_logits(self, depth, maximum):
        self.logits[depth] = maximum


@pytest.mark.parametrize("packed", [False, True])
def test_probe_sees_every_depth_and_changes_nothing(packed):
    decoder, tokens, probe = build(num_kv_heads=2), draw(2, 12), Recorder()
    ids = torch.arange(12).expand(2, -1) // 4 if packed else None
    observed = decoder(tokens, document_ids=ids, probe=probe)
    assert torch.equal(observed, decoder(tokens, document_ids=ids))
    assert list(probe.outputs) == list(probe.logits) == [0, 1, 2]
    torch.testing.assert_close(decoder.norm(probe.outputs[2]) @ decoder.head.weight.mT, observed)


@pytest.mark.parametrize("masked", [False, True])
def test_largest_attention_logit_is_of_visible_pairs(masked):
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    mask = torch.eye(6, dtype=torch.bool).expand(2, 1, 6, 6) if masked else None
    pairs = [(i, j) for i, j in itertools.product(range(6), range(6)) if (i == j if masked else j <= i)]
    expected = max(
        (query[b, h, i] @ key[b, h // 2, j]).item() for b, h, (i, j) in itertools.product(range(2), range(4), pairs)
    )
    assert largest_logit(query, key, mask, 8**-0.5).item() == pytest.approx(expected / 8**0.5, rel=1e-5)


def test_blocks_compile_to_one_graph_for_all_depths():
    """No graph breaks, and no compilation for each depth: dynamo falls back to eager after eight."""
    decoder, plain, tokens = build(torch.float32, qk_norm=True), build(torch.float32, qk_norm=True), draw(2, 20)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for block in decoder.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for each in (decoder, plain):
        each(tokens, tokens).total.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for ours, reference in zip(decoder.parameters(), plain.parameters(), strict=True):
        # Of a sum over all targets, so a gradient's own size is tens.
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-4, atol=1e-4)
    decoder(tokens, probe=Recorder())
    decoder(tokens, cache=KeyValueCache(3))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_looped_model_has_as_many_graphs_as_it_needs(monkeypatch):
    """Trained and untrained loops, evaluation, and micro-batches of several sizes are more than torch's own limit."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    tying = {"plan": "cycle", "loops": 3, "backprop_loops": 1, "injection": "add", "own_norms": True}
    decoder = build(torch.float32, num_layers=6, tying=tying)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for block in decoder.blocks:
        compile_block(block)
    for sequences, trains in itertools.product((4, 3, 2, 1), (True, False)):
        tokens = draw(sequences, 20)
        with torch.set_grad_enabled(trains):
            loss = decoder(tokens, tokens).total
        if trains:
            loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 8


HALF = {"base_hidden_size": 16, "base_intermediate_size": 24, "base_num_heads": 2, "base_head_dim": 8}
"""A base of half the width, so that no multiplier is 1."""


def looped(**options):
    return {"num_layers": 4, "tying": {"plan": "cycle", "loops": 2, **options}}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize(
    ("options", "loops"),
    [
        (looped(), [None]),
        (looped(own_norms=True), [None]),
        (looped(own_scales=True), [None]),
        (looped(relaxation="lora", rank=3), [None]),
        (looped(relaxation="miss", rank=3), [None]),
        (looped(injection="add"), [None]),
        (looped(exit_weight=0.3), [None]),
        (looped(sampling="poisson"), [None, 1, 3]),
        ({"num_layers": 6, "tying": {"plan": "middle_cycle", "ends": 2, "loops": 2}}, [None]),
        ({"norm_scaling": "depth", "init": "normal"}, [None]),
        ({"streams": {"count": 2, "prefix_tokens": 3}}, [None]),
        (looped() | {"streams": {"count": 2, "prefix_tokens": 3, "prefix": "depth"}}, [None]),
        ({"streams": {"count": 2, "prefix_tokens": 3, "quiet": True}}, [None]),
        ({"experts": {"count": 4}}, [None]),
        ({"templates": 2}, [None]),
        ({"parametrization": {"kind": "mup", **HALF}}, [None]),
        ({"parametrization": {"kind": "completep", "base_num_layers": 1, **HALF}}, [None]),
        ({"sandwich_norm": "branch"}, [None]),
        (looped(own_norms=True) | {"sandwich_norm": "stream"}, [None]),
    ],
    ids=str,
)
def test_every_option_compiles_to_one_graph(options, loops, mode, monkeypatch):
    """As the trainer compiles blocks: whatever the depth and the number of loops."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    decoder, plain, tokens = build(torch.float32, **options), build(torch.float32, **options), draw(2, 20)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for block in decoder.blocks:
        recompute(block, mode)
        compile_block(block)
    for each in loops * 2:
        for model in (decoder, plain):
            model(tokens, tokens, loops=each).total.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for ours, reference in zip(decoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-3, atol=1e-3)


OFF_THE_CPU = {
    "plain": {"num_kv_heads": 2, "qk_norm": True},
    "layernorm": {"norm": "layernorm"},
    "norms and scales of depths": looped(own_norms=True, own_scales=True),
    "LoRA": looped(relaxation="lora", rank=3),
    "MiSS": looped(relaxation="miss", rank=3),
    "experts": {"experts": {"count": 4}},
    "templates": {"templates": 2},
    "streams": {"num_kv_heads": 2, "streams": {"count": 2, "prefix_tokens": 3}},
    "quiet streams": {"streams": {"count": 2, "prefix_tokens": 3, "quiet": True}},
}


@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(each, id=name, marks=() if "streams" in each else pytest.mark.slow)
        for name, each in OFF_THE_CPU.items()
    ],
)
def test_every_option_compiles_off_the_cpu(options, documents, monkeypatch):
    """In bf16, by the kernels of a GPU, which are not run: the device is meta."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch.device("meta"):
        decoder, tokens = Decoder(ModelConfig(**BASE | options)).bfloat16(), torch.zeros(2, 16, dtype=torch.int64)
    for block in decoder.blocks:
        compile_block(block)
    loss = decoder(tokens, tokens, document_ids=tokens if documents else None)
    loss.total.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all(each.grad is not None for each in decoder.parameters() if each.requires_grad)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("onednn", [False, True], ids=["MKL", "oneDNN"])
def test_every_float32_product_is_of_one_library(onednn, compiled, monkeypatch):
    """Backward too, and when compiled: the other is half as fast on some processors."""
    if onednn and not linear._HAS_ONEDNN:
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(linear, "_PREFERS_ONEDNN", onednn)
    decoder, tokens = build(torch.float32), draw(2, 20)
    torch.compiler.reset()
    for block in decoder.blocks if compiled else ():
        block.compile(fullgraph=True, backend="aot_eager")
    decoder(tokens, tokens).total.backward()  # tracing, too, calls products
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        decoder(tokens, tokens).total.backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    taken, other = ("mkldnn::_linear_pointwise", "aten::mm") if onednn else ("aten::mm", "mkldnn::_linear_pointwise")
    assert other not in calls and "aten::addmm" not in calls
    assert calls[taken] == 3 * (7 * 3 + 1)


@pytest.mark.parametrize(
    ("dtype", "width", "given", "suits"),
    [
        (torch.bfloat16, 64, (None, None), True),
        (torch.bfloat16, 64, (torch.ones(2, 2), None), False),
        (torch.bfloat16, 64, (None, torch.zeros(1)), False),
        (torch.bfloat16, 20, (None, None), False),
        (torch.float32, 64, (None, None), False),
    ],
)
def test_what_the_one_kernel_of_gpus_for_groups_takes(dtype, width, given, suits):
    assert attention.suits_flash(torch.empty(2, 4, 8, width, dtype=dtype), *given) == suits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_on_a_gpu_is_that_of_the_cpu(kv_heads, masked):
    """In bf16, by kernels that never hold the square of logits, against float64 on the CPU; gradients too."""
    shapes = [(2, heads, 256, 64) for heads in (4, kv_heads, kv_heads, 4)]
    *inputs, outer = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
    ids = torch.arange(256, device="cuda") // 100
    mask = (ids[:, None] == ids).tril()[None, None] if masked else None
    found = []
    for to in ({}, {"device": "cpu", "dtype": torch.float64}):
        query, key, value = (each.detach().to(**to).requires_grad_() for each in inputs)
        seen = None if mask is None else mask.to(query.device)
        repeats = query.is_cuda and not attention.suits_flash(query, seen, None)
        keys, values = (attention.repeat_heads(each, query) if repeats else each for each in (key, value))
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            y = attention.attend(query, keys, values, seen, None, None, 0.125)
        y.backward(outer.to(**to))
        found.append([each.detach().cpu().double() for each in (y, query.grad, key.grad, value.grad)])
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() < 2e-2 * exact.norm()


def test_the_libraries_of_products_agree(monkeypatch):
    if not linear._HAS_ONEDNN:
        pytest.skip("torch is built without oneDNN")
    found, tokens = [], draw(2, 20)
    for onednn in (False, True):
        monkeypatch.setattr(linear, "_PREFERS_ONEDNN", onednn)
        decoder = build(torch.float32)
        loss = decoder(tokens, tokens).total
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in decoder.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "head_dim": 16}, {"tie_embeddings": True}], ids=str)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["Llama", "Qwen3"])
def test_logits_equal_hugging_faces(options, qk_norm):
    transformers = pytest.importorskip("transformers")
    decoder = build(torch.float32, qk_norm=qk_norm, rope_theta=500.0, **options)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
    config = decoder.config
    family = "Qwen3" if qk_norm else "Llama"
    theirs = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(
            hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, head_dim=config.head_dim,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, vocab_size=config.vocab_size,
            num_key_value_heads=config.num_kv_heads, rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    )  # fmt: skip
    renamed = (
        ("blocks.", "model.layers."), ("attention_norm", "input_layernorm"), (".attention.", ".self_attn."),
        ("feed_forward_norm", "post_attention_layernorm"), ("feed_forward", "mlp"), ("head.", "lm_head."),
    )  # fmt: skip
    state = {}
    for name, weight in decoder.state_dict().items():
        for ours, their in renamed:
            name = name.replace(ours, their)
        if name == "embedding.weight":
            name = "model.embed_tokens.weight"
        state["model.norm.weight" if name == "norm.weight" else name] = weight
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    tokens = draw(2, 33)
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens), theirs(tokens).logits, rtol=1e-4, atol=2e-4)
