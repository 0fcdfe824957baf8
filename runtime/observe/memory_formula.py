"""Memory of a GPU in closed form: what `runtime.observe.memory` traces, in no time, to choose among meshes.

The three moments that can be the fullest: the loss, the backward of the last block, and the reduction of the root's
gradients. Of plain decoders the sum stays within a tenth of the trace (tests/unit/test_step_time.py); of what options
add to activations it knows streams alone. The trace has the last word.
"""

import math

import torch

from runtime.config import ParallelConfig
from runtime.model.config import ModelConfig
from runtime.model.cross_entropy import LinearCrossEntropy
from runtime.parallel.communication import Batch, Network, padded, units
from runtime.parallel.mesh import Layout
from runtime.parallel.parallelize import compute_dtype

_GPU = torch.device("cuda")


def memory(network: Network, parallel: ParallelConfig, layout: Layout, batch: Batch, *, state_bytes: int = 12) -> float:
    """Bytes on rank 0 at the fullest moment of a step, on GPUs.

    state_bytes: of a parameter beside its gradient: itself and the optimizer's moments, in fp32, and its average where
    there is one.
    """
    compute = compute_dtype(parallel.precision, _GPU).itemsize
    *sizes, root = ((padded(unit.parameters, network.config, layout), unit.copies) for unit in units(network, parallel))
    root, block = root[0], max(size for size, _ in sizes)
    blocks = sum(size * copies for size, copies in sizes)
    own = (blocks + root) / layout.data_shard
    gathered = root + (block if parallel.reshard_after_forward else blocks)

    gradients = 4 * own
    earlier = gradients if batch.micro_batches > 1 else 0.0
    kept = compute * _kept(network, parallel, layout, batch)
    # Of the head: its input and that one's gradient, whole.
    ends = 2 * batch.tokens * network.config.hidden_size * compute
    at_loss = earlier + compute * gathered + kept + ends + _logits(network, parallel, layout, batch, compute)
    # The head's gradient waits for the embedding's; a block's own are there twice, in the buffer that is reduced; and
    # the parameters of the next block are, if there is another one.
    head = min(root, network.config.vocab_size * network.config.hidden_size / layout.tensor)
    brings_next = parallel.reshard_after_forward and sum(copies for _, copies in sizes) > 1
    moving = head + block * (3 if brings_next else 2)
    working = _working(network, parallel, layout, batch)
    at_backward = earlier + compute * (gathered + moving + working) + kept
    at_end = gradients + root * (compute + 4)
    return state_bytes * own + max(at_loss, at_backward, at_end)


def kept_elements(config: ModelConfig, recompute: str, tensor: int) -> float:
    """Numbers that a block keeps for its backward of each token: of norms their inputs, of products theirs, or with
    selective recomputation what products, attention and collectives return. What tensor parallelism gathers is whole.
    """
    hidden, wide = (
        config.hidden_size,
        config.intermediate_size * max(1, config.experts.top_k * bool(config.experts.count)),
    )
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if recompute == "full":
        return hidden / tensor
    if recompute == "selective":
        split = 3 * hidden + 2 * queries + 2 * keys + 2 * wide
        return split / tensor + (4 * hidden if tensor > 1 else 0)
    split = 2 * hidden + 2 * queries + 2 * keys + 4 * wide
    return split / tensor + 2 * hidden


def _kept(network: Network, parallel: ParallelConfig, layout: Layout, batch: Batch) -> float:
    recompute = "selective" if parallel.compile and parallel.recompute == "none" else parallel.recompute
    each = kept_elements(network.config, recompute, layout.tensor)
    return each * len(network.depth_plan) * batch.tokens * network.config.streams.count


def _working(network: Network, parallel: ParallelConfig, layout: Layout, batch: Batch) -> float:
    """Numbers of one block's backward: what it computes again, and the gradients of its widest part."""
    config = network.config
    again = 0.0
    if parallel.recompute != "none" or parallel.compile:
        again = kept_elements(config, "none", layout.tensor)
        if parallel.recompute != "full":
            again -= 2 * config.intermediate_size / layout.tensor
    wide = 2 * config.intermediate_size / layout.tensor + config.hidden_size
    return (max(0.0, again) + wide) * batch.tokens * config.streams.count


def _logits(network: Network, parallel: ParallelConfig, layout: Layout, batch: Batch, compute: int) -> float:
    """The loss: a chunk of logits, and where it is not compiled another in float32; beside it its part of the head's
    gradient; that gradient is gathered in float32."""
    config = network.config
    even = config.vocab_size % layout.tensor == 0
    vocabulary = config.vocab_size // layout.tensor if even else config.vocab_size
    positions = batch.tokens if even else math.ceil(batch.tokens / layout.tensor)
    rows = min(positions, LinearCrossEntropy().chunk_rows(_GPU, vocabulary))
    weight, chunk = vocabulary * config.hidden_size, (compute if parallel.compile else 4 + compute) * rows * vocabulary
    return 4 * weight + chunk + compute * weight
