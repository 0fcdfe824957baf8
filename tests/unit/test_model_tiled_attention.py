"""Attention in tiles against plain attention in float64."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck
from torch.nn import functional as F

from runtime.model import tiled_attention
from runtime.model.attention import Attention
from runtime.model.prefix_attention import attend
from runtime.model.tiled_attention import suits_tiles
from runtime.model.tiled_attention import tiled_attention as tiled
from tests.unit.test_model_decoder import build, draw

SHAPES = [
    pytest.param((2, 4, 4, 256, 32), id="whole tiles"),
    pytest.param((3, 4, 2, 300, 32), id="groups, a last tile in part"),
    pytest.param((1, 6, 1, 257, 40), id="one head of keys, one query left"),
    pytest.param((9, 8, 8, 256, 32), id="several parts"),
    pytest.param((1, 2, 2, 256, 512), id="heads wider than the sequence is long"),
    pytest.param((2, 2, 2, 7, 8), id="less than a tile"),
]


def drawn(shape, dtype=torch.float32):
    """Queries, keys, values and a gradient, in memory as projections give them."""
    batch, heads, kv_heads, length, width = shape
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, length, number, width, generator=generator, dtype=dtype).transpose(1, 2)
        for number in (heads, kv_heads, kv_heads, heads)
    ]


def documents(batch, length):
    """[batch, 1, s, s]: documents of other lengths in each sequence; a query sees no later one, nor another's."""
    ids = torch.stack([torch.arange(length) // (length // (2 + row % 3) + row) for row in range(batch)])
    return (ids[:, None, :, None] == ids[:, None, None, :]).tril()


def with_gradients(function, inputs, outer):
    inputs = [each.detach().requires_grad_() for each in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, outer)]


@pytest.mark.parametrize("masked", ["no", "each", "one for all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_attention_and_so_are_its_gradients(shape, masked):
    *inputs, outer = drawn(shape)
    batch, heads, kv_heads, length, width = shape
    mask = {"no": None, "each": documents(batch, length), "one for all": documents(1, length)}[masked]
    found = with_gradients(lambda q, k, v: tiled(q, k, v, mask, width**-0.5), inputs, outer)
    seen = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
    exact = with_gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, seen, scale=width**-0.5, enable_gqa=heads != kv_heads),
        [each.double() for each in inputs],
        outer.double(),
    )
    for ours, reference in zip(found, exact, strict=True):
        assert ours.shape == reference.shape
        assert (ours - reference).norm() < 1e-6 * reference.norm()


def test_is_no_further_from_float64_than_the_kernel_of_torch():
    *inputs, outer = drawn((2, 4, 2, 512, 64))
    ways = [lambda q, k, v, t=t: attend(q, k, v, None, None, None, 0.125, tiled=t) for t in (True, False)]
    ours, theirs = (with_gradients(way, inputs, outer) for way in ways)
    exact = with_gradients(ways[1], [each.double() for each in inputs], outer.double())
    for a, b, reference in zip(ours, theirs, exact, strict=True):
        assert not torch.equal(a, b)
        assert (a - reference).norm() < 1.5 * (b - reference).norm()


def test_no_later_key_is_seen():
    query, key, value, _ = drawn((1, 2, 2, 320, 32))
    before = tiled(query, key, value, None, 0.2)
    key[:, :, 200:], value[:, :, 200:] = torch.nan, torch.inf
    after = tiled(query, key, value, None, 0.2)
    assert torch.equal(before[:, :, :192], after[:, :, :192])  # whole tiles before


@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_keeps_what_torch_expects_of_one(masked):
    inputs = [torch.randn(4, rows, 32, requires_grad=True) for rows in (140, 70, 70)]
    hidden = ~documents(2, 70).squeeze(1) if masked else None
    opcheck(torch.ops.meristem.tiled_attention.default, (*inputs, hidden))


TAKEN = (2, 4, 2, 256, 32)


@pytest.mark.parametrize(
    "shape, dtype, keys, mask, expected",
    [
        (TAKEN, torch.float32, 256, None, True),
        (TAKEN, torch.float32, 256, (1, 1, 256, 256), True),
        (TAKEN, torch.float32, 256, (2, 1, 256, 256), True),
        (TAKEN, torch.float32, 256, (2, 4, 256, 256), False),
        (TAKEN, torch.float32, 256, (3, 1, 256, 256), False),
        ((1, 3, 1, 256, 32), torch.float32, 256, None, False),
        (TAKEN, torch.float32, 300, None, False),
        (TAKEN, torch.float64, 256, None, False),
        (TAKEN, torch.bfloat16, 256, None, False),
        ((2, 4, 2, 255, 32), torch.float32, 255, None, False),
        ((2, 4, 2, 513, 32), torch.float32, 513, None, False),
        ((2, 4, 2, 513, 32), torch.float32, 513, (2, 1, 513, 513), True),
        ((2, 4, 2, 1025, 32), torch.float32, 1025, (2, 1, 1025, 1025), False),
        ((2, 4, 2, 256, 16), torch.float32, 256, None, False),
    ],
)
def test_what_it_is_taken_for(shape, dtype, keys, mask, expected):
    batch, heads, kv_heads, length, width = shape
    query, key = torch.zeros(batch, heads, length, width, dtype=dtype), torch.zeros(batch, kv_heads, keys, width)
    assert suits_tiles(query, key, None if mask is None else torch.ones(mask, dtype=torch.bool)) == expected
    assert not suits_tiles(query.to("meta"), key.to("meta"), None)


@pytest.mark.parametrize("ids", [None, torch.arange(256) // 100])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_decoder_with_it_is_the_decoder_without(ids, compiled):
    tokens, found = draw(2, 256), []
    ids = None if ids is None else ids.expand(2, -1)
    for is_tiled in (True, False):
        decoder = build(torch.float32, head_dim=32)
        for module in decoder.modules():
            if isinstance(module, Attention):
                module.as_on_gpu = not is_tiled
                if compiled and is_tiled:
                    module.compile(fullgraph=True)
        loss = decoder(tokens, tokens, document_ids=ids).total
        loss.backward()
        found.append([loss.detach(), *(each.grad for each in decoder.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert not all(torch.equal(*pair) for pair in zip(*found, strict=True))  # two ways to compute, then


def test_a_decoder_takes_it(monkeypatch):
    calls = []
    original = tiled_attention.tiled_attention
    monkeypatch.setattr(
        "runtime.model.prefix_attention.tiled_attention", lambda *args: calls.append(1) or original(*args)
    )
    decoder = build(torch.float32, head_dim=32)
    decoder(draw(1, 256))
    assert len(calls) == decoder.config.num_layers
    with torch.no_grad():  # where no probabilities need to be kept
        decoder(draw(1, 256))
    assert len(calls) == decoder.config.num_layers


def test_batches_and_lengths_that_vary_need_few_graphs():
    """A compiled block may be compiled a few times and then raises."""
    compiled, graphs = CompileCounter(), []
    attention = torch.compile(tiled, backend=compiled, fullgraph=True)
    for batch, length in [(batch, 256) for batch in range(2, 14)] + [(3, length) for length in range(300, 500, 16)]:
        query, key, value, _ = (each.requires_grad_() for each in drawn((batch, 4, 2, length, 32)))
        torch.testing.assert_close(attention(query, key, value, None, 0.2), tiled(query, key, value, None, 0.2))
        graphs.append(compiled.frame_count)
    assert graphs[-1] <= 4 and graphs[11] == graphs[2]


def test_how_many_probabilities_are_kept_is_what_the_parts_need():
    for heads, group, length in [(1, 1, 1), (3, 2, 64), (5, 1, 65), (16, 4, 500), (64, 1, 1024)]:
        queries, keys = torch.empty(heads, group * length, 8), torch.empty(heads, length, 8)
        parts = list(tiled_attention._parts(heads, group, length))
        assert tiled_attention._kept(queries, keys) == parts[-1].kept.stop
        assert [part.kept.start for part in parts] == [0, *(part.kept.stop for part in parts[:-1])]
