"""Reading runs: from run directories, event files, logs and tables to one table with one row a run."""

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from scaling.columns import COLUMNS, DUPLICATE, NAMES, TEXTS
from scaling.readers import event_files, histories, megatron, run_directory, tables, wandb_exports
from scaling.readers.amounts import UNITS
from scaling.readers.derived import complete, join, sizes_in_names, unknown
from scaling.readers.histories import History
from scaling.readers.mapping import Mapped, check_names
from scaling.readers.sources import Source, find
from scaling.table import RunTable, tidy

UNREAD = "tables or logs beside runs were not read"
"""What the note on them has in it."""


def read(
    paths: Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    constants: Mapping[str, str | float] | None = None,
) -> RunTable:
    """One row for each run at and below some paths.

    `columns` says which name is which column, as {"total": "params * 1e6"}, where a guess is wrong or not made; for
    `loss` also the tag of a log, the held-out set of a run directory, or "train" for its smoothed training loss.
    `constants` are values for columns that stay unknown otherwise, as {"seq_len": 2048, "tokens": "42B"}.

    ValueError, naming the file and the column or line, for what cannot be read or is not certain.
    """
    columns, constants = dict(columns or {}), dict(constants or {})
    check_names(list(columns), "columns")
    check_names(list(constants), "constants")
    parts: list[Mapped] = []
    digests: list[str] = []
    sources = find(paths)
    runs = [each for each in sources if each.kind == "run"]
    if runs:
        parts.append(_run_directories(runs, columns, digests))
    foreign = _all_foreign([each for each in sources if each.kind not in ("run", "unread")], columns, digests)
    _check_given(foreign, columns)
    parts += foreign
    frame = pd.concat([each.frame for each in parts if len(each.frame)] or [pd.DataFrame()], ignore_index=True)
    if frame.empty:
        raise ValueError(f"{', '.join(map(str, paths))}: no runs")
    mapping = _joined(each.mapping for each in parts)
    named = sizes_in_names(frame, mapping, {*columns, *constants})
    _mark_repeated(frame, {str(each.path) for each in sources if each.kind == "table"})
    _name_runs(frame)
    frame = _with_constants(frame, constants, mapping)
    frame = tidy(complete(_mark_finite(frame), mapping))
    unread = [str(each.path) for each in sources if each.kind == "unread"]
    notes = dict.fromkeys(note for each in parts for note in each.notes)
    if unread:
        some = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
        notes[f"{len(unread)} {UNREAD}; give them by their own names: {some}"] = None
    whole = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return RunTable(frame, mapping, (*notes, *named, *unknown(frame)), whole)


def _run_directories(sources: list[Source], columns: Mapping[str, str], digests: list[str]) -> Mapped:
    now = time.time()
    held_out = columns.get("loss") or None
    readings = [_run_directory(each.path, held_out, now) for each in sources]
    sets = dict.fromkeys(name for each in readings for name in each.sets)
    if held_out not in (None, run_directory.TRAINING) and held_out not in sets:
        known = ", ".join([*sets, run_directory.TRAINING])
        raise ValueError(f"loss = {held_out!r}: no run was evaluated on it at its end; accepted: {known}")
    digests += [each.digest for each in readings]
    rows = [each.row for each in readings]
    _mark_duplicates(rows, [each.id or each.digest for each in readings])
    if held_out is None and len(sets) > 1:
        notes = [f"held-out sets: {', '.join(sets)}; of each run the first is taken, columns loss=SET takes another"]
    else:
        notes = []
    frame = pd.DataFrame(rows)
    known = [name for name in frame if name in NAMES and frame[name].notna().any()]
    mapping = {name: run_directory.ORIGINS.get(name, "run.json") for name in known}
    return Mapped(frame, mapping, notes)


def _run_directory(folder: Path, held_out: str | None, now: float) -> run_directory.Reading:
    try:
        return run_directory.read(folder, held_out, now=now)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{folder}: its run.json or logs are not as a run writes them ({error!r})") from None


def _mark_duplicates(rows: list[dict], keys: list[str]) -> None:
    """Label all of a run's copies but the one that came furthest."""
    best: dict[str, int] = {}
    for k, key in enumerate(keys):
        if key not in best or rows[k].get("tokens", 0) > rows[best[key]].get("tokens", 0):
            best[key] = k
    for k, key in enumerate(keys):
        if best[key] != k:
            rows[k]["labels"] = join(rows[k]["labels"], f"{DUPLICATE}{rows[best[key]]['source']}")


def _all_foreign(sources: list[Source], columns: Mapping[str, str], digests: list[str]) -> list[Mapped]:
    """What event folders, logs and tables hold; of those that are equal in all bytes all but the first are labelled. A
    chart may be a part of a run, so of those it is whole runs that are compared."""
    found: list[Mapped] = []
    charts: list[History] = []
    first: dict[tuple[str, ...], Path] = {}
    for source in sources:
        before = len(digests)
        parts = _foreign(source, columns, digests)
        charts += [each for each in parts if isinstance(each, History)]
        rows = [each for each in parts if isinstance(each, Mapped)]
        original = first.setdefault(tuple(digests[before:]), source.path)
        if original != source.path:
            for each in rows:
                each.frame["labels"] = [join(label, f"{DUPLICATE}{original}") for label in each.frame["labels"]]
        found += rows
    return found + [histories.row(each, columns) for each in wandb_exports.joined(charts)]


