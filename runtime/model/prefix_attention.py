"""Attention over a prefix that every query sees and a sequence that it sees causally.

The released code (QwenLM/ParScale) puts rows of zeros before the queries, so that the mask is a square whose corners a
kernel's causal flag fits, and drops what they give. Here no query is computed in vain.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from runtime.model.tiled_attention import suits_tiles, tiled_attention

_FLASH_DTYPES = torch.bfloat16, torch.float16
"""Of the kernel of GPUs, which takes heads of up to 256, in multiples of 8."""
_CHUNK = 128
"""Queries that go together: enough to fill the tiles of the CPU's kernel."""
_LONG = 2048
"""From this many queries on the kernel's own causal flag, which skips 512 keys at a time, is as good as chunks."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    scale: float,
    tiled: bool = True,
) -> Tensor:
    """query [b, heads, s, d], key and value [b, kv_heads, keys, d], prefix keys and values [b, kv_heads, tokens, d]:
    the result is [b, heads, s, d].

    mask: boolean, broadcastable to [b, heads, s, keys], and no query may see later keys than a causal one; None for
    causal, with as many keys as queries. bias: [1], added to the prefix's logits. tiled: for a backward by
    `tiled_attention`, where that is faster.
    """
    if tiled and prefix is None and torch.is_grad_enabled() and suits_tiles(query, key, mask):
        return tiled_attention(query, key, value, mask, scale)
    grouped = query.shape[1] != key.shape[1]
    if prefix is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    if query.is_cpu:
        key, value = (torch.cat(pair, 2) for pair in zip(prefix, (key, value), strict=True))
        return _InParts.apply(query, key, value, mask, bias, prefix[0].shape[2], scale)
    if suits_flash(query, mask, bias):
        return by_flash(query, key, value, prefix, scale)
    return with_mask(query, key, value, mask, prefix, bias, scale)


def suits_flash(query: Tensor, mask: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernel of GPUs takes these; it alone takes groups of queries."""
    width = query.shape[3]
    return mask is None and bias is None and query.dtype in _FLASH_DTYPES and width % 8 == 0 and width <= 256


def by_flash(query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """`attend` without mask and bias by the kernel of GPUs (of compute capability 8.0 and later), whose causal flag is
    aligned to the lower right where keys are more than queries.

    torch's own function takes the flag for a square alone, and what it offers instead, `torch.nn.attention.bias`, calls
    the kernel as this does, but cannot be compiled where it is built.
    """
    key, value = (torch.cat(pair, 2) for pair in zip(prefix, (key, value), strict=True))
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal=True, scale=scale)[0]


def with_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prefix: tuple[Tensor, Tensor],
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """`attend` by one call with a mask of the whole square, on any device."""
    tokens, length = prefix[0].shape[2], query.shape[2]
    if mask is None:
        mask = _causal(length, key.shape[2], query.device)
    if bias is None:
        whole = F.pad(mask, (tokens, 0), value=True)
    else:
        seen = bias.to(query.dtype).expand(*mask.shape[:-1], tokens)
        whole = torch.cat((seen, _additive(mask, query.dtype)), -1)
    key, value = (torch.cat(pair, 2) for pair in zip(prefix, (key, value), strict=True))
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, whole, scale=scale, enable_gqa=grouped)


class _Part(NamedTuple):
    """Queries and keys that are one call of a kernel."""

    rows: slice
    seen: slice
    added: Tensor | None
    """To the logits."""
    is_causal: bool = False
    is_further: bool = False
    """The rows have seen other keys before."""


class _InParts(torch.autograd.Function):
    """Attention by the kernel of the CPU, whose causal flag is aligned to the upper left. Keys and values have the
    prefix before them.

    Results over several sets of keys are put together by the logarithms of their sums of exponentials, and the backward
    over each set takes what they have in common, as in ring attention (Liu et al. 2023, arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, bias, tokens, scale):
        ctx.tokens, ctx.scale = tokens, scale
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=_sum_dtype(query))
        for rows, seen, added, is_causal, is_further in _parts(query, key, mask, bias, tokens):
            found, summed = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, rows], key[:, :, seen], value[:, :, seen], 0.0, is_causal, attn_mask=added, scale=scale
            )
            if is_further:
                total = torch.logaddexp(sums[:, :, rows], summed)
                found = torch.lerp(out[:, :, rows], found, (summed - total).exp().unsqueeze(-1).to(out.dtype))
                summed = total
            out[:, :, rows], sums[:, :, rows] = found, summed
        ctx.save_for_backward(query, key, value, mask, bias, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, mask, bias, out, sums = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for rows, seen, added, is_causal, is_further in _parts(query, key, mask, bias, ctx.tokens):
            ours = query[:, :, rows], key[:, :, seen], value[:, :, seen], out[:, :, rows], sums[:, :, rows]
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, rows], *ours, 0.0, is_causal, attn_mask=added, scale=ctx.scale
            )
            of_query[:, :, rows] = found[0].add_(of_query[:, :, rows]) if is_further else found[0]
            of_key[:, :, seen] += found[1]
            of_value[:, :, seen] += found[2]
        of_bias = None
        if bias is not None and ctx.needs_input_grad[4]:
            of_bias = _gradient_of_bias(grad, query, key, value, bias, out, sums, ctx.tokens, ctx.scale)
        return of_query, of_key, of_value, None, of_bias, None, None


def _parts(query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None, tokens: int) -> Iterator[_Part]:
    """Chunks of queries with all that they see; of a long sequence the prefix, and then the sequence."""
    length, keys = query.shape[2], key.shape[2]
    if mask is not None:
        mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    if length >= _LONG and keys == length + tokens:
        everything = slice(0, length)
        loud = None if bias is None else bias.to(query.dtype).expand(1, 1, length, tokens)
        yield _Part(everything, slice(0, tokens), loud)
        added = None if mask is None else _additive(mask, query.dtype)
        yield _Part(everything, slice(tokens, keys), added, is_causal=True, is_further=True)
        return
    for start in range(0, length, _CHUNK):
        end = min(start + _CHUNK, length)
        last = keys - length + end
        if mask is None:
            visible = _causal(end - start, last - tokens, query.device).unsqueeze(0).unsqueeze(0)
        else:
            visible = mask[..., start:end, : last - tokens]
        added = F.pad(_additive(visible, query.dtype), (tokens, 0))
        if bias is not None:
            added[..., :tokens] = bias
        yield _Part(slice(start, end), slice(0, last), added)


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _gradient_of_bias(grad, query, key, value, bias, out, sums, tokens, scale) -> Tensor:
    """Sum of p (dp - out . dout) over queries and prefix, with p what a query gives to an entry of the prefix."""
    grouped = (key.shape[1], -1)
    query, grad, out = (each.unflatten(1, grouped) for each in (query, grad, out))
    logits = scale * query @ key[:, :, None, :tokens].mT + bias
    p = (logits.to(sums.dtype) - sums.unflatten(1, grouped).unsqueeze(-1)).exp()
    of_p = grad @ value[:, :, None, :tokens].mT - (grad * out).sum(-1, keepdim=True)
    return (p * of_p).sum().to(bias.dtype).reshape(bias.shape)
