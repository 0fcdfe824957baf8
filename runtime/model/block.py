"""One residual block."""

from torch import Tensor, nn

from runtime.model.attention import Attention, Probe
from runtime.model.cache import KeyValueCache
from runtime.model.config import ModelConfig
from runtime.model.feed_forward import FeedForward
from runtime.model.normalization import build_norm


class Block(nn.Module):
    """Pre-norm residual block: attention, then feed-forward. It may run at several depths and learns which."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: KeyValueCache | None = None,
        probe: Probe | None = None,
        depth: int = 0,
    ) -> Tensor:
        """x [b, s, hidden] to the same; the other arguments are those of `Attention`."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache, probe, depth=depth)
        return x + self.feed_forward(self.feed_forward_norm(x))
