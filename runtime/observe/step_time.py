"""The time of a training step on machines of GPUs, predicted: compute, and communication that nothing hides.

A model, to compare meshes by. The collectives are those which real steps were counted to issue; the rates are the
vendors' figures times the shares of `Shares`, and no predicted time has been held against a GPU here. Left out are the
optimizer's own work, the loading of data, and what is lost where ranks wait for the slowest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from runtime.config import ParallelConfig
from runtime.model.counts import flops_per_token
from runtime.observe.devices import Node, peak
from runtime.parallel.communication import (
    Batch,
    Collective,
    Kind,
    Network,
    Purpose,
    Unit,
    collectives,
    rank_span,
    unit_collectives,
    units,
)
from runtime.parallel.mesh import Layout
from runtime.parallel.parallelize import compute_dtype

# NCCL's own estimates in microseconds (src/graph/tuning.cc, baseLat and hwLat): of a ring with the Simple protocol,
# and of a tree with the LL protocol, which it takes for small sums. One hop, between devices and between machines.
_RING = (8.4, 3.4, 9.6)
_TREE = (4.4, 0.52 * 1.8, 5.0)
_TREE_BANDWIDTH = 0.9 / 3.8 / 2
"""Of the link's: of a tree, and of the LL protocol, which sends a flag with each word; up and down."""


@dataclass(frozen=True)
class Shares:
    """What is reached of the vendors' figures. Assumptions: see docs/performance.md.

    Published for bf16 are 39 % MFU on H100s of less power (torchtitan, 8 B, selective recomputation, compiled) and
    54.5 % on an H200 with full recomputation (KempnerForge, 8 B; 57.8 % as it counts), which is 72 % of the peak if
    what is recomputed counts.
    """

    compute: float = 0.6
    bandwidth: float = 0.8


SHARES = Shares()


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on each device."""

    compute: float
    exposed: float
    """Of communication that no computation hides."""
    communication: float
    """Of all communication, hidden or not."""
    tokens: int
    """Of the global batch."""
    mfu: float
    """Model FLOPs, recomputation not counted, over the peak's in this time."""

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def share(self) -> float:
        """Of the step that is spent waiting for communication."""
        return self.exposed / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.tokens / self.seconds


class Traffic(NamedTuple):
    """Of a unit of FSDP: seconds of each of its collectives, and how often it and those like it are gathered."""

    gather: float
    scatter: float
    sum: float
    forwards: int
    backwards: int
    copies: int


def step_time(
    network: Network,
    parallel: ParallelConfig,
    layout: Layout,
    batch: Batch,
    node: Node,
    *,
    measures_noise: bool = True,
    shares: Shares = SHARES,
) -> StepTime:
    """The predicted step. ValueError for a device without a known peak at bf16."""
    rate = peak(node.device, "bf16")
    if rate is None:
        raise ValueError(f"the peak of {node.device} at bf16 is not known")
    found = collectives(network, parallel, layout, batch, device_type="cuda", measures_noise=measures_noise)
    spent = [(each, each.count * collective_seconds(each, layout, node, shares)) for each in found]
    in_line = math.fsum(time for each, time in spent if each.purpose not in (Purpose.PARAMETERS, Purpose.GRADIENTS))

    blocks, head = _flops(network, batch)
    speed = rate.flops * shares.compute * layout.tensor
    again = 1 if parallel.recompute == "full" else 0
    forward, backward = blocks / 3 / speed, blocks * (2 + again) / 3 / speed
    compute = batch.micro_batches * (forward + backward + head / speed)

    *traffic, root = (_traffic(unit, network, layout, node, shares, parallel) for unit in units(network, parallel))
    beside = in_line / 2 / batch.micro_batches
    waiting = _waiting(traffic, root, batch.micro_batches, forward + beside, backward + beside)
    model = batch.micro_batches * (blocks + head) / layout.tensor
    return StepTime(
        compute=compute,
        exposed=in_line + waiting,
        communication=math.fsum(time for _, time in spent),
        tokens=batch.micro_batches * batch.tokens * layout.data,
        mfu=model / rate.flops / (compute + in_line + waiting),
    )


def _traffic(
    unit: Unit, network: Network, layout: Layout, node: Node, shares: Shares, parallel: ParallelConfig
) -> Traffic:
    compute_bytes = compute_dtype(parallel.precision, torch.device("cuda")).itemsize
    found = unit_collectives(unit, network.config, layout, 1, compute_bytes)
    seconds = (collective_seconds(each, layout, node, shares) if each.axes else 0.0 for each in found)
    forwards = math.ceil(unit.gathers / 2)
    return Traffic(*seconds, forwards * unit.copies, (unit.gathers - forwards) * unit.copies, unit.copies)


def collective_seconds(each: Collective, layout: Layout, node: Node, shares: Shares = SHARES) -> float:
    """One collective by a ring, or for small sums by a tree, in NCCL's own model of them.

    A rank sends (n - 1) / n of what is gathered or scattered, and twice that of what is summed, over its slowest link.
    The members that a machine has of a group share the ports of all of them.
    """
    ranks = rank_span(layout, each.axes)
    size, nodes = len(ranks), len({rank // node.devices for rank in ranks})
    members = math.ceil(size / nodes)
    link = node.link if nodes == 1 else min(node.link, members * node.network)
    passes = 2 if each.kind is Kind.ALL_REDUCE else 1
    base, near, far = _RING
    hops, far_hops = passes * (size - 1), passes * (nodes - 1)
    latency = base + (hops - far_hops) * near + far_hops * far
    ring = latency * 1e-6 + passes * (size - 1) / size * each.payload / (link * shares.bandwidth)
    if each.kind is not Kind.ALL_REDUCE:
        return ring
    base, near, far = _TREE
    latency = base + 2 * ((members - 1) * near + math.ceil(math.log2(nodes)) * far)
    return min(ring, latency * 1e-6 + each.payload / (link * shares.bandwidth * _TREE_BANDWIDTH))


def _flops(network: Network, batch: Batch) -> tuple[float, float]:
    """Of one micro-batch: those of the blocks, and those of head and loss."""
    config = network.config
    each = 4 if config.streams.backbone == "frozen" else 6  # a frozen matrix has no gradient
    head = each * config.hidden_size * config.vocab_size * (1 + network.exits)
    return (flops_per_token(config, batch.seq_len) - head) * batch.tokens, head * batch.tokens


def _waiting(traffic: Sequence[Traffic], root: Traffic, micro_batches: int, forward: float, backward: float) -> float:
    """Seconds that a step waits for parameters and gradients, given those that the blocks of a micro-batch take in each
    direction. A unit travels beside the computation of its neighbours, so that the first gathering of a direction and
    the last reduction are waited for, and of the others what is longer than the computation."""
    first = traffic[0]
    ahead = math.fsum(each.gather * each.forwards for each in traffic) - first.gather
    behind = math.fsum(each.gather * each.backwards + each.scatter * each.copies for each in traffic)
    starts = root.gather + first.gather + (first.gather if first.backwards else 0)
    ends = first.scatter + root.scatter
    behind -= (first.gather if first.backwards else 0) + first.scatter
    sums = math.fsum(each.sum * each.copies for each in traffic) - first.sum
    each_batch = starts + max(0.0, ahead - forward) + ends
    with_sums = first.sum + root.sum + max(0.0, behind + sums - backward)
    return micro_batches * each_batch + (micro_batches - 1) * max(0.0, behind - backward) + with_sums
