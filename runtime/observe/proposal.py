"""A faster mesh for a run, if the model of step times knows of one that fits the memory."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runtime.config import Config, ParallelConfig
from runtime.observe.devices import Node
from runtime.observe.memory import estimate, micro_batches
from runtime.observe.memory_formula import memory
from runtime.observe.step_time import SHARES, Shares, StepTime, step_time
from runtime.parallel.communication import Batch, Network
from runtime.parallel.mesh import Layout, plan_layout

RECOMPUTE = ("none", "selective", "full")
"""From the fastest to the one that needs the least memory."""
MOST_TENSOR = 8
"""Tensor-parallel degree that is tried: the devices of a usual machine."""
MOST_AT_ONCE = 64
"""Sequences of a micro-batch that are tried."""
USABLE = 0.92
"""Of a device's memory: the rest is for kernels' workspaces, the collectives' buffers and what the allocator rounds."""
WORTH = 1.02
"""A mesh is named from this ratio of predicted speeds on; the model does not tell closer ones apart."""
WORTH_TENSOR = 1.5
"""The same of a mesh with more tensor parallelism, whose products are smaller and slower than the model has them: it
predicts 0.93 of the speed where 0.63 was published."""
ALIKE = 0.99
"""Of the best's speed: what is within it is taken to be as good."""
_MOST_TRACES = 2


@dataclass(frozen=True)
class Candidate:
    """A way to run a configuration."""

    parallel: ParallelConfig
    layout: Layout
    batch: Batch

    def keys(self, other: "Candidate") -> list[str]:
        """What to set to get from another one here, as overrides."""
        found = []
        for key in ("data_replicate", "tensor", "recompute", "reshard_after_forward"):
            value = getattr(self.parallel, key)
            if value != getattr(other.parallel, key):
                found.append(f"parallel.{key}={str(value).lower()}")
        if other.parallel.data_shard not in ("auto", self.layout.data_shard):
            found.append(f"parallel.data_shard={self.layout.data_shard}")
        if self.batch.sequences != other.batch.sequences:
            found.append(f"batch.micro_sequences={self.batch.sequences}")
        return found


@dataclass(frozen=True)
class Proposal:
    candidate: Candidate
    time: StepTime
    memory: int
    """Bytes of a device at its fullest, traced."""


def configured(config: Config, layout: Layout) -> Candidate:
    """The candidate that a configuration is."""
    number, sequences = micro_batches(config, layout)
    return Candidate(config.parallel, layout, Batch(number, sequences, config.data.seq_len))


def predict(config: Config, network: Network, candidate: Candidate, node: Node, shares: Shares = SHARES) -> StepTime:
    """The predicted step of the run's largest batch."""
    noise = config.noise_scale.enabled
    options = {"measures_noise": noise, "shares": shares}
    return step_time(network, candidate.parallel, candidate.layout, candidate.batch, node, **options)


def needed(config: Config, network: Network, candidate: Candidate) -> float:
    """Bytes of a device at its fullest, by the formula."""
    state = 4 * (3 + (config.optim.ema_half_life is not None))  # the weights, two moments, their average
    return memory(network, candidate.parallel, candidate.layout, candidate.batch, state_bytes=state)


def propose(config: Config, network: Network, present: Candidate, traced: int, node: Node) -> Proposal | None:
    """The candidate that is predicted to be the fastest of those that fit a device's memory, if it is worth a change,
    or if the present one does not fit; None where there is none.

    traced: bytes of the present one, by whose trace the memory formula is scaled. The chosen one is traced itself, and
    so is the next if it does not hold what it promised. Sampled loops, whose step has no fixed length, get none.
    """
    if config.model.tying.sampling != "fixed":
        return None
    room = USABLE * node.memory
    scale = traced / needed(config, network, present)
    found = [
        (predict(config, network, each, node), each)
        for parallel, layout in layouts(config, present.layout.world_size)
        for each in ways(config, parallel, layout)
        if scale * needed(config, network, each) <= room
    ]
    now = predict(config, network, present, node)
    least = now.tokens_per_second if traced <= room else 0.0
    better = [each for each in found if each[1] != present and _is_better(*each, least, present)]
    for _ in range(_MOST_TRACES):
        if not better:
            return None
        time, chosen = _simplest(better, present)
        held = estimate(_with(config, chosen), chosen.layout, device_type="cuda").total
        if held <= room:
            return Proposal(chosen, time, held)
        scale = held / needed(config, network, chosen)
        better = [each for each in better if scale * needed(config, network, each[1]) <= room]
    return None


def _is_better(time: StepTime, each: Candidate, least: float, present: Candidate) -> bool:
    worth = WORTH_TENSOR if each.layout.tensor > present.layout.tensor else WORTH
    return time.tokens_per_second >= worth * least


def _simplest(found: Sequence[tuple[StepTime, Candidate]], present: Candidate) -> tuple[StepTime, Candidate]:
    """Of those that are as good as the fastest, the one that changes the fewest keys."""
    best = max(time.tokens_per_second for time, _ in found)
    good = [each for each in found if each[0].tokens_per_second >= ALIKE * best]
    return min(good, key=lambda each: (len(each[1].keys(present)), -each[0].tokens_per_second))


def layouts(config: Config, world_size: int) -> Iterator[tuple[ParallelConfig, Layout]]:
    """Those of a number of processes with degrees in powers of two."""
    for tensor in _powers(min(MOST_TENSOR, world_size)):
        for replicas in _powers(world_size // tensor):
            degrees = {"tensor": tensor, "data_replicate": replicas, "data_shard": "auto"}
            parallel = config.parallel.model_copy(update=degrees)
            try:
                yield (
                    parallel,
                    plan_layout(parallel, world_size, config.model, config.data.seq_len, *config.batches.sizes),
                )
            except ValueError:
                continue


def ways(config: Config, parallel: ParallelConfig, layout: Layout) -> Iterator[Candidate]:
    """All recomputations of a layout, and micro-batches that divide a rank's share of the largest batch."""
    share = config.largest_batch // layout.data
    for sequences in (each for each in range(1, min(share, MOST_AT_ONCE) + 1) if share % each == 0):
        batch = Batch(share // sequences, sequences, config.data.seq_len)
        for recompute in RECOMPUTE:
            for reshard in (True, False):
                chosen = {"recompute": recompute, "reshard_after_forward": reshard}
                yield Candidate(parallel.model_copy(update=chosen), layout, batch)


def _powers(most: int) -> Iterator[int]:
    return (2**power for power in range(int(math.log2(most)) + 1))


def _with(config: Config, candidate: Candidate) -> Config:
    batch = config.batch.model_copy(update={"micro_sequences": candidate.batch.sequences})
    return config.model_copy(update={"parallel": candidate.parallel, "batch": batch})