def _mark_repeated(frame: pd.DataFrame, sources: set[str]) -> None:
    """Label the rows of these sources that an earlier one of them has too, equal in all but the place."""
    rows = frame.index[frame["source"].isin(sources) & ~frame["labels"].str.contains(DUPLICATE, na=False)]
    contents = pd.util.hash_pandas_object(frame.loc[rows].drop(columns=["source", "labels"]), index=False)
    first: dict[int, str] = {}
    for index, content, source in zip(rows, contents, frame["source"][rows], strict=True):
        if first.setdefault(content, source) != source:
            frame.loc[index, "labels"] = join(frame["labels"][index], f"{DUPLICATE}a row of {first[content]}")


def _name_runs(frame: pd.DataFrame) -> None:
    """Name the runs without a name by their table and row."""
    names = frame["run"] if "run" in frame else pd.Series(None, index=frame.index, dtype=object)
    places = zip(frame["source"], frame.groupby("source").cumcount() + 1, strict=True)
    default = [f"{Path(source).stem}:{row}" for source, row in places]
    frame["run"] = names.where(names.notna(), default)


def _foreign(source: Source, columns: Mapping[str, str], digests: list[str]) -> list[Mapped | History]:
    """The rows of a source, or what charts show, which may be a part of a run."""
    path = source.path
    if source.kind == "events":
        digests += [_digest(each) for each in sorted(path.glob(event_files.PATTERN))]
        return [histories.row(event_files.read(path), columns)]
    if source.kind == "log":
        text = path.read_text(encoding="utf-8", errors="replace")
        digests.append(_digest(path))
        is_fresh = time.time() - path.stat().st_mtime < run_directory.RECENT
        return [histories.row(megatron.read(path, text, is_fresh=is_fresh), columns)]
    frame, odd, digest = tables.load(path)
    digests.append(digest)
    if wandb_exports.is_wide(list(frame.columns)):
        return list(wandb_exports.wide(frame, path))
    if wandb_exports.is_long(frame, columns):
        others = {ours: name for ours, name in columns.items() if ours != "run"}
        found = [histories.row(each, others) for each in wandb_exports.long(frame, path, columns)]
        if 1 < len(found) < len(frame):
            found[0].notes.append(
                f'{path}: its rows are taken for logged steps of {len(found)} runs; columns run="" takes each for a '
                "run, and run=NAME names the column that tells runs apart"
            )
        return found
    return [tables.rows(frame, odd, path, columns)]


def _check_given(parts: Sequence[Mapped], columns: Mapping[str, str]) -> None:
    """ValueError for a name that was given and that none of these has."""
    for ours in columns:
        if parts and all(ours in each.missing for each in parts):
            raise ValueError(parts[0].missing[ours])


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _joined(mappings: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """One mapping for all parts; where they differ, all names."""
    names: dict[str, dict[str, None]] = {}
    for mapping in mappings:
        for ours, name in mapping.items():
            names.setdefault(ours, {})[name] = None
    return {ours: "; ".join(found) for ours, found in names.items()}


def _with_constants(frame: pd.DataFrame, constants: Mapping[str, str | float], mapping: dict[str, str]) -> pd.DataFrame:
    """`frame` with values for what is unknown. ValueError for one that is no number, or is known of every run."""
    for name, given in constants.items():
        value = given if name in TEXTS else _amount(name, given)
        there = frame[name].notna() if name in frame else pd.Series(False, index=frame.index)
        if there.all():
            raise ValueError(f"constants: {name} = {given} is known of every run already, from {mapping.get(name)!r}")
        before = frame[name] if name in frame else pd.Series(None, index=frame.index, dtype=object)
        frame[name] = before.where(there, value)
        mapping[name] = f"{mapping[name]}; else constant {given}" if name in mapping else f"constant {given}"
    return frame


def _amount(name: str, given: str | float) -> float:
    """A number, or a text such as "42e9" or "42B"."""
    text = str(given).strip().lower().replace("_", "")
    unit = UNITS.get(text[-1:], 1.0)
    try:
        value = float(text[:-1] if unit != 1 else text) * unit
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise ValueError(f"constants: {name} = {given!r} is not a number; accepted: 2048, 42e9, 42B")
    column = COLUMNS[NAMES.index(name)]
    if not column.least <= value <= column.most:
        raise ValueError(f"constants: {name} = {given}; accepted: {column.least:g} to {column.most:g}")
    return value


def _mark_finite(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as floats, so that formulas can be applied to them."""
    for name in frame.columns:
        if name in NAMES and name not in TEXTS:
            frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(float)
    return frame
