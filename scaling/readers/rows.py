"""The rows of a run's `.jsonl` logs: of a long one only the end is parsed, which is all that a run's row needs."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scaling.curves import FEWEST, LARGEST_SHARE, ROWS, SHARE, last_writes

CHUNK = 1 << 16
HEAD = 1 << 13
Row = dict[str, Any]


@dataclass
class Tail:
    """The rows at the end of a log that count, in order of steps, and the first that was written."""

    rows: list[Row]
    first: Row | None = None
    labels: list[str] = field(default_factory=list)
    read: bytes = b""
    """What was looked at, for the fingerprint."""

    def column(self, name: str) -> np.ndarray:
        """A column, (rows,), NaN where a row lacks it."""
        return np.array([number(row.get(name)) for row in self.rows])

    def last(self, name: str) -> float:
        """The last number of a column that is there; NaN if none is."""
        return next((value for value in self.column(name)[::-1] if np.isfinite(value)), float("nan"))


def read_all(path: Path) -> tuple[list[Row], list[str], bytes]:
    """The rows of a short log in the order of writing, what is odd about it, and its bytes. A missing file is empty."""
    data = path.read_bytes() if path.exists() else b""
    rows, labels = parse(data, path.name, lambda: 0)
    return rows, labels, data


def read_tail(path: Path) -> Tail:
    """As many rows from the end of a log as the window of a final loss needs (`scaling.curves`). Rows that a resume has
    superseded are left out, as `last_writes` says; they are looked for from the end, so what lies before is not read.
    """
    size = path.stat().st_size if path.exists() else 0
    if not size:
        return Tail([])
    with open(path, "rb") as file:
        head = file.read(HEAD).split(b"\n")[0]
        first, _ = parse(head + b"\n", path.name, lambda: 0)
        length = CHUNK
        while True:
            start = max(0, size - length)
            file.seek(start)
            data = file.read(size - start)
            cut = data.find(b"\n") + 1 if start else 0

            def before(end: int = start + cut) -> int:
                return _lines(path, end)

            rows, labels = parse(data[cut:], path.name, before)
            rows = [row for row in rows if np.isfinite(number(row.get("step")))]
            kept = last_writes(np.array([row["step"] for row in rows]))
            rows = [row for row, is_kept in zip(rows, kept, strict=True) if is_kept]
            if start == 0 or _suffices(rows):
                return Tail(rows, next(iter(first), None), labels, data[cut:])
            length *= 4


def rewritten(path: Path) -> int:
    """How many rows of a log a later launch has superseded, from its steps alone."""
    steps = scan(path, "step")
    return int(len(steps) - last_writes(steps).sum())


def scan(path: Path, name: str) -> np.ndarray:
    """The numbers under one name in a whole log, in the order of writing, without parsing its rows."""
    pattern = re.compile(rb'"' + re.escape(name.encode()) + rb'":\s*(-?[0-9.][0-9.eE+-]*)')
    return np.array(pattern.findall(path.read_bytes()), dtype=float)


def parse(data: bytes, name: str, lines_before) -> tuple[list[Row], list[str]]:
    """The rows of some lines, and labels for those that are no JSON objects. `lines_before` tells how many lines lie
    before, where a message needs it."""
    *lines, fragment = data.split(b"\n")
    rows, broken = [], []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(number)
    labels = []
    if broken:
        at = lines_before()
        some = ", ".join(str(at + each) for each in broken[:3])
        labels.append(
            f"{name}: line {some} is not a JSON object" + (f" ({len(broken)} such)" if len(broken) > 3 else "")
        )
    if fragment:
        labels.append(f"{name}: last line cut short")
    return rows, labels


def _suffices(rows: Sequence[Row]) -> bool:
    tokens = [number(row.get("tokens")) for row in rows]
    if len(tokens) < FEWEST or not np.isfinite([tokens[0], tokens[-1]]).all():
        return False
    first, last = tokens[0], tokens[-1]
    return first <= last * (1 - LARGEST_SHARE) or (first <= last * (1 - SHARE) and len(tokens) >= ROWS)


def _lines(path: Path, end: int) -> int:
    with open(path, "rb") as file:
        return file.read(end).count(b"\n")


def number(value: Any) -> float:
    """A value of a row as a float; NaN for what is none."""
    return float(value) if isinstance(value, int | float) else float("nan")


def changed_at(path: Path) -> float:
    """Unix time of the last write; minus infinity where there is no file."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return float("-inf")
