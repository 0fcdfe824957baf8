"""A branch: a run of its own that leaves another at a checkpoint, where it was stable, and anneals it."""

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from launch.config import validated
from launch.growth_config import RunConfiguration
from runtime.checkpoint.retention import parse
from runtime.checkpoint.storage import open_storage
from runtime.checkpoint.unsharded import complete, peek
from runtime.config import Config
from runtime.model.counts import flops_per_token
from runtime.timetable import Timetable, branch_event, build_timetable
from runtime.units import parse_tokens
from schedulers import tails
from schedulers.phases import decay_began, is_warming

CADENCES = ("checkpoint", "evaluation")
MARKS = 10
"""Checkpoints and evaluations that a branch has at least, where its parent's cadence would give it fewer."""
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


@dataclass(frozen=True)
class Anneal:
    """How a branch is annealed: its length in tokens ("20M") or as a share of its end ("10%"), its shape, and the last
    rate as a share of the first."""

    decay: str
    tail: str = "1-sqrt"
    final: float = 0.0

    def __post_init__(self) -> None:
        tails.check(self.tail, self.final)
        self.length(10**6)

    def length(self, at: int) -> int:
        """Tokens of a decay that begins after `at`: a share s is of at + length, so at s / (1 - s)."""
        share = _SHARE.fullmatch(self.decay.strip())
        if share is not None and 0 < Fraction(share[1]) < 100:
            part = Fraction(share[1]) / 100
            return max(1, round(at * part / (1 - part)))
        try:
            tokens = 0 if share is not None else parse_tokens(self.decay)
        except ValueError:
            tokens = 0
        if tokens < 1:
            raise ValueError(f'--decay {self.decay!r}: accepted are tokens such as "20M", and shares such as "10%"')
        return tokens

    def label(self) -> str:
        """What tells a branch from others of its point, fit for a run's name."""
        share = _SHARE.fullmatch(self.decay.strip())
        length = f"{share[1]}pct" if share else f"{parse_tokens(self.decay)}"
        return f"decay-{length}-{self.tail}" + (f"-final-{self.final:g}" if self.final else "")


@dataclass(frozen=True)
class Parent:
    """A checkpoint that a branch may leave from."""

    checkpoint: str
    """Its folder or URL."""
    description: dict[str, Any]
    config: Config
    plan: Timetable
    """With what its growths and its batch have changed."""

    @property
    def tokens(self) -> int:
        return self.description["train"]["clock"]["tokens"]

    @property
    def events(self) -> list[dict[str, Any]]:
        """What a branch of it has behind it."""
        return [*self.description["train"]["events"], branch_event(self.tokens)]

    @property
    def rate(self) -> float:
        """The learning rate of the step to come."""
        return self.plan.at(self.tokens).lr


def open_parent(path: str) -> Parent:
    """The checkpoint at a path, of which only the description is read. ValueError for one that cannot be annealed."""
    parent = described(*peek(path))
    lineage = parent.description["train"]["lineage"]
    if lineage and lineage[-1]["carry"] == "merge":
        raise ValueError(f"{parent.checkpoint} was merged and has no optimizer; anneal one of those it was merged from")
    _refuse_unstable(parent)
    return parent


def described(checkpoint: str, description: dict[str, Any]) -> Parent:
    """A checkpoint with the schedule that it was trained by. ValueError for one that belongs to no run."""
    stored = {key: deepcopy(each) for key, each in description["config"].items() if key in Config.model_fields}
    if not stored:
        raise ValueError(f"{checkpoint} was imported and belongs to no run, whose schedule could be annealed")
    config = validated(stored, (), checkpoint)
    return Parent(checkpoint, description, config, build_timetable(config, description["train"]["events"]))


def _refuse_unstable(parent: Parent) -> None:
    """ValueError where the rate is not yet, or no longer, that of a stable run."""
    where = f"{parent.checkpoint} has seen {parent.tokens:,} tokens"
    if is_warming(parent.plan.schedule, parent.tokens):
        raise ValueError(f"{where}, and its learning rate is still being warmed up; branch from a later one")
    began = decay_began(parent.plan.schedule, parent.tokens)
    if began is not None:
        location = parent.checkpoint.rpartition("/")[0]
        stable = [name for name in complete(open_storage(location)) if _is_stable(parent.plan, parse(name).tokens)]
        listed = f": {', '.join(stable)}" if stable else ", of which none is left"
        raise ValueError(f"{where}, and its own decay began at {began:,}; branch from one of before{listed}")
    if parent.rate == 0:
        raise ValueError(f"{where}, and its learning rate is zero: there is nothing to anneal")


def _is_stable(plan: Timetable, tokens: int) -> bool:
    if is_warming(plan.schedule, tokens) or decay_began(plan.schedule, tokens) is not None:
        return False
    return plan.at(tokens).lr > 0


def branched(parent: Parent, anneal: Anneal, name: str | None, overrides: Sequence[str] = ()) -> RunConfiguration:
    """The configuration of a branch: its parent's, as the checkpoint holds it, but for the name, the start and the end.

    ValueError as of `launch.config.compose`, and for overrides that would change the rate at the branch point.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.startswith(("schedule.", "start.")):
            raise ValueError(f"override {override!r}: a branch has its parent's schedule and begins from its parent")
    at, config = parent.tokens, parent.config
    length = anneal.length(at)
    raw = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    raw["run"]["name"] = name or f"{config.run.name}-at-{at}-{anneal.label()}"
    raw["run"].pop("until", None)
    raw["schedule"]["branch"] = {"at": at, "decay": length, "tail": anneal.tail, "final": anneal.final}
    raw["start"] = {"from": parent.checkpoint, "carry": "all"}
    raw["checkpoint"].pop("at", None)  # points of the parent's
    for section in CADENCES:
        raw[section]["every"] = min(raw[section]["every"], -(-length // MARKS))
    found = validated(raw, overrides, f"branch of {parent.checkpoint}")
    if found.run.name == config.run.name:
        raise ValueError(f"a branch is a run of its own, and {config.run.name!r} is its parent's name")
    rate = build_timetable(found, parent.events).at(at).lr
    if rate != parent.rate:
        raise ValueError(
            f"the learning rate would jump at the branch point, from {parent.rate:.6g} to {rate:.6g}; leave optim.lr "
            "and batch.sequences as they are"
        )
    return found


def cost(config: RunConfiguration, parent: Parent) -> tuple[int, int]:
    """Steps and FLOPs of a branch."""
    plan = build_timetable(config, parent.events)
    stretches = list(plan.batches.stretches(config.end, plan.seq_len, parent.tokens))
    tokens = sum(each.steps * each.sequences * plan.seq_len for each in stretches)
    return sum(each.steps for each in stretches), tokens * flops_per_token(config.model, plan.seq_len)


def summary(config: RunConfiguration, parent: Parent) -> str:
    """What a branch is, in a line."""
    branch = config.schedule.branch
    last = build_timetable(config, parent.events).at(config.schedule.end).lr
    return (
        f"branch of {parent.checkpoint} at {branch.at:,} tokens: {branch.tail} over {branch.decay:,} tokens, from "
        f"{parent.rate:.4g} to {last:.4g} at {config.schedule.end:,}"
    )
