"""What has become of a ladder's runs: read from their folders, and from what the sweep wrote beside them.

<run.dir>/<ladder>/<run>/                      the run
                   sweep/<run>.toml            the configuration that it was launched with
                         <run>.log             what its launches printed
                         <run>.json            how it ended, where that was not as planned
                         <run>.lock            held while a sweep has it and its branches to run
"""

import fcntl
import json
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from launch.config import compose
from launch.ladder_runs import Run, essence
from runtime.checkpoint.retention import parse
from runtime.checkpoint.storage import open_storage
from runtime.checkpoint.unsharded import complete
from runtime.observe.jsonl import JsonLines, Row, read_rows

FOLDER = "sweep"
LAST_LINES = 3
LAUNCHES = ("run_start", "resume", "run_end")

State = Literal["wanted", "begun", "finished", "diverged", "failed", "stopped early", "no parent"]
ENDED = ("finished", "diverged", "failed", "stopped early", "no parent")
"""States of runs that are not to be launched."""


@dataclass(frozen=True)
class Ending:
    """How a run ended before its end."""

    state: Literal["diverged", "failed", "stopped early"]
    reason: str
    """A line with the numbers it rests on."""
    evidence: dict[str, Any]


def own(run: Run, suffix: str) -> Path:
    """A file that the sweep keeps of a run."""
    return run.folder.parent / FOLDER / f"{run.name}{suffix}"


def ending(run: Run) -> Ending | None:
    path = own(run, ".json")
    return Ending(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def write_ending(run: Run, found: Ending) -> None:
    """Remember how a run ended; one that was stopped has it among its own events too."""
    path = own(run, ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    if found.state == "stopped early":
        events = JsonLines(run.folder / "events.jsonl")
        events.append({"event": "stopped_early", "reason": found.reason, **found.evidence})
        events.close()


def last_words(run: Run) -> list[str]:
    """The last lines that its launches printed."""
    path = own(run, ".log")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [line for line in lines if line.strip()][-LAST_LINES:]


def outcome(run: Run, after: int = 0) -> str | None:
    """How its last launch ended, as the run tells by its events after the first so many; "begun" of one that has not
    ended, None without any."""
    rows = [row for row in read_rows(run.folder / "events.jsonl")[after:] if row["event"] in LAUNCHES]
    return rows[-1].get("outcome", "begun") if rows else None


def state(run: Run, parent: Run | None) -> State:
    """How a run stands, given the run it is a branch of."""
    found = ending(run)
    if found is not None:
        return found.state
    told = outcome(run)
    if told in ("finished", "diverged"):
        return told
    if told is not None:
        return "begun"
    gone = parent is not None and state(parent, None) in ENDED and branch_point(run, parent) is None
    return "no parent" if gone else "wanted"


def branch_point(run: Run, parent: Run) -> str | None:
    """The checkpoint that a branch begins from, if its parent has come so far."""
    with suppress(ValueError, OSError):
        names = complete(open_storage(parent.checkpoints))
        fitting = [name for name in names if parse(name).tokens == run.begin]
        return f"{parent.checkpoints}/{fitting[-1]}" if fitting else None
    return None


def write_config(run: Run, parent: Run | None) -> Path:
    """The file to launch a run by. One that has begun keeps the way it is got, which a longer ladder may change."""
    raw = run.config.model_dump(mode="json", by_alias=True, exclude_none=True)
    there = run.folder / "config.toml"
    if there.exists():
        known = tomllib.loads(there.read_text(encoding="utf-8"))
        raw |= {"schedule": known["schedule"], "start": known.get("start", {})}
        points = {*raw["checkpoint"].get("at", []), *known["checkpoint"].get("at", [])}
        raw["checkpoint"]["at"] = sorted(points)
    elif parent is not None:
        raw["start"] = {"from": branch_point(run, parent), "carry": "all"}
    path = own(run, ".toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(raw), encoding="utf-8")
    return path


def refuse_contradictions(runs: Sequence[Run]) -> None:
    """ValueError if a run that has begun is another one than the ladder now wants by its name."""
    lines = []
    for run in runs:
        path = run.folder / "config.toml"
        if not path.exists():
            continue
        there, wanted = essence(compose(path)), essence(run.config)
        keys = [key for key in wanted | there if wanted.get(key) != there.get(key)]
        told = ", ".join(f"{key} ({there.get(key)!r}, now {wanted.get(key)!r})" for key in keys[:3])
        if keys:
            lines.append(f"{run.folder} differs in {told}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else ""))
    if lines:
        shown = "\n  ".join(lines[:5] + ([f"and {len(lines) - 5} more runs"] if len(lines) > 5 else []))
        raise ValueError(f"the ladder contradicts runs that exist; move them away, or give it another name:\n  {shown}")


def others(runs: Sequence[Run]) -> list[str]:
    """Folders of runs beside those of the ladder, which an analysis of its folder would read too."""
    (folder,) = {run.folder.parent for run in runs}
    known = {run.name for run in runs}
    found = (path.parent.name for path in folder.glob("*/config.toml"))
    return sorted(name for name in found if name not in known)


def spent(run: Run) -> tuple[float, float]:
    """FLOPs and seconds of the run itself so far."""
    row = last_row(run)
    if row is None:
        return 0.0, 0.0
    done = (row["tokens"] - run.begin) / (run.end - run.begin)
    return min(1.0, max(0.0, done)) * run.flops, row.get("wall_time", 0.0)


def last_row(run: Run) -> Row | None:
    rows = tail(run.folder / "metrics.jsonl", 1)
    return rows[-1] if rows else None


def tail(path: Path, number: int, reach: int = 1 << 16) -> list[Row]:
    """The last complete rows of a file that is being written to, at most so many; of its last `reach` bytes alone."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - reach))
        lines = file.read().split(b"\n")[:-1]
    rows = []
    for line in lines[-number:]:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


@contextmanager
def locked(runs: Sequence[Run]) -> Iterator[None]:
    """Have these runs to oneself. ValueError if another sweep has one of them."""
    with ExitStack() as held:
        for run in (each for each in runs if each.parent is None):
            path = own(run, ".lock")
            path.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(open(path, "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{run.name} is in the hands of another sweep that is running") from None
        yield
