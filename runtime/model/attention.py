"""Grouped-query causal self-attention."""

from typing import Protocol

import torch
from torch import Tensor, nn

from runtime.model.cache import KeyValueCache
from runtime.model.config import ModelConfig
from runtime.model.depth import NOTHING_OWN, Use
from runtime.model.normalization import RMSNorm
from runtime.model.parametrization import forward_scales
from runtime.model.prefix_attention import attend, suits_flash
from runtime.model.rotary import rotate
from runtime.model.streams import PrefixParameters
from runtime.model.templates import build_linear


class Probe(Protocol):
    """What `Decoder.forward` tells an observer; None in training."""

    def depth_output(self, depth: int, x: Tensor) -> None: ...

    def attention_logits(self, depth: int, maximum: Tensor) -> None: ...


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) with rotary embedding and optional QK-norm.

    The number of heads is read from the projections' outputs, so that a shard of the heads is an attention too.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.streams, self.scale = config.streams.count, forward_scales(config).attention
        self.as_on_gpu = False  # for a trace on fake tensors of a CPU
        self.q_proj = build_linear(config, hidden, config.num_heads * self.head_dim)
        self.k_proj = build_linear(config, hidden, config.num_kv_heads * self.head_dim)
        self.v_proj = build_linear(config, hidden, config.num_kv_heads * self.head_dim)
        self.o_proj = build_linear(config, config.num_heads * self.head_dim, hidden)
        eps = config.norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
        self.q_norm = RMSNorm(self.head_dim, eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps) if config.qk_norm else None
        shares_prefix = self.streams > 1 and config.streams.prefix == "block"
        self.prefix = PrefixParameters(config) if shares_prefix else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        use: Use = NOTHING_OWN,
        cache: KeyValueCache | None = None,
        probe: Probe | None = None,
        depth: int = 0,
    ) -> Tensor:
        """x [b, s, hidden], cos and sin [s, head_dim], mask boolean broadcastable to [b, heads, s, keys], None for
        causal; the result is [b, s, hidden]."""
        batch, length = x.shape[:2]
        query, key, value = (
            self.get_submodule(name)(x, **use.delta(name)).view(batch, length, -1, self.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, cos, sin).transpose(1, 2)
        key, value = rotate(key, cos, sin).transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.extend(depth, key, value)
        prefix = use.prefix if self.prefix is None else self.prefix()
        before = prefix.of_batch(batch, self.streams, self.head_dim) if prefix is not None else None
        if probe is not None:
            probe.attention_logits(depth, largest_logit(query, key, mask, self.scale))
        bias = None if prefix is None or prefix.bias is None else prefix.bias.squeeze()
        on_gpu = query.is_cuda or self.as_on_gpu
        if on_gpu and not suits_flash(query, mask, bias):
            key, value, *repeated = (repeat_heads(each, query) for each in (key, value, *(before or ())))
            before = tuple(repeated) if before is not None else None
        y = attend(query, key, value, mask, before, bias, self.scale, not on_gpu)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1), **use.delta("o_proj"))


def repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    """Keys, values or those of a prefix [b, kv_heads, n, d] as [b, heads, n, d]: one for each of the query's heads.

    The kernels of a GPU that take a mask, a prefix's bias or float32 take no groups of queries, and torch's composed
    attention, which does, has the whole square of logits in memory.
    """
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1) if x.shape[1] != query.shape[1] else x


@torch.no_grad()
def largest_logit(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Largest visible entry of scale * query @ key^T, prefixes left out, in float32, a head of a sequence at a time."""
    groups = query.shape[1] // key.shape[1]
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    mask = mask.expand(query.shape[0], 1, -1, -1)
    largest = []
    for queries, keys, visible in zip(query, key, mask.squeeze(1), strict=True):
        for head, queries_of_head in enumerate(queries):
            logits = queries_of_head.float() @ keys[head // groups].float().mT
            largest.append(logits.masked_fill_(~visible, -torch.inf).amax())
    return torch.stack(largest).amax() * scale
