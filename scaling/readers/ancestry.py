"""What of a run's tokens is its own, and what its ancestors': read from its run.json and from those of its ancestors.

A run that goes on with its parent's model and data, as the branches of a ladder do, is one run with it. Where the model
or the data became others, by growth, conversion or a second stage of training, another run began.
"""

import json
from pathlib import Path
from typing import NamedTuple

from scaling.readers.mixture import mixture
from scaling.readers.rows import Row

GENERATIONS = 64
"""Ancestors that are looked at: more than anybody has, so that folders that name each other come to an end."""


class Begun(NamedTuple):
    """Where the run began that a launch's clock counts."""

    clock: float = 0.0
    """What its clock had shown; below 0 where an earlier part had a clock of its own."""
    ancestors: float = 0.0
    """Tokens of training before, of other models or on other data."""
    labels: tuple[str, ...] = ()


def begun(folder: Path, identity: Row, generations: int = GENERATIONS) -> Begun:
    """Where the run in a folder began. A parent whose run.json is not found is taken for the same run where its clock
    goes on, and for another where it does not; a label says so."""
    parent = identity.get("parent")
    if not isinstance(parent, dict) or not isinstance(parent.get("tokens"), int | float):
        return Begun()
    left, goes_on = float(parent["tokens"]), parent.get("carry") == "all"
    place, theirs = _run_of(folder, parent) if generations else (folder, None)
    if theirs is None:
        before, is_same = Begun(), goes_on
        labels = () if _is_branch(identity, left) else (_unknown(goes_on),)
    else:
        before, (is_same, labels) = begun(place, theirs, generations - 1), _compared(identity, theirs, left, goes_on)
    labels = tuple(dict.fromkeys((*before.labels, *labels)))
    if is_same:
        return Begun(before.clock if goes_on else before.clock - left, before.ancestors, labels)
    return Begun(left if goes_on else 0.0, before.ancestors + left - before.clock, labels)


def _compared(identity: Row, parent: Row, left: float, goes_on: bool) -> tuple[bool, tuple[str, ...]]:
    """Whether a run has its parent's model and data, and what is said of it."""
    ours, theirs = _model(identity), _model(parent, left)
    differing = [] if mixture(identity.get("data", {})) == mixture(parent.get("data", {})) else ["data"]
    if ours is None or theirs is None:
        if differing:
            return False, ("began from a run of other data",)
        return goes_on, (_unknown(goes_on),)
    differing += [] if ours == theirs else ["model"]
    if differing:
        return False, (f"began from a run of other {' and '.join(sorted(differing))}",)
    return True, () if goes_on else ("goes on from its parent's weights with a new clock; its tokens are both runs'",)


def _unknown(goes_on: bool) -> str:
    taken = "the same run" if goes_on else "another run"
    return f"whether its parent had its model and data is unknown; taken for {taken}"


def _is_branch(identity: Row, left: float) -> bool:
    """Whether a run is its parent's anneal, which has its model and data."""
    parent, schedule = identity["parent"], identity.get("schedule", {})
    return parent.get("carry") == "all" and schedule.get("branch_tokens") == left


def _model(identity: Row, at: float = 0.0) -> Row | None:
    """The model that was trained up to a run's clock; at 0 that of its beginning."""
    segments = [each for each in identity.get("segments") or [] if isinstance(each.get("model"), dict)]
    trained = [each for each in segments[1:] if each.get("start_tokens", 0) < at]
    return (trained[-1] if trained else segments[0])["model"] if segments else None


def _run_of(folder: Path, parent: Row) -> tuple[Path, Row | None]:
    """The folder and run.json of the run that a parent's checkpoint is of: around the checkpoint, or beside its child.
    A checkpoint that was grown or converted lies in no run, but has the name of the one that trained it."""
    checkpoint, name = Path(str(parent.get("checkpoint") or "")), parent.get("run")
    for place in (checkpoint.parent.parent, folder.parent / str(name or "")):
        try:
            found = json.loads((place / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        is_named = isinstance(found, dict) and (name is None or found.get("name") == name)
        if is_named and place.resolve() != folder.resolve():
            return place, found
    return folder, None
