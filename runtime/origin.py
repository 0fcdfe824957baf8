"""The checkpoint a launch begins from, and what a run remembers of it."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist

from runtime.checkpoint.store import CheckpointStore
from runtime.checkpoint.unsharded import split
from runtime.config import Config
from runtime.observe.jsonl import read_rows
from runtime.observe.run_directory import RunDirectory
from runtime.startup import agree, read_or_warn
from runtime.state import TrainState, check_description


@dataclass(frozen=True)
class Origin:
    """The checkpoint a launch begins from: its own run's newest, or another's."""

    store: CheckpointStore
    location: str
    name: str
    carry: Literal["own", "all", "weights"]
    hash: str
    description: dict[str, Any]


def find_origin(
    config: Config, directory: RunDirectory, location: str, own: CheckpointStore, stack: ExitStack
) -> Origin | None:
    """The newest checkpoint of this run, else the one that `start.from` names, else None; a collective.

    ValueError if there are checkpoints and none is intact, if the run once saved some and there are none, or if
    `start.from` leads to none.
    """
    name = own.newest()
    if name is None:
        agree(lambda: refuse_lost_checkpoints(directory, location))
    else:
        return Origin(own, location, name, "own", own.hash(name), read_description(own, name))
    if config.start.from_ is None:
        return None
    try:
        location, name = agree(lambda: split(config.start.from_))
        other = CheckpointStore(location, read_only=True)
        stack.callback(other.close)
        name = name or other.newest()
        if name is None:
            raise ValueError("no checkpoint there")
        return Origin(other, location, name, config.start.carry, other.hash(name), read_description(other, name))
    except ValueError as error:
        raise ValueError(f"start.from = {config.start.from_!r}: {error}") from None


def refuse_lost_checkpoints(directory: RunDirectory, location: str) -> None:
    """ValueError if a run's events tell of checkpoints where there are none: it would begin again over its history."""
    events = read_or_warn(lambda: read_rows(directory.path / "events.jsonl"), []) if dist.get_rank() == 0 else []
    if any(row.get("event") == "checkpoint" and row.get("outcome") == "saved" for row in events):
        raise ValueError(
            f"{directory.path} has saved checkpoints, but there are none at {location}; put them back, correct "
            "checkpoint.dir, or choose another run.name"
        )


def read_description(store: CheckpointStore, name: str) -> dict[str, Any]:
    """What a checkpoint holds beside tensors; a collective. ValueError naming it if that is not of this version."""
    try:
        stored = store.read_state(name)
        check_description(stored)
    except ValueError as error:
        raise ValueError(f"checkpoint {name}: {error}") from None
    return stored


def refuse_late_branch(state: TrainState, config: Config) -> None:
    """ValueError if a branch would leave its parent behind the branch point, within a tail that is not its parent's."""
    at = config.schedule.branch.at
    if state.clock.tokens > at:
        raise ValueError(
            f"start.from = {config.start.from_!r} has seen {state.clock.tokens:,} tokens by another [schedule], and "
            f"schedule.branch.at = {at:,} lies before that: the learning rate would jump"
        )


def refuse_finished(state: TrainState, config: Config) -> None:
    """ValueError if a run that begins from another would begin where it ends."""
    end = config.end
    if end is not None and state.clock.tokens >= end:
        raise ValueError(
            f"start.from = {config.start.from_!r} has seen {state.clock.tokens:,} tokens and this run ends at {end:,}; "
            'set a later schedule.horizon, or start.carry = "weights" for a new clock'
        )


def refuse_merged(origin: Origin, where: str) -> None:
    """ValueError for an average of checkpoints, which has no optimizer to go on with."""
    lineage = origin.description["train"]["lineage"]
    if lineage and lineage[-1]["carry"] == "merge":
        raise ValueError(
            f'start.from: {where} is an average of checkpoints and has no optimizer; set start.carry = "weights"'
        )


def parent_of(origin: Origin) -> dict[str, Any]:
    """What a run remembers of the checkpoint it began from."""
    train = origin.description["train"]
    return {
        "checkpoint": f"{origin.location}/{origin.name}",
        "hash": origin.hash,
        "run": origin.description["config"].get("run", {}).get("name"),
        "carry": origin.carry,
        "seed": origin.description["config"].get("run", {}).get("seed"),
        "tokens": train["clock"]["tokens"],
        "flops": train["flops"],
    }


def is_resume(origin: Origin | None) -> bool:
    """Whether a launch goes on with its own run."""
    return origin is not None and origin.carry == "own"
