"""The arms: a stable run for each seed, every tail from one point of it, one tail from several, and runs from scratch
that are to equal two of those branches."""

from functools import partial
from pathlib import Path

from experiments.arms import Arm, Raw, Results
from experiments.contest import SEEDS, Contender, presets, wanted
from experiments.store import Store
from schedulers.tails import NAMES, TO_A_SHARE

# The smoke size has eighty steps, so that a fan's first tail has eight.
SIZES = presets(Path(__file__).parent, cpu=4e-3, gpu=1e-3, smoke={"schedule": {"horizon": 81_920, "warmup": 4_096}})
AT = 0.8
"""The point of all tails, as a share of the tokens at which they end."""
FINAL = 0.01
"""Last rate, as a share of the first, of tails that never reach zero."""
POINTS = (0.2, 0.4, 0.6, 0.8)
"""Of a fan of the published tail: each takes a fifth of its branch."""
TAIL = "1-sqrt"
SCRATCH = (POINTS[0], POINTS[-1])
"""Points whose branches are also trained from the beginning."""
AVERAGED = 0.2
"""The last part of the stable run, whose checkpoints are averaged: as long as the tails."""
SAVED = 50
"""Checkpoints of the whole stable run."""


def tokens_at(name: str, share: float) -> int:
    """A share of the tokens, at a step's end."""
    size = SIZES[name]
    step = size.config["batch"]["sequences"] * size.config["data"]["seq_len"]
    return round(share * size.tokens / step) * step


def stable(name: str, lr: float, seed: int) -> Arm:
    """The run that is branched: no tail, and checkpoints that stay."""
    size = SIZES[name]
    every = tokens_at(name, 1 / SAVED)
    changes: Raw = {"schedule": {"decay": 0}, "checkpoint": {"every": every, "keep_every": every}}
    return size.arm("stable", lr, seed, changes)


def checkpoint(name: str, lr: float, seed: int, tokens: int) -> str:
    """The folder of the stable run's checkpoint at these tokens."""
    run = Store("tails", name).path(stable(name, lr, seed)).with_suffix("")
    return f"{run}/checkpoints/tokens-{tokens}-segment-0"


def branch(name: str, label: str, share: float, tail: str, lr: float, seed: int) -> Arm:
    """The stable run up to a share of the tokens, and then a tail of a quarter of what it has seen."""
    at = tokens_at(name, share)
    decay = tokens_at(name, share / 4)
    section: Raw = {"at": at, "decay": decay, "tail": tail, "final": FINAL if tail in TO_A_SHARE else 0.0}
    changes: Raw = {
        "schedule": {"decay": 0, "branch": section},
        "start": {"from": checkpoint(name, lr, seed, at), "carry": "all"},
        "checkpoint": {"every": decay},
        "evaluation": {"every": decay},
    }
    return SIZES[name].arm(label, lr, seed, changes, decay * SIZES[name].flops_per_token())


def scratch(name: str, share: float, lr: float, seed: int) -> Arm:
    """The same tokens and rates as a branch of the fan, from the first weights."""
    end = tokens_at(name, share) + tokens_at(name, share / 4)
    changes: Raw = {"schedule": {"horizon": end, "decay": tokens_at(name, share / 4), "tail": TAIL}}
    return SIZES[name].arm(f"scratch-{share:g}", lr, seed, changes)


def leader(name: str) -> Contender:
    """Whose rate all others have: the whole run, with a tail, swept."""
    return Contender(f"scratch-{AT:g}", partial(scratch, name, AT), SIZES[name].lr)


def contenders(name: str) -> dict[str, Contender]:
    """The leader, and all branches by label: `tail-SHAPE` from one point, `fan-SHARE` with one shape."""
    first = leader(name)
    makers = {f"tail-{tail}": partial(branch, name, f"tail-{tail}", AT, tail) for tail in NAMES}
    makers |= {f"fan-{share:g}": partial(branch, name, f"fan-{share:g}", share, TAIL) for share in POINTS[:-1]}
    others = {label: Contender(label, make, SIZES[name].lr, first) for label, make in makers.items()}
    early = f"scratch-{SCRATCH[0]:g}"
    others[early] = Contender(early, partial(scratch, name, SCRATCH[0]), SIZES[name].lr, first)
    return {first.label: first} | others


def arms(name: str, results: Results) -> list[Arm]:
    """The sweep; then the stable runs; then branches of those that have finished."""
    found = wanted(contenders(name).values(), results)
    rate = leader(name).rate(results)
    parents = [stable(name, rate, seed) for seed in SEEDS] if rate is not None else []
    ready = {arm.config["run"]["seed"] for arm in parents if arm.name in results}
    possible = [arm for arm in found if "start" not in arm.config or arm.config["run"]["seed"] in ready]
    return [*possible, *parents]
