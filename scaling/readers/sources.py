"""What lies at a path: run directories, event folders, logs and tables."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scaling.readers import megatron
from scaling.readers.tables import SUFFIXES, suffix_of

Kind = Literal["run", "events", "log", "table", "unread"]
LOGS = (".log", ".txt", ".out", "")
SNIFFED = 1 << 20
"""Bytes of a file that are looked at for a logged iteration."""


@dataclass(frozen=True)
class Source:
    kind: Kind
    path: Path


def find(paths: Sequence[str | Path]) -> list[Source]:
    """All sources at and below some paths, each once, in order. A folder gives its run directories and event folders,
    beside which its logs and tables are unread; one without any gives these. ValueError for a path that is not there or
    gives nothing."""
    found: dict[str, Source] = {}
    for each in paths:
        path = Path(each)
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        sources = list(_below(path)) if path.is_dir() else [_file(path)]
        if not sources:
            raise ValueError(f"{path}: neither run directories, event files, logs nor tables are here")
        for source in sources:
            real = os.path.realpath(source.path)
            if real not in found or found[real].kind == "unread":
                found[real] = source
    return list(found.values())


def _below(folder: Path) -> Iterator[Source]:
    runs, files = [], []
    for parent, folders, names in os.walk(folder):
        here = Path(parent)
        if "run.json" in names or "metrics.jsonl" in names:
            runs.append(Source("run", here))
            folders[:] = [name for name in folders if name not in ("tensorboard", "checkpoints", "profile")]
        elif any("tfevents" in name for name in names):
            runs.append(Source("events", here))
        else:
            files += [here / name for name in names if suffix_of(here / name) in (*SUFFIXES, *LOGS[:-1])]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    yield from runs
    for path in sorted(files):
        suffix = suffix_of(path)
        if runs and suffix == ".json":  # settings and results, which are tables hardly ever
            continue
        if suffix in SUFFIXES or _looks_like_a_log(path):
            yield Source("unread" if runs else "table" if suffix in SUFFIXES else "log", path)


def _file(path: Path) -> Source:
    if path.name in ("run.json", "metrics.jsonl", "evaluations.jsonl"):
        return Source("run", path.parent)
    if "tfevents" in path.name:
        return Source("events", path.parent)
    if suffix_of(path) in SUFFIXES:
        return Source("table", path)
    return Source("log" if _looks_like_a_log(path) else "table", path)


def _looks_like_a_log(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(SNIFFED)
        file.seek(max(0, os.fstat(file.fileno()).st_size - SNIFFED))
        ends = head + file.read()
    return megatron.is_log(ends.decode("utf-8", "replace"))
