"""Parallel streams: prefixes that every query sees, and the sum that makes one state of several."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.model import prefix_attention
from runtime.model.cache import KeyValueCache
from runtime.model.config import ModelConfig
from runtime.model.counts import count, flops_per_token
from runtime.model.decoder import Decoder
from runtime.model.linear import linear
from runtime.model.prefix_attention import attend, by_flash, with_mask
from runtime.model.rotary import rotary_table
from tests.growing import config, random_decoder, random_tokens

aten = torch.ops.aten
STREAMS = {"count": 3, "prefix_tokens": 4, "smoothing": 0.1}
VARIANTS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "quiet": {"streams": STREAMS | {"quiet": True}},
    "shared": {"streams": STREAMS | {"prefix": "block"}, "tying": {"plan": "cycle", "loops": 2}},
    "tied": {"tying": {"plan": "cycle", "loops": 2}},
}
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 7, [0] * 11, [0, 1, 2] + [3] * 8])


@pytest.fixture(params=VARIANTS)
def decoder(request):
    return random_decoder(config(**{"streams": STREAMS} | VARIANTS[request.param]))


def published(hidden, streams):
    """Of the models of arXiv 2505.10475: 36 blocks, two key-value heads."""
    return ModelConfig(
        num_layers=36,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_heads=16,
        num_kv_heads=2,
        vocab_size=1000,
        streams={"count": streams},
    )


@pytest.mark.parametrize(
    ("streams", "added"),
    [
        (2, [2_382_466, 2_984_962, 4_386_562, 6_050_306, 10_164_226, 15_326_722]),
        (4, [4_764_036, 5_968_900, 8_771_844, 12_099_076, 20_326_404, 30_650_884]),
        (8, [9_527_176, 11_936_776, 17_542_408, 24_196_616, 40_650_760, 61_299_208]),
    ],
)
def test_streams_add_the_published_numbers_of_parameters(streams, added):
    for hidden, expected in zip((896, 1024, 1280, 1536, 2048, 2560), added, strict=True):
        assert count(published(hidden, streams)).total - count(published(hidden, 1)).total == expected


def test_counts_and_flops_are_of_tokens_and_not_of_streams(decoder):
    model = decoder.config
    assert count(model).total == sum(each.numel() for each in decoder.parameters())
    one = ModelConfig(**model.model_dump() | {"streams": {"count": 1}})
    head = 6 * model.hidden_size * model.vocab_size
    mixing = 6 * model.hidden_size * (3 * model.hidden_size + 3)
    prefix = 12 * model.num_layers * model.num_heads * model.head_dim * 4
    blocks = flops_per_token(one, 64) - head
    assert flops_per_token(model, 64) == 3 * (blocks + prefix) + head + mixing
    tokens = random_tokens()
    loss = decoder(tokens[:, :-1], tokens[:, 1:])
    whole = F.cross_entropy(decoder(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    assert torch.allclose(loss.total, whole)


def test_one_stream_is_a_decoder_that_knows_of_no_streams_bit_for_bit():
    decoder, tokens = random_decoder(config(streams={"count": 1})), random_tokens()
    assert not any("prefix" in name or "aggregation" in name for name, _ in decoder.named_parameters())
    x = decoder.embedding(tokens)
    cos, sin = rotary_table(0, tokens.shape[1], decoder.config.head_dim, decoder.config.rope_theta, x.device, x.dtype)
    for block in decoder.blocks:
        x, _ = block(x, cos, sin, None)
    assert torch.equal(decoder(tokens), linear(decoder.norm(x), decoder.head.weight))
    query, key, value = torch.randn(3, 2, 4, 7, 8).unbind()
    stock = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    assert torch.equal(attend(query, key, value, None, None, None, 0.3), stock)


def alike(decoder):
    """The prefixes of the first stream in all."""
    with torch.no_grad():
        for name, each in decoder.named_parameters():
            if name.endswith(("prefix_keys", "prefix_values")):
                each.copy_(each.unflatten(0, (3, -1))[:1].expand(3, -1, -1).flatten(0, 1))
    return decoder


def test_identical_prefixes_make_the_aggregation_not_matter(decoder):
    before = alike(decoder)(random_tokens())
    with torch.no_grad():
        for each in decoder.aggregation.parameters():
            each.normal_()
    assert torch.allclose(decoder(random_tokens()), before, rtol=1e-12, atol=1e-12)


def test_the_order_of_the_streams_does_not_matter(decoder):
    before, order = decoder(random_tokens()), [2, 0, 1]
    with torch.no_grad():
        for name, each in decoder.named_parameters():
            if name.endswith(("prefix_keys", "prefix_values")):
                each.copy_(each.unflatten(0, (3, -1))[order].flatten(0, 1))
        mixing = decoder.aggregation
        mixing.aggregation_in.weight.copy_(mixing.aggregation_in.weight.unflatten(1, (-1, 3))[:, :, order].flatten(1))
        for each in mixing.aggregation_out.parameters():
            each.copy_(each[order])
    after = decoder(random_tokens())
    assert torch.allclose(after, before, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        mixing.aggregation_out.bias.copy_(mixing.aggregation_out.bias[order])
    assert not torch.allclose(decoder(random_tokens()), before, rtol=1e-3)


def test_weights_sum_to_one_and_keep_their_smoothed_part():
    mixing = random_decoder(config(streams=STREAMS)).aggregation
    weights = mixing.weights(50 * torch.randn(3, 4, 5, 16, dtype=torch.float64))
    assert torch.allclose(weights.sum(-1), torch.ones(4, 5, dtype=torch.float64))
    least, most = 0.1 / 3, 0.9 + 0.1 / 3
    assert least <= weights.min() < least + 1e-6 and most - 1e-6 < weights.max() <= most + 1e-12


def test_no_position_sees_later_ones_nor_other_documents_and_all_see_the_prefix(decoder):
    tokens = random_tokens()
    logits = decoder(tokens, document_ids=DOCUMENTS)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 29
    differs = (decoder(changed, document_ids=DOCUMENTS) != logits).any(-1)
    later = torch.arange(11) >= 7
    assert torch.equal(differs, later.unsqueeze(0) & (DOCUMENTS[:, 7:8] == DOCUMENTS))
    assert torch.equal((decoder(changed) != decoder(tokens)).any(-1), later.expand(3, -1))
    with torch.no_grad():
        for name, each in decoder.named_parameters():
            if name.endswith("prefix_values"):
                each.add_(0.5)
    assert bool((decoder(tokens, document_ids=DOCUMENTS) != logits).any(-1).all())


def test_a_document_has_the_logits_that_it_has_alone(decoder):
    """Rotary embedding turns by differences, and the prefix is not turned: a first document is where it would be."""
    tokens = random_tokens()[:1]
    packed = decoder(tokens, document_ids=DOCUMENTS[:1])
    assert torch.allclose(packed[:, :4], decoder(tokens[:, :4]), rtol=1e-12, atol=1e-12)


def test_generation_with_a_cache_gives_what_it_gives_without(decoder):
    tokens, cache = random_tokens(), KeyValueCache(len(decoder.depth_plan))
    steps = [decoder(part, cache=cache) for part in tokens.split([4, 1, 1, 5], 1)]
    assert torch.allclose(torch.cat(steps, 1), decoder(tokens), rtol=1e-11, atol=1e-11)


def test_a_frozen_backbone_trains_prefixes_and_aggregation_alone():
    decoder = Decoder(config(streams=STREAMS | {"backbone": "frozen", "quiet": True}))
    trained = {name for name, each in decoder.named_parameters() if each.requires_grad}
    assert trained == {name for name, _ in decoder.named_parameters() if "prefix" in name or "aggregation" in name}
    tokens = random_tokens()
    decoder(tokens[:, :-1], tokens[:, 1:]).total.backward()
    assert {name for name, each in decoder.named_parameters() if each.grad is not None} == trained


def padded_queries(query, key, value, mask, prefix, bias, scale):
    """As in the released code: rows of zeros before the queries, a square causal mask, and the rows dropped."""
    tokens = prefix[0].shape[2]
    key, value = (torch.cat(pair, 2) for pair in zip(prefix, (key, value), strict=True))
    query = F.pad(query, (0, 0, tokens, 0))
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)[
        :, :, tokens:
    ]


def in_full(query, key, value, mask, prefix, bias, scale):
    """Softmax over all logits, written out."""
    key, value = (torch.cat(pair, 2) for pair in zip(prefix, (key, value), strict=True))
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    logits, tokens = scale * query @ key.mT, prefix[0].shape[2]
    seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril() if mask is None else mask
    logits = torch.cat((logits[..., :tokens] + (bias or 0), logits[..., tokens:].masked_fill(~seen, -torch.inf)), -1)
    return logits.softmax(-1) @ value


class _FlashOnCpu(TorchDispatchMode):
    """The kernel of GPUs, whose causal flag is aligned to the lower right, by that of CPUs with a mask."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._scaled_dot_product_flash_attention.default:
            query, key, value, dropout, is_causal = args
            assert is_causal and not dropout
            out, sums = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, attn_mask=self.mask(query, key), **kwargs
            )
            nothing = query.new_empty(0)
            return out, sums, nothing, nothing, 0, 0, nothing, nothing, nothing
        if func is aten._scaled_dot_product_flash_attention_backward.default:
            grad, query, key, value, out, sums = args[:6]
            return aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, query, key, value, out, sums, 0.0, False, attn_mask=self.mask(query, key), **kwargs
            )
        return func(*args, **kwargs or {})

    def mask(self, query, key):
        queries, keys = query.shape[2], key.shape[2]
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        return torch.zeros(1, 1, queries, keys, dtype=query.dtype).masked_fill(~seen, -torch.inf)


