"""Which collectives one training step issues: kinds, axes, counts and bytes, from shapes alone.

What is said here of the runtime is held against counted collectives of real steps, call for call and byte for byte
(tests/distributed/test_communication.py). Left out are what a group of one rank would send itself, the poll for signals
(2 bytes a micro-batch, beside the step), Muon's exchange of whole matrices, and what is not part of every step.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from runtime.config import ParallelConfig
from runtime.model.config import ModelConfig
from runtime.model.cross_entropy import LinearCrossEntropy
from runtime.model.decoder import Decoder
from runtime.model.parametrization import Role, role
from runtime.model.tying import at_loops, loop_of
from runtime.parallel.mesh import AXES, Layout
from runtime.parallel.parallelize import compute_dtype

NOISE_NUMBERS = 11
"""Floats that travel with the gradient's norm where the noise scale is measured (`runtime.parallel.pieces`)."""


class Kind(StrEnum):
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"


class Purpose(StrEnum):
    """What a collective carries."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    ACTIVATIONS = "activations"
    WHOLE_WEIGHTS = "gradients of weights that tensor parallelism keeps whole"
    LOSS = "loss"
    SCALARS = "scalars"


@dataclass(frozen=True)
class Collective:
    """Alike collectives of a step."""

    kind: Kind
    axes: tuple[str, ...]
    """Of the mesh, those of more than one rank that the group spans."""
    payload: int
    """Bytes of the whole tensor of one of them: what is gathered, what is scattered, or what is summed."""
    count: int
    purpose: Purpose


@dataclass(frozen=True)
class Parameter:
    """What sharding asks of a parameter."""

    name: str
    """A block's within the block."""
    shape: tuple[int, ...]
    trained: bool


@dataclass(frozen=True)
class Network:
    """A decoder by its shapes. Where loops are sampled, `depth_plan` may be another than the configuration's."""

    config: ModelConfig
    blocks: tuple[tuple[Parameter, ...], ...]
    """Of each unique block."""
    root: tuple[Parameter, ...]
    """All others."""
    depth_plan: tuple[int, ...]
    untrained: frozenset[int] = frozenset()
    """Depths that no gradients flow through."""
    exits: int = 0
    """Losses beside the last one's."""

    @classmethod
    def of(cls, config: ModelConfig, loops: int | None = None) -> "Network":
        """The network of a configuration, for a step of `loops` loops where they are not the configured number."""
        with torch.device("meta"):
            decoder = Decoder(config)
        blocks: list[list[Parameter]] = [[] for _ in decoder.blocks]
        root: list[Parameter] = []
        for name, each in decoder.named_parameters():
            if role(name) is not Role.ROUTER_BIAS:  # a plain tensor, equal everywhere
                first, *inner = name.split(".")
                owner, own = (blocks[int(inner[0])], ".".join(inner[1:])) if first == "blocks" else (root, name)
                owner.append(Parameter(own, tuple(each.shape), each.requires_grad))
        parts = tuple(map(tuple, blocks)), tuple(root)
        plan, loop, tying = config.depth_plan, loop_of(config.num_layers, config.tying), config.tying
        if loop is None:
            return cls(config, *parts, plan)
        if loops is not None and loops != tying.loops:
            plan, loop = at_loops(config.num_layers, tying, loops)
        untrained = max(0, loop.count - tying.backprop_loops) if tying.backprop_loops is not None else 0
        frozen = frozenset(range(loop.start, loop.start + untrained * loop.size))
        return cls(config, *parts, plan, frozen, loop.count - 1 if tying.exit_weight > 0 else 0)


