"""The decoder: embedding, blocks by the depth plan, final norm, head and loss."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from runtime.model.attention import Probe
from runtime.model.block import Block
from runtime.model.cache import KeyValueCache, lower_right_mask
from runtime.model.config import ModelConfig
from runtime.model.cross_entropy import LinearCrossEntropy, Loss
from runtime.model.linear import Linear, linear
from runtime.model.normalization import build_norm
from runtime.model.rotary import rotary_table
from runtime.model.tying import depth_plan


class Decoder(nn.Module):
    """A pre-norm decoder that knows nothing of sharding. It can be built on the meta device and has no buffers.

    A tied head is the embedding's own parameter, read twice; there is then no `head`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.depth_plan = depth_plan(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = build_norm(config)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.cross_entropy = LinearCrossEntropy()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        probe: Probe | None = None,
    ) -> Tensor | Loss:
        """Logits [b, s, V] of tokens [b, s], or with targets [b, s] the `Loss`: sums over the valid targets.

        document_ids [b, s]: attend within equal ids only. cache: earlier positions, for generation (then without
        document_ids). probe: an observer of each depth's output and largest attention logit.
        """
        past = cache.length if cache is not None else 0
        x = self.embedding(tokens)
        config = self.config
        cos, sin = rotary_table(past, tokens.shape[1], config.head_dim, config.rope_theta, tokens.device, x.dtype)
        mask = attention_mask(tokens, document_ids, past)
        # A cache and a probe change as they are used: compiled blocks would be compiled again for each state.
        observed = cache is not None or probe is not None
        with torch.compiler.set_stance("force_eager") if observed else nullcontext():
            for depth, index in enumerate(self.depth_plan):
                x = self.blocks[index](x, cos, sin, mask, cache, probe, depth=depth)
                if probe is not None:
                    probe.depth_output(depth, x)
        x = self.norm(x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        if targets is None:
            return linear(x, weight)
        return self.cross_entropy(x.flatten(0, 1), weight, targets.flatten(), config.z_loss)


def attention_mask(tokens: Tensor, document_ids: Tensor | None, past: int) -> Tensor | None:
    """Boolean mask broadcastable to [b, heads, s, past + s], true where attention is allowed; None for plain causal."""
    length = tokens.shape[1]
    if document_ids is not None:
        assert past == 0, "document masks and a cache do not mix"
        same = document_ids.unsqueeze(2) == document_ids.unsqueeze(1)
        return (same & lower_right_mask(length, 0, tokens.device)).unsqueeze(1)
    return lower_right_mask(length, past, tokens.device) if past else None