def flash(query, key, value, mask, prefix, bias, scale):
    return by_flash(query, key, value, prefix, scale)


@pytest.mark.parametrize("length", [1, 9, 24])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("quiet", [False, True], ids=["seen", "quiet"])
def test_attention_over_a_prefix_is_softmax_over_all_keys(monkeypatch, length, kv_heads, documents, quiet):
    monkeypatch.setattr(prefix_attention, "_CHUNK", 4)
    monkeypatch.setattr(prefix_attention, "_LONG", 24)
    torch.manual_seed(0)

    def drawn(heads, size):
        return torch.randn(2, size, heads, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()

    query, key, value = drawn(4, length), drawn(kv_heads, length), drawn(kv_heads, length)
    prefix = drawn(kv_heads, 3), drawn(kv_heads, 3)
    bias = torch.full((1,), -1.0, dtype=torch.float64, requires_grad=True) if quiet else None
    ids = torch.randint(2, (2, length)).cumsum(1)
    mask = (ids[:, None, :, None] == ids[:, None, None]) & torch.ones(length, length, dtype=torch.bool).tril()
    given, grad = (mask if documents else None), torch.randn(2, 4, length, 8, dtype=torch.float64)
    inputs = [each for each in (query, key, value, *prefix, bias) if each is not None]

    def run(attention):
        y = attention(query, key, value, given, prefix, bias, 0.4)
        return [y, *torch.autograd.grad(y, inputs, grad)]

    ways = [attend, with_mask] if documents or quiet else [attend, with_mask, padded_queries, flash]
    expected = run(in_full)
    for way in ways:
        with _FlashOnCpu():
            found = run(way)
        for ours, wanted in zip(found, expected, strict=True):
            assert torch.allclose(ours, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernel_of_gpus_is_aligned_to_the_lower_right(kv_heads):
    query, *keys = (torch.randn(2, heads, 40, 64).cuda().bfloat16() for heads in (4, kv_heads, kv_heads))
    prefix = tuple(torch.randn(2, 2, kv_heads, 3, 64).cuda().bfloat16().unbind())
    found, wanted = (each(query, *keys, None, prefix, None, 0.1) for each in (flash, with_mask))
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_a_mask_that_adds_and_one_that_selects_are_one():
    """An additive mask gives the prefix zero, a boolean one true (QwenLM/ParScale, pull request 11)."""
    query, key, value = torch.randn(3, 1, 2, 5, 8).unbind()
    prefix = tuple(torch.randn(2, 1, 2, 3, 8).unbind())
    loud = torch.zeros(1)
    assert torch.allclose(
        with_mask(query, key, value, None, prefix, loud, 0.3), with_mask(query, key, value, None, prefix, None, 0.3)
    )


@pytest.mark.slow
def test_attention_over_a_prefix_compiles_whole():
    query, key, value = torch.randn(3, 1, 2, 8, 16, requires_grad=True).unbind()
    prefix = tuple(torch.randn(2, 1, 2, 3, 16, requires_grad=True).unbind())
    compiled = torch.compile(attend, fullgraph=True)
    arguments = query, key, value, None, prefix, None, 0.3
    assert torch.allclose(compiled(*arguments), attend(*arguments), atol=1e-6)
