"""What run.json says of a run: enough to tell later what was trained, on what, by what code."""

import platform
import subprocess
import time
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from runtime.config import Config
from runtime.model.counts import count, flops_per_token
from runtime.model.tying import depth_plan
from runtime.observe.devices import Peak
from runtime.parallel.mesh import Layout
from runtime.timetable import build_timetable
from schedulers.learning_rate import Annealed


@dataclass(frozen=True)
class SourceIdentity:
    """One token file as it was found."""

    path: str
    fingerprint: str
    tokens: int
    weight: float | None = None
    """None for an evaluation set."""
    name: str | None = None


def identity(
    config: Config,
    *,
    sources: list[SourceIdentity],
    evaluation_sets: list[SourceIdentity] = (),
    order_fingerprint: str | None = None,
    tokenizer_fingerprint: str | None = None,
    parent: dict[str, Any] | None = None,
    previous: dict[str, Any] | None = None,
    law: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The contents of run.json, to which `with_segment` adds the segments.

    `previous` is the run.json of the launch before: its id, creation time and segments are kept, and the law that gave
    the numbers of "auto", where this launch was not told another and the numbers are still those. Every
    column that `scaling` needs of a run is here or in the rows: what was asked for is here, what
    happened (tokens seen, losses, status) is in the rows.
    """
    previous = previous or {}
    schedule, optim = config.schedule, config.optim
    rate = schedule.build(optim.lr, config.batch.sequences, config.data.seq_len)
    contents = {
        "id": previous.get("id", uuid.uuid4().hex),
        "name": config.run.name,
        "created": previous.get("created", time.time()),
        "versions": versions(),
        "git": git_revision(),
        "seed": config.run.seed,
        "data": {
            "fingerprint": order_fingerprint,
            "seq_len": config.data.seq_len,
            "document_mask": config.data.document_mask,
            "sources": [_known(asdict(each)) for each in sources],
            "evaluation_sets": [_known(asdict(each)) for each in evaluation_sets],
        },
        "tokenizer": _known({"fingerprint": tokenizer_fingerprint, "vocab_size": config.model.vocab_size}),
        "optimizer": _known(optim.model_dump(mode="json")),
        "schedule": _known(
            {
                "kind": schedule.kind,
                "peak_lr": optim.lr,
                "final_lr": None if schedule.end is None else build_timetable(config).at(schedule.end).lr,
                "horizon_tokens": schedule.end,
                "warmup_tokens": schedule.warmup,
                **(
                    {"decay_tokens": rate.decay, "tail": rate.tail} if isinstance(rate, Annealed) and rate.decay else {}
                ),
                "branch_tokens": schedule.branch.at,
            }
        ),
        "batch": _known(
            {"kind": config.batch.kind, "changes": [list(each) for each in config.batches.changes] or None}
        ),
        "parent": parent,
        "law": law if law and "source" in law else _law_before(previous.get("law"), config),
    }
    return {**_known(contents), "segments": previous.get("segments", [])}


def _law_before(law: dict[str, Any] | None, config: Config) -> dict[str, Any] | None:
    """A law that was recorded, if the numbers are still the ones that it gave."""
    now = {
        "optim.lr": config.optim.lr,
        "optim.weight_decay": config.optim.weight_decay,
        "batch.sequences": config.batch.sequences,
    }
    values = (law or {}).get("values", {})
    return law if values and all(each.get("value") == now.get(key) for key, each in values.items()) else None


def with_segment(
    contents: dict[str, Any],
    index: int,
    config: Config,
    layout: Layout,
    *,
    start_tokens: int,
    device: str,
    precision: str,
    peak: Peak | None = None,
) -> dict[str, Any]:
    """`contents` with segment `index` added, or brought up to date where a resume changed its mesh."""
    counts = count(config.model)
    segment = {
        "index": index,
        "start_tokens": start_tokens,
        "counts": counts._asdict() if hasattr(counts, "_asdict") else asdict(counts),
        "flops_per_token": flops_per_token(config.model, config.data.seq_len),
        "seq_len": config.data.seq_len,
        "batch_sequences": config.batch.sequences,
        "batch_tokens": config.batch.sequences * config.data.seq_len,
        "model": config.model.model_dump(mode="json"),
        "streams": config.model.streams.count,
        "recurrences": max(Counter(depth_plan(config.model.num_layers, config.model.tying)).values()),
        "mesh": {**asdict(layout), "recompute": config.parallel.recompute, "compile": config.parallel.compile},
        "precision": precision,
        "device": device,
        "peak": {"flops": peak.flops, "source": peak.source} if peak else None,
    }
    others = [each for each in contents.get("segments", []) if each["index"] != index]
    segments = sorted([*others, _known(segment)], key=lambda each: each["index"])
    return {**contents, "segments": segments}


def versions() -> dict[str, str]:
    """Versions of the interpreter and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "megatron-core", "tokenizers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    try:
        found["meristem"] = metadata.version("meristem")
    except metadata.PackageNotFoundError:
        found["meristem"] = "source tree"
    return found


def git_revision() -> dict[str, Any] | None:
    """Commit of this source tree and whether it was changed since; None where it is not under git."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        # Without its optional lock, as a status that renews the index makes a commit beside it fail.
        command = ("git", "--no-optional-locks", *arguments)
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody else's repository, which says nothing of this code.
    if git("ls-files", "--error-unmatch", "runtime/observe/identity.py") is None:
        return None
    revision = git("rev-parse", "HEAD")
    if revision is None:
        return None
    return {"revision": revision, "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}


def _known(mapping: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}
