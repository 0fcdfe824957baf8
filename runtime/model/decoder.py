"""The decoder: embedding, blocks by the depth plan, final norm, head and loss."""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from runtime.model.attention import Probe
from runtime.model.block import Block
from runtime.model.cache import KeyValueCache, lower_right_mask
from runtime.model.config import ModelConfig
from runtime.model.cross_entropy import LinearCrossEntropy, Loss
from runtime.model.depth import Depth, Use, has_own_parts
from runtime.model.experts import Balance
from runtime.model.linear import Embedding, Linear, linear
from runtime.model.normalization import build_norm
from runtime.model.parametrization import forward_scales, is_trained, role
from runtime.model.rotary import rotary_table
from runtime.model.stack import Passed, Route, Stack
from runtime.model.streams import Aggregation
from runtime.model.tying import at_loops, loop_of


class Decoder(nn.Module):
    """A pre-norm decoder that knows nothing of sharding. It can be built on the meta device and has no buffers.

    A tied head is the embedding's own parameter, read twice; there is then no `head`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.depth_plan = config.depth_plan
        self.scales = forward_scales(config)
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.blocks = Stack(Block(config) for _ in range(config.num_blocks))
        self.depths = nn.ModuleList(Depth(config) for _ in range(config.num_layers if has_own_parts(config) else 0))
        injects = config.tying.injection == "linear"
        self.injection = Linear(2 * config.hidden_size, config.hidden_size) if injects else None
        self.norm = build_norm(config)
        self.aggregation = Aggregation(config) if config.streams.count > 1 else None
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.cross_entropy = LinearCrossEntropy()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_trained(role(name), config))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        loops: int | None = None,
        cache: KeyValueCache | None = None,
        probe: Probe | None = None,
    ) -> Tensor | Loss:
        """Logits [b, s, V] of tokens [b, s], or with targets [b, s] the `Loss`: sums over the valid targets.

        document_ids [b, s]: attend within equal ids only. loops: of a looped decoder, for this once. cache: earlier
        positions, for generation (then without document_ids). probe: an observer of each depth's output and largest
        attention logit.
        """
        config, scales = self.config, self.scales
        past = cache.length if cache is not None else 0
        x = self.embedding(tokens)
        if scales.embedding != 1:
            x = x * scales.embedding
        cos, sin = rotary_table(past, tokens.shape[1], config.head_dim, config.rope_theta, tokens.device, x.dtype)
        mask = attention_mask(tokens, document_ids, past)
        if config.streams.count > 1:
            x = x.repeat(config.streams.count, 1, 1)
            mask = mask.repeat(config.streams.count, 1, 1, 1) if document_ids is not None else mask
        route = self.route(loops, wants_exits=targets is not None and torch.is_grad_enabled())
        with eager() if cache is not None or probe is not None else nullcontext():
            uses = self.uses(len(route.plan), tokens.device)
            # Where parameters without gradients enter a unit of FSDP, it gives them zeros, and the optimizer a step.
            uses = [use.detached() if route.is_untrained(depth) else use for depth, use in enumerate(uses)]
            passed = self.blocks(x, route, uses, cos, sin, mask, cache, probe)
        weight = self.embedding.weight if self.head is None else self.head.weight
        if targets is None:
            return linear(self.finish(passed.x), weight)
        return self.loss(passed, weight, targets.flatten())

    def route(self, loops: int | None, wants_exits: bool) -> Route:
        """How the blocks run, `loops` times where that is given."""
        tying = self.config.tying
        plan, loop = self.depth_plan, loop_of(self.config.num_layers, tying)
        if loops is not None and loops != tying.loops:
            plan, loop = at_loops(self.config.num_layers, tying, loops)
        first_trained = 0
        if loop is not None and tying.backprop_loops is not None and torch.is_grad_enabled():
            first_trained = max(0, loop.count - tying.backprop_loops)
        inject = None if tying.injection == "none" else self.inject
        return Route(plan, loop, inject, first_trained, wants_exits and tying.exit_weight > 0)

    def inject(self, x: Tensor, begun: Tensor, loop: int) -> Tensor:
        """What loop number `loop` begins with, from the stream and from what the first one began with."""
        if self.injection is not None:
            return self.injection(torch.cat((x, begun), -1))
        return x + begun if loop else x

    def uses(self, depths: int, device: torch.device) -> list[Use]:
        """What each depth has of its own."""
        norm_scales: list[Tensor | None] = [None] * depths
        if self.config.norm_scaling == "depth":
            norm_scales = list(torch.arange(1, depths + 1, dtype=torch.float64, device=device).rsqrt().unbind())
        if self.depths:
            assert depths == len(self.depths), "loops have parts of their own, and there are no more"
            return [depth(scale) for depth, scale in zip(self.depths, norm_scales, strict=True)]
        return [Use(scale) for scale in norm_scales]

    def finish(self, x: Tensor) -> Tensor:
        """What the head reads, from the stream after the last block."""
        scale = None if self.scales.output == 1 else self.scales.output
        if self.aggregation is None:
            return self.norm(x, scale=scale)
        x = self.aggregation(self.norm(x))  # which reads entries of the same size at every width
        return x if scale is None else x * scale

    def loss(self, passed: Passed, weight: Tensor, targets: Tensor) -> Loss:
        """The losses of a forward; targets [b * s]."""
        config = self.config
        last = self.finish(passed.x).flatten(0, 1)
        loss = self.cross_entropy(last, weight, targets, config.z_loss)
        exits = [self.finish(x).flatten(0, 1) for x in passed.exits]
        if exits:
            if config.tying.exit_distillation:
                total = self.cross_entropy.distilled(exits, last, weight, targets)
            else:
                total = torch.stack([self.cross_entropy(x, weight, targets).cross_entropy for x in exits]).sum()
            loss = loss._replace(exits=total * (config.tying.exit_weight / len(exits)))
        if passed.balances:
            loss = loss._replace(**balanced(passed.balances, len(self.blocks), config.streams.count))
        return loss


def eager() -> AbstractContextManager:
    """Blocks run as they are written, even compiled ones: a cache and a probe change as they are used, and blocks would
    be compiled again for each state. Where torch's compiler is not loaded, no block is compiled, and it need not be."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def balanced(balances: list[tuple[int, Balance]], blocks: int, streams: int) -> dict[str, Tensor]:
    """The balancing losses' sum, a token's streams averaged, and the choices [blocks, experts] of all of a block's
    uses."""
    counts = torch.zeros(blocks, len(balances[0][1].counts), device=balances[0][1].counts.device)
    for index, balance in balances:
        counts[index] += balance.counts
    return {"balance": sum(each.loss for _, each in balances) / streams, "expert_counts": counts}


def attention_mask(tokens: Tensor, document_ids: Tensor | None, past: int) -> Tensor | None:
    """Boolean mask broadcastable to [b, heads, s, past + s], true where attention is allowed; None for plain causal."""
    length = tokens.shape[1]
    if document_ids is not None:
        assert past == 0, "document masks and a cache do not mix"
        same = document_ids.unsqueeze(2) == document_ids.unsqueeze(1)
        return (same & lower_right_mask(length, 0, tokens.device)).unsqueeze(1)
    return lower_right_mask(length, past, tokens.device) if past else None
