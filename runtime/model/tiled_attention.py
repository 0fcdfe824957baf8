"""Causal attention in float32 on a CPU as batched products of matrices, a tile of queries at a time.

torch's kernel of the CPU goes over blocks of each head by themselves, and computes the probabilities again for the
backward. Here one product is of many heads, keys that no query of a tile sees are left out under any mask, and the
probabilities are kept, s^2 / 2 for each head. docs/performance.md has what that gains.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_TILE = 64
"""Queries that go together."""
_LOGITS = 2**18
"""At a time: they stay in the cache of a core until they are used."""
_SHORTEST, _LONGEST, _FEWEST_DIMS = 256, 1024, 32
"""Of sequences and of heads for which this is faster, and the probabilities are not too many."""

_LIBRARY = torch.library.Library("meristem", "FRAGMENT")
_LIBRARY.define("tiled_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> (Tensor, Tensor)")
_LIBRARY.define(
    "tiled_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor p, float scale) "
    "-> (Tensor, Tensor, Tensor)"
)
_forward = torch.ops.meristem.tiled_attention.default
_backward = torch.ops.meristem.tiled_attention_backward.default
_softmax_backward = torch.ops.aten._softmax_backward_data.out


def suits_tiles(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether `tiled_attention` takes these and is faster than torch's kernel."""
    return (
        query.is_cpu
        and query.dtype == torch.float32
        and query.shape[2] == key.shape[2]
        and _SHORTEST <= query.shape[2] <= _LONGEST
        and query.shape[3] >= _FEWEST_DIMS
        and (mask is None or (mask.dim() == 4 and mask.shape[1] == 1))
    )


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """query [b, heads, s, d], key and value [b, kv_heads, s, d]: the result is [b, heads, s, d].

    mask: boolean [b or 1, 1, s, s], in which no query sees later keys than a causal one; None for causal.
    """
    return _forward(query, key, value, mask, scale)[0]


class _Part(NamedTuple):
    """Queries and keys of one product."""

    heads: slice
    """Of keys, of all sequences."""
    start: int
    end: int
    """Queries from `start` see no key from `end` on."""
    rows: slice
    """The heads of a group are neighbours, so a query is as many rows."""
    kept: slice
    """Where the probabilities are."""


def _together(group: int, length: int) -> int:
    """Heads of a part."""
    return max(1, _LOGITS // (_TILE * group * length))


def _parts(heads: int, group: int, length: int) -> Iterator[_Part]:
    """All queries of all heads, of each head the last ones first."""
    together, place = _together(group, length), 0
    for first in range(0, heads, together):
        last = min(first + together, heads)
        for start in reversed(range(0, length, _TILE)):
            end = min(start + _TILE, length)
            size = (last - first) * (end - start) * group * end
            yield _Part(slice(first, last), start, end, slice(start * group, end * group), slice(place, place + size))
            place += size


def _kept(heads: int, group: int, length: int) -> int:
    """How many probabilities there are."""
    return max(part.kept.stop for part in _parts(heads, group, length))


def _by_key(x: Tensor, kv_heads: int) -> Tensor:
    """[b, heads, s, d] as [b * kv_heads, s * heads of a group, d]."""
    return x.unflatten(1, (kv_heads, -1)).transpose(2, 3).reshape(x.shape[0] * kv_heads, -1, x.shape[3])


def _by_head(x: Tensor, batch: int, length: int) -> Tensor:
    """[b * kv_heads, s * heads of a group, d] as [b, heads, s, d], in memory [b, s, heads, d] as the projections."""
    by_query = x.view(batch, -1, length, x.shape[1] // length, x.shape[2]).transpose(1, 2)
    return by_query.contiguous().view(batch, length, -1, x.shape[2]).transpose(1, 2)


def _product(a: Tensor, b: Tensor, room: Tensor) -> Tensor:
    shape = a.shape[0], a.shape[1], b.shape[2]
    return torch.bmm(a, b, out=room[: shape[0] * shape[1] * shape[2]].view(shape))


def _hide(logits: Tensor, part: _Part, later: Tensor | None, sequences: Tensor, group: int) -> None:
    """Nothing is seen of later keys, nor of those in `later` [b, s, s]."""
    queries = part.end - part.start
    by_query = logits.view(len(logits), queries, group, part.end)
    if later is None:
        square = torch.ones(queries, queries, dtype=torch.bool).triu_(1)
        by_query[..., part.start :].masked_fill_(square.unsqueeze(1), -torch.inf)
    else:
        hidden = later[sequences[part.heads], part.start : part.end, : part.end]
        by_query.masked_fill_(hidden.unsqueeze(2), -torch.inf)


@torch.library.impl(_LIBRARY, "tiled_attention", "CPU")
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    (batch, _, length, width), kv_heads = query.shape, key.shape[1]
    queries, keys, values = (_by_key(each, kv_heads) for each in (query * scale, key, value))
    group = queries.shape[1] // length
    later = None if mask is None else ~mask.expand(batch, 1, length, length).squeeze(1)
    sequences = torch.arange(batch).repeat_interleave(kv_heads)
    out, kept = torch.empty_like(queries), query.new_empty(_kept(len(keys), group, length))
    rows = _together(group, length) * _TILE * group
    room, narrow = (query.new_empty(rows * each) for each in (length, width))
    for part in _parts(len(keys), group, length):
        logits = _product(queries[part.heads, part.rows], keys[part.heads, : part.end].mT, room)
        _hide(logits, part, later, sequences, group)
        p = torch.softmax(logits, -1, out=kept[part.kept].view_as(logits))
        out[part.heads, part.rows] = _product(p, values[part.heads, : part.end], narrow)
    return _by_head(out, batch, length), kept


@torch.library.impl(_LIBRARY, "tiled_attention_backward", "CPU")
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, scale: float) -> tuple[Tensor, ...]:
    (batch, _, length, width), kv_heads = query.shape, key.shape[1]
    queries, keys, values, outer = (_by_key(each, kv_heads) for each in (query * scale, key * scale, value, grad))
    group = queries.shape[1] // length
    of_queries, of_keys, of_values = (torch.empty_like(each) for each in (queries, keys, values))
    rows = _together(group, length) * _TILE * group
    room, other, narrow = (query.new_empty(rows * each) for each in (length, length, width))
    for heads, _, end, rows, place in _parts(len(keys), group, length):
        q, of_out = queries[heads, rows], outer[heads, rows]
        of_p = _product(of_out, values[heads, :end].mT, room)
        p = kept[place].view_as(of_p)
        of_logits = _softmax_backward(of_p, p, -1, p.dtype, grad_input=other[: p.numel()].view_as(p))
        of_queries[heads, rows] = _product(of_logits, keys[heads, :end], narrow)
        for total, to, by in ((of_keys, of_logits, q), (of_values, p, of_out)):
            if end == length:
                torch.bmm(to.mT, by, out=total[heads])
            else:
                total[heads, :end] += torch.bmm(to.mT, by)
    return _by_head(of_queries, batch, length), of_keys.view_as(key), of_values.view_as(value)


def _empty_by_head(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


@torch.library.register_fake("meristem::tiled_attention", lib=_LIBRARY)
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    heads = query.shape[0] * key.shape[1]
    return _empty_by_head(query), query.new_empty(_kept(heads, query.shape[1] // key.shape[1], query.shape[2]))


@torch.library.register_fake("meristem::tiled_attention_backward", lib=_LIBRARY)
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, scale: float) -> tuple[Tensor, ...]:
    return _empty_by_head(query), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, _, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


torch.library.register_autograd("meristem::tiled_attention", _differentiate, setup_context=_save, lib=_LIBRARY)
