"""The loss of a run directory over what it cost, ancestors included, for `scaling.comparison`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling.comparison import Curve

TRAINING = "training"
"""Of a curve that is the smoothed training loss, instead of the name of a held-out set."""
SPENT = ("flops", "seconds")
SHARE, FEWEST = 0.02, 9
"""Of the logged rows that a running median spans, and how many at least."""
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Lineage:
    """A run's logs, with those of the runs that it goes on from as far as they can be read."""

    name: str
    metrics: Rows
    """In order; `seconds` are of all that could be read."""
    evaluations: Rows
    notes: tuple[str, ...] = ()

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(row["set"] for row in self.evaluations))


def read_lineage(folder: Path) -> Lineage:
    """The logs of a run and its ancestors. ValueError for a folder that holds no run with a logged step."""
    metrics = [row for row in last_writes(folder / "metrics.jsonl", ("step",)) if "loss" in row]
    if not metrics:
        raise ValueError(f"{folder} has no logged step in a metrics.jsonl")
    evaluations = last_writes(folder / "evaluations.jsonl", ("tokens", "segment", "set"))
    metrics = [row | {"seconds": row.get("wall_time", float("nan"))} for row in metrics]
    name, parent = _identity(folder)
    if parent is None:
        return Lineage(name, metrics, evaluations)
    return _after(_ancestors(folder, parent), parent, Lineage(name, metrics, evaluations))


def curve(lineage: Lineage, measure: str) -> Curve:
    """The losses of a held-out set, or the running median of the training loss for `TRAINING`."""
    tokens = _column(lineage.metrics, "tokens")
    if measure == TRAINING:
        at, losses = tokens, running_median(_column(lineage.metrics, "loss"))
    else:
        rows = [row for row in lineage.evaluations if row["set"] == measure and row["tokens"] > 0]
        at, losses = _column(rows, "tokens"), _column(rows, "loss")
    spent = {name: np.interp(at, np.r_[0.0, tokens], np.r_[0.0, _column(lineage.metrics, name)]) for name in SPENT}
    return Curve(lineage.name, losses, {"tokens": at} | spent)


def common_measure(lineages: Sequence[Lineage], wanted: str | None = None) -> str:
    """What the runs are compared by: the first held-out set that all were evaluated on at least twice, else the
    training loss. ValueError for one that is asked for and not there."""
    shared = [
        name
        for name in lineages[0].sets
        if all(sum(row["set"] == name and row["tokens"] > 0 for row in each.evaluations) > 1 for each in lineages)
    ]
    if wanted is None:
        return shared[0] if shared else TRAINING
    if wanted != TRAINING and wanted not in shared:
        raise ValueError(
            f"{wanted!r} is no set that all runs were evaluated on; accepted: {', '.join([*shared, TRAINING])}"
        )
    return wanted


def running_median(losses: np.ndarray) -> np.ndarray:
    """Each loss replaced by the median of those around it, fewer at the ends, (n,)."""
    reach = max(FEWEST, round(SHARE * len(losses))) // 2
    places = range(len(losses))
    near = [min(reach, place, len(losses) - 1 - place) for place in places]
    return np.array([np.median(losses[place - k : place + k + 1]) for place, k in zip(places, near, strict=True)])


def last_writes(path: Path, identity: Sequence[str]) -> Rows:
    """The rows of a log in order of tokens, where of those that agree in `identity` the last one written counts. A
    line that is no row, as a kill leaves one, is left out."""
    found: dict[tuple, dict[str, Any]] = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("tokens"), int | float):
            found[tuple(row.get(each) for each in identity)] = row
    return sorted(found.values(), key=lambda row: row["tokens"])


def _identity(folder: Path) -> tuple[str, Mapping[str, Any] | None]:
    """A run's name and what it goes on from."""
    try:
        known = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        parent = known.get("parent")
        return str(known.get("name", folder.name)), parent if isinstance(parent, dict) else None
    except (OSError, ValueError, AttributeError):
        return folder.name, None


def _ancestors(folder: Path, parent: Mapping[str, Any]) -> Lineage | None:
    """The logs of the run that a checkpoint belongs to; None where they cannot be read."""
    checkpoint = Path(str(parent.get("checkpoint", "")))
    beside = folder.parent / str(parent.get("run", ""))
    for place in (checkpoint.parent.parent, beside):
        if place.resolve() != folder.resolve() and (place / "metrics.jsonl").exists():
            try:
                return read_lineage(place)
            except (ValueError, RecursionError):
                continue
    return None


def _after(before: Lineage | None, parent: Mapping[str, Any], own: Lineage) -> Lineage:
    """A run's logs after those of its ancestors, up to where it left them. With weights alone its clock began anew, and
    the tokens of its ancestors are added."""
    left, carried = parent.get("tokens", 0), parent.get("carry") == "all"
    shift = 0 if carried else left
    metrics = [row | {"tokens": row["tokens"] + shift} for row in own.metrics]
    evaluations = [row | {"tokens": row["tokens"] + shift} for row in own.evaluations]
    if before is None:
        note = (
            f"{own.name}: the logs of {parent.get('run') or 'its parent'} cannot be read, so its wall time is its own"
        )
        start = {"tokens": left, "flops": parent.get("flops", 0), "seconds": 0.0, "loss": metrics[0]["loss"]}
        return Lineage(own.name, [start, *metrics], evaluations, (*own.notes, note))
    earlier = [row for row in before.metrics if row["tokens"] <= left]
    seconds = float(
        np.interp(left, [0.0, *_column(before.metrics, "tokens")], [0.0, *_column(before.metrics, "seconds")])
    )
    metrics = [row | {"seconds": row["seconds"] + seconds} for row in metrics]
    start = {"tokens": left, "flops": parent.get("flops", 0), "seconds": seconds}
    joint = [start | {"loss": earlier[-1]["loss"]}] if earlier and earlier[-1]["tokens"] < left else []
    evaluations = [*(row for row in before.evaluations if row["tokens"] <= left), *evaluations]
    return Lineage(own.name, [*earlier, *joint, *metrics], evaluations, before.notes)


def _column(rows: Rows, name: str) -> np.ndarray:
    return np.array([row.get(name, float("nan")) for row in rows], dtype=float)
