"""The arms: a stable run for each seed, whose noise scale is measured, and from three points of it branches with ever
larger batches."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from experiments.arms import Arm, Raw, Results
from experiments.contest import SEEDS, Contender, presets, wanted
from experiments.store import Store

SIZES = presets(Path(__file__).parent, cpu=4e-3, gpu=1e-3, smoke={"schedule": {"horizon": 40_960, "warmup": 4_096}})
POINTS = (0.1, 0.3, 0.9)
"""Of the stable run's tokens."""
LENGTH = 0.1
"""Of a branch, as a share of the same tokens; its rate falls to zero over all of it."""
MULTIPLES = (1, 2, 4, 8, 16)
"""Of the stable run's batch."""
TOLERANCE = 0.01
"""Nats by which a larger batch may end higher and still be called no worse, as in arXiv 2505.23971."""


def grain(name: str) -> int:
    """Tokens of a step of the largest batch, in which points and lengths are whole."""
    size = SIZES[name]
    return MULTIPLES[-1] * size.config["batch"]["sequences"] * size.config["data"]["seq_len"]


def tokens_at(name: str, share: float) -> int:
    return max(1, round(share * SIZES[name].tokens / grain(name))) * grain(name)


def swept(name: str, lr: float, seed: int) -> Arm:
    """A run with a tail, by whose loss the rate is chosen."""
    return SIZES[name].arm("swept", lr, seed)


def stable(name: str, lr: float, seed: int) -> Arm:
    """The run whose points are branched: no tail, and checkpoints that stay."""
    every = math.gcd(*(tokens_at(name, share) for share in POINTS))
    cadence = {"every": every, "keep_every": every}
    return SIZES[name].arm("stable", lr, seed, {"schedule": {"decay": 0}, "checkpoint": cadence})


def branch(name: str, share: float, multiple: int, lr: float, seed: int) -> Arm:
    """The stable run at a share of its tokens, trained on with a larger batch and a rate that is larger by the root."""
    size, at, length = SIZES[name], tokens_at(name, share), tokens_at(name, LENGTH)
    run = Store("critical_batch", name).path(stable(name, lr, seed)).with_suffix("")
    changes: Raw = {
        "schedule": {"decay": 0, "branch": {"at": at, "decay": length, "tail": "linear"}},
        "start": {"from": f"{run}/checkpoints/tokens-{at}-segment-0", "carry": "all"},
        "batch": {"sequences": multiple * size.config["batch"]["sequences"]},
        "checkpoint": {"every": length},
        "evaluation": {"every": length},
    }
    label = f"branch-{share:g}-x{multiple}"
    made = size.arm(label, lr, seed, changes, length * size.flops_per_token())
    made.config["optim"]["lr"] = lr * math.sqrt(multiple)
    return made


def leader(name: str) -> Contender:
    return Contender("swept", partial(swept, name), SIZES[name].lr, seeds=SEEDS[:1])


def points(name: str, rate: float) -> Iterator[tuple[float, int, int, Arm]]:
    """Every branch: share, multiple, seed and arm."""
    for seed in SEEDS:
        for share in POINTS:
            for multiple in MULTIPLES:
                yield share, multiple, seed, branch(name, share, multiple, rate, seed)


def arms(name: str, results: Results) -> list[Arm]:
    """The sweep, the stable runs, and the branches of those that have finished."""
    found, rate = wanted([leader(name)], results), leader(name).rate(results)
    if rate is None:
        return found
    parents = {seed: stable(name, rate, seed) for seed in SEEDS}
    ready = {seed for seed, arm in parents.items() if arm.name in results}
    return [*found, *parents.values(), *(arm for *_, seed, arm in points(name, rate) if seed in ready)]