@dataclass(frozen=True)
class Batch:
    """What a rank works through in a step."""

    micro_batches: int
    sequences: int
    """Of one micro-batch."""
    seq_len: int

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.sequences * self.seq_len


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers, and whose gradients it reduces, together."""

    parameters: tuple[Parameter, ...]
    gathers: int
    """Of one micro-batch."""
    copies: int = 1
    """Units that are alike."""


def collectives(
    network: Network,
    parallel: ParallelConfig,
    layout: Layout,
    batch: Batch,
    *,
    device_type: str,
    measures_noise: bool = True,
    chunk_elements: int | None = None,
) -> list[Collective]:
    """The collectives of a step on each rank of a layout; all ranks issue the same.

    device_type: "cpu" or "cuda", which the precision and the loss's chunks follow. measures_noise: whether
    `noise_scale.enabled`. chunk_elements: as of `LinearCrossEntropy`.
    """
    compute = compute_dtype(parallel.precision, torch.device(device_type)).itemsize
    shared = network.config, layout, batch.micro_batches, compute
    found = [
        *(each for unit in units(network, parallel) for each in unit_collectives(unit, *shared)),
        *_tensors(network, parallel, layout, batch, compute),
        *_losses(network, layout, batch, LinearCrossEntropy(chunk_elements), torch.device(device_type)),
        *_numbers(network.config, layout, batch.micro_batches, measures_noise),
    ]
    return [each for each in found if each.count and each.payload and each.axes]


def totals(found: Iterable[Collective]) -> dict[tuple[Kind, tuple[str, ...]], tuple[int, int]]:
    """(calls, bytes) of each kind over each group of axes."""
    calls: Counter = Counter()
    payload: Counter = Counter()
    for each in found:
        calls[each.kind, each.axes] += each.count
        payload[each.kind, each.axes] += each.count * each.payload
    return {key: (calls[key], payload[key]) for key in calls}


def axes_of(layout: Layout, *names: str) -> tuple[str, ...]:
    """Those of the named axes that have more than one rank."""
    degrees = dict(zip(AXES, (layout.data_replicate, layout.data_shard, layout.tensor), strict=True))
    return tuple(axis for axis in AXES if axis in names and degrees[axis] > 1)


def split_dim(name: str, config: ModelConfig, tensor: int) -> int | None:
    """The dim of a parameter that tensor parallelism splits, as `runtime.parallel.tensor_parallel` plans it; None for
    one that every rank keeps whole."""
    own = role(name)
    if own in (Role.EMBEDDING, Role.HEAD):
        return 0 if config.vocab_size % tensor == 0 else None
    if own in (Role.RELAXATION_IN, Role.RELAXATION_OUT):
        writes = name.split(".")[-2] in ("o_proj", "down_proj")
        return {(Role.RELAXATION_IN, True): 1, (Role.RELAXATION_OUT, False): 0}.get((own, writes))
    dims = {
        Role.ATTENTION_IN: 0,
        Role.FEED_FORWARD_IN: 0,
        Role.ATTENTION_OUT: 1,
        Role.FEED_FORWARD_OUT: 1,
        Role.PREFIX: 1,
    }
    return dims.get(own)


def padded(parameters: Iterable[Parameter], config: ModelConfig, layout: Layout) -> int:
    """Elements of a unit as FSDP gathers it on one rank: each parameter's part of a tensor-parallel rank, its first dim
    filled up to a multiple of the shards."""
    total = 0
    for each in parameters:
        shape = list(each.shape)
        dim = split_dim(each.name, config, layout.tensor)
        if dim is not None:
            shape[dim] //= layout.tensor
        total += math.ceil(shape[0] / layout.data_shard) * layout.data_shard * math.prod(shape[1:])
    return total


def units(network: Network, parallel: ParallelConfig) -> list[Unit]:
    """FSDP's units as `runtime.parallel.fsdp` makes them, the root's last."""
    uses, now = Counter(network.config.depth_plan), Counter(network.depth_plan)
    trained = Counter(block for depth, block in enumerate(network.depth_plan) if depth not in network.untrained)
    reshards = parallel.reshard_after_forward
    apart: Counter[Unit] = Counter()
    together: list[Parameter] = []
    for index, parameters in enumerate(network.blocks):
        if uses[index] == 1 or parallel.looped_blocks == "apart":
            # Freed after each use; or kept to the first backward, which frees it all the same.
            kept = 1 + max(0, trained[index] - 1)
            apart[Unit(parameters, now[index] + trained[index] if reshards else kept)] += 1
        else:
            together += parameters
    found = [replace(unit, copies=copies) for unit, copies in apart.items()]
    if together:
        found.append(Unit(tuple(together), 2 if reshards else 1))
    return [*found, Unit(network.root, 1)]


def unit_collectives(
    unit: Unit, config: ModelConfig, layout: Layout, micro_batches: int, compute_bytes: int
) -> tuple[Collective, Collective, Collective]:
    """What FSDP moves of a unit and those like it: parameters as often as they are gathered, gradients each
    micro-batch, and between replicas the gradients' shards once a step. A group of one rank has no axes here."""
    shard, replicate = axes_of(layout, "data_shard"), axes_of(layout, "data_replicate")
    gathered = compute_bytes * padded(unit.parameters, config, layout)
    reduced = 4 * padded((each for each in unit.parameters if each.trained), config, layout)
    gathers, scatters = unit.gathers * unit.copies * micro_batches, unit.copies * micro_batches
    return (
        Collective(Kind.ALL_GATHER, shard, gathered, gathers, Purpose.PARAMETERS),
        Collective(Kind.REDUCE_SCATTER, shard, reduced, scatters, Purpose.GRADIENTS),
        Collective(Kind.ALL_REDUCE, replicate, reduced // layout.data_shard, unit.copies, Purpose.GRADIENTS),
    )


def _tensors(
    network: Network, parallel: ParallelConfig, layout: Layout, batch: Batch, compute_bytes: int
) -> Iterable[Collective]:
    """What tensor parallelism moves: the residual stream before and after attention and feed-forward, in both
    directions, and gradients of what every rank keeps whole."""
    if layout.tensor == 1:
        return
    config, axes, micro = network.config, axes_of(layout, "tensor"), batch.micro_batches
    stream = batch.tokens * config.hidden_size * compute_bytes
    forwards = len(network.depth_plan)
    backwards = forwards - len(network.untrained)
    again = backwards if parallel.recompute == "full" else 0
    frozen = config.streams.backbone == "frozen"
    in_blocks = Collective(Kind.ALL_GATHER, axes, stream * config.streams.count, 0, Purpose.ACTIVATIONS)
    # A recomputation ends with the last tensor that the backward wants: the block's last sum is scattered again only
    # where something multiplies it. Below the first attention nothing of a frozen backbone asks for a gradient.
    scattered = 2 if config.sandwich_norm != "none" or config.tying.own_scales else 1
    scatters = 2 * (forwards + backwards) + scattered * again - frozen
    yield replace(in_blocks, count=micro * 2 * (forwards + backwards + again))
    yield replace(in_blocks, kind=Kind.REDUCE_SCATTER, count=micro * scatters)
    # The head's input is gathered and its gradient scattered, at each exit; of a split embedding it is the other way
    # round.
    heads, splits = 1 + network.exits, config.vocab_size % layout.tensor == 0
    at_ends = Collective(Kind.ALL_GATHER, axes, stream, micro * (heads + (splits and not frozen)), Purpose.ACTIVATIONS)
    yield at_ends
    yield replace(at_ends, kind=Kind.REDUCE_SCATTER, count=micro * (heads + splits))
    for parameters, copies in (Counter(network.blocks) + Counter([network.root])).items():
        for each in parameters:
            if each.trained and split_dim(each.name, config, layout.tensor) is None:
                payload = math.prod(each.shape) * compute_bytes
                yield Collective(Kind.ALL_REDUCE, axes, payload, micro * copies, Purpose.WHOLE_WEIGHTS)


def _losses(
    network: Network, layout: Layout, batch: Batch, cross_entropy: LinearCrossEntropy, device: torch.device
) -> Iterable[Collective]:
    """What the tensor-parallel loss moves: numbers of each position where the vocabulary is split, else two sums."""
    if layout.tensor == 1:
        return
    config, axes = network.config, axes_of(layout, "tensor")
    number = Collective(Kind.ALL_REDUCE, axes, 4, batch.micro_batches, Purpose.LOSS)
    distills = config.tying.exit_distillation and network.exits > 0
    losses = 1 if distills else 1 + network.exits
    if config.vocab_size % layout.tensor:
        yield replace(number, count=number.count * (2 * losses + distills))
        return
    vocabulary = config.vocab_size // layout.tensor
    for rows in chunks(batch.tokens, cross_entropy.chunk_rows(device, vocabulary)):
        # The largest logit; the sum of exponentials with the target's logit.
        yield replace(number, payload=4 * rows, count=number.count * losses)
        yield replace(number, payload=8 * rows, count=number.count * losses)
    if distills:
        for rows in chunks(batch.tokens, cross_entropy.chunk_rows(device, 2 * vocabulary)):
            # The teacher's largest logit and sum, each student's as above.
            yield replace(number, payload=4 * rows, count=number.count * (2 + network.exits))
            yield replace(number, payload=8 * rows, count=number.count * network.exits)


def chunks(positions: int, rows: int) -> list[int]:
    """Sizes of the chunks in which a loss takes its positions."""
    return [min(rows, positions - start) for start in range(0, positions, rows)]


def _numbers(config: ModelConfig, layout: Layout, micro_batches: int, measures_noise: bool) -> Iterable[Collective]:
    """Valid targets and loss of the batch, the gradient's norm, and how often each expert was chosen."""
    data = axes_of(layout, "data_replicate", "data_shard")
    yield Collective(Kind.ALL_REDUCE, data, 4, 2, Purpose.SCALARS)
    listens = measures_noise and layout.data * micro_batches > 1
    yield Collective(Kind.ALL_REDUCE, axes_of(layout, *AXES), 4 * NOISE_NUMBERS if listens else 4, 1, Purpose.SCALARS)
    yield Collective(Kind.ALL_REDUCE, data, 8 * config.num_blocks * config.experts.count, 1, Purpose.SCALARS)


def rank_span(layout: Layout, axes: Sequence[str]) -> list[int]:
    """The ranks of rank 0's group over these axes."""
    ranks = [0]
    for axis, degree, stride in zip(
        AXES,
        (layout.data_replicate, layout.data_shard, layout.tensor),
        (layout.data_shard * layout.tensor, layout.tensor, 1),
        strict=True,
    ):
        if axis in axes:
            ranks = [rank + place * stride for rank in ranks for place in range(degree)]
    return sorted(ranks)
