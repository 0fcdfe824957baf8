"""Causal attention in float32 on a CPU as batched products of matrices, a tile of queries at a time.

torch's kernel of the CPU goes over blocks of each head by themselves, and computes the probabilities again for the
backward. Here one product is of many heads, keys that no query of a tile sees are left out under any mask, and the
probabilities are kept, s (s + 64) / 2 for each head. docs/performance.md has what that gains.

Within, the heads that share a key are a matrix of queries [s * group, d], a query's rows after another's.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_TILE = 64
"""Queries that go together."""
_LOGITS = 2**18
"""At a time: they stay in the cache of a core until they are used."""
_SHORTEST, _LONGEST, _LONGEST_MASKED = 256, 512, 1024
_FEWEST_DIMS, _FEWEST_HEADS = 32, 4
"""Of sequences and heads for which this is faster, and the probabilities are not too many."""


def suits_tiles(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether `tiled_attention` takes these and is faster than torch's kernel."""
    batch, heads, length, width = query.shape
    return (
        query.is_cpu
        and query.dtype == torch.float32
        and length == key.shape[2]
        and _SHORTEST <= length <= (_LONGEST if mask is None else _LONGEST_MASKED)
        and width >= _FEWEST_DIMS
        and batch * heads >= _FEWEST_HEADS
        and (mask is None or (mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1))
    )


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """query [b, heads, s, d], key and value [b, kv_heads, s, d]: the result is [b, heads, s, d].

    mask: boolean [b or 1, 1, s, s], in which no query sees later keys than a causal one; None for causal.
    """
    (batch, _, length, width), kv_heads = query.shape, key.shape[1]
    queries = (query * scale).unflatten(1, (kv_heads, -1)).transpose(2, 3).reshape(batch * kv_heads, -1, width)
    hidden = None if mask is None else ~mask.squeeze(1)
    y, _ = _forward(queries, key.flatten(0, 1).contiguous(), value.flatten(0, 1).contiguous(), hidden)
    by_position = y.view(batch, kv_heads, length, -1, width).transpose(1, 2)
    return by_position.reshape(batch, length, -1, width).transpose(1, 2)


class _Part(NamedTuple):
    """Queries and keys of one product."""

    heads: slice
    start: int
    end: int
    """Queries from `start` see no key from `end` on."""
    rows: slice
    """Of these queries."""
    kept: slice
    """Where their probabilities are."""


def _together(group: int, length: int) -> int:
    """Heads of a part."""
    return max(1, _LOGITS // (_TILE * group * length))


def _parts(heads: int, group: int, length: int) -> Iterator[_Part]:
    """All queries of all heads of keys, of each head the last ones first."""
    together, place = _together(group, length), 0
    for first in range(0, heads, together):
        last = min(first + together, heads)
        for start in reversed(range(0, length, _TILE)):
            end = min(start + _TILE, length)
            size = (last - first) * (end - start) * group * end
            yield _Part(slice(first, last), start, end, slice(start * group, end * group), slice(place, place + size))
            place += size


def _kept(queries: Tensor, keys: Tensor) -> int:
    """How many probabilities there are; without a loop, for lengths may be symbols of torch's compiler."""
    heads, length, _ = keys.shape
    whole = length // _TILE
    seen = _TILE**2 * whole * (whole + 1) // 2 + (length - whole * _TILE) * length
    return heads * (queries.shape[1] // length) * seen


def _product(a: Tensor, b: Tensor, room: Tensor) -> Tensor:
    shape = a.shape[0], a.shape[1], b.shape[2]
    return torch.bmm(a, b, out=room[: shape[0] * shape[1] * shape[2]].view(shape))


def _hide(logits: Tensor, part: _Part, hidden: Tensor | None, sequences: Tensor, group: int) -> None:
    """What a query does not see: later keys, or of its sequence those `hidden` [b, s, s]."""
    number = part.end - part.start
    by_query = logits.view(len(logits), number, group, part.end)
    if hidden is None:
        square = torch.ones(number, number, dtype=torch.bool).triu_(1)
        by_query[..., part.start :].masked_fill_(square.unsqueeze(1), -torch.inf)
    else:
        unseen = hidden[sequences[part.heads], part.start : part.end, : part.end]
        by_query.masked_fill_(unseen.unsqueeze(2), -torch.inf)


_LIBRARY = torch.library.Library("meristem", "FRAGMENT")
_LIBRARY.define("tiled_attention(Tensor queries, Tensor keys, Tensor values, Tensor? hidden) -> (Tensor, Tensor)")
_LIBRARY.define(
    "tiled_attention_backward(Tensor grad, Tensor queries, Tensor keys, Tensor values, Tensor kept) "
    "-> (Tensor, Tensor, Tensor)"
)
_forward = torch.ops.meristem.tiled_attention.default
_backward = torch.ops.meristem.tiled_attention_backward.default
_softmax_backward = torch.ops.aten._softmax_backward_data.out


@torch.library.impl(_LIBRARY, "tiled_attention", "CPU")
def _(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    heads, length, width = keys.shape
    group = queries.shape[1] // length
    sequences = torch.arange(heads) * (1 if hidden is None else len(hidden)) // heads
    out, kept = torch.empty_like(queries), queries.new_empty(_kept(queries, keys))
    rows = _together(group, length) * _TILE * group
    room, narrow = (queries.new_empty(rows * each) for each in (length, width))
    for part in _parts(heads, group, length):
        logits = _product(queries[part.heads, part.rows], keys[part.heads, : part.end].mT, room)
        _hide(logits, part, hidden, sequences, group)
        p = torch.softmax(logits, -1, out=kept[part.kept].view_as(logits))
        out[part.heads, part.rows] = _product(p, values[part.heads, : part.end], narrow)
    return out, kept


@torch.library.impl(_LIBRARY, "tiled_attention_backward", "CPU")
def _(grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads, length, width = keys.shape
    group = queries.shape[1] // length
    of_queries, of_keys, of_values = (torch.empty_like(each) for each in (queries, keys, values))
    rows = _together(group, length) * _TILE * group
    room, other, narrow = (queries.new_empty(rows * each) for each in (length, length, width))
    for part in _parts(heads, group, length):
        at, seen = (part.heads, part.rows), (part.heads, slice(part.end))
        of_p = _product(grad[at], values[seen].mT, room)
        p = kept[part.kept].view_as(of_p)
        of_logits = _softmax_backward(of_p, p, -1, p.dtype, grad_input=other[: p.numel()].view_as(p))
        of_queries[at] = _product(of_logits, keys[seen], narrow)
        for total, to, by in ((of_keys, of_logits, queries[at]), (of_values, p, grad[at])):
            if part.end == length:
                torch.bmm(to.mT, by, out=total[part.heads])
            else:
                total[seen] += torch.bmm(to.mT, by)
    return of_queries, of_keys, of_values


@torch.library.register_fake("meristem::tiled_attention", lib=_LIBRARY)
def _(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries), queries.new_empty(_kept(queries, keys))


@torch.library.register_fake("meristem::tiled_attention_backward", lib=_LIBRARY)
def _(grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    queries, keys, values, _ = inputs
    ctx.save_for_backward(queries, keys, values, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward(grad.contiguous(), *ctx.saved_tensors), None


torch.library.register_autograd("meristem::tiled_attention", _differentiate, setup_context=_save, lib=_LIBRARY)
