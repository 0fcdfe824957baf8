"""Plain tables: CSV, JSON lines, JSON and Parquet, with one row a run or one row a logged step."""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaling.columns import COLUMNS, DIVERGED, FINISHED, normalised
from scaling.readers.amounts import as_status
from scaling.readers.derived import resolve_batch
from scaling.readers.losses import candidate
from scaling.readers.mapping import SIZES, TIMES, Mapped, guess

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
COMMA, POINT = (re.compile(rf"[-+]?\d+{mark}\d+(?:[eE][-+]?\d+)?(?:\s*(?:±|\+/?-).*)?$") for mark in (",", r"\."))
"""A number with a decimal comma, and with a decimal point."""
DELIMITERS = ",;\t|"
NUMBER = re.compile(r'[\s"]*[-+]?[\d.]+(?:[eE][-+]?\d+)?[kKmMbBtT]?[\s"]*')
NANS = ("nan", "NaN", "NAN", "-nan", "-NaN")
NOT_A_NUMBER = "\0NaN"
"""What JSON's NaN is until it can be told from null no more."""


def suffix_of(path: Path) -> str:
    """The end of a file's name that says what it holds: that before ".gz" of a compressed one."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def load(path: Path) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """A table as it stands, where a cell is written as "nan" and not just empty (its shape, of bool), and the SHA-256
    of its file. ValueError, naming the file and where it can the line, for what is no table."""
    data = path.read_bytes()
    try:
        frame, odd = _parse(path, gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError, csv.Error) as error:
        raise ValueError(f"{path}: not a table that can be read: {str(error).strip()}") from None
    for name in frame.select_dtypes(object):
        frame[name] = frame[name].map(_scalar)
    odd.columns = frame.columns = [str(name).strip() for name in frame.columns]
    named = [not (name.startswith("Unnamed:") or name == "") for name in frame.columns]
    frame, odd = (each.loc[:, named & ~frame.columns.duplicated()] for each in (frame, odd))
    filled = frame.notna().any(axis=1)
    frame, odd = frame[filled].reset_index(drop=True), odd[filled].reset_index(drop=True)
    if frame.empty:
        raise ValueError(f"{path}: holds no rows")
    return frame, odd, hashlib.sha256(data).hexdigest()


def rows(frame: pd.DataFrame, odd: pd.DataFrame, path: Path, columns: Mapping[str, str]) -> Mapped:
    """A table with one row a run, as `load` gives it, in our columns; runs may be without a name.

    ValueError as of `mapping.guess`, or where the only column that looks like the loss, a size or tokens has values
    that cannot be.
    """
    found = guess(frame, columns, str(path))
    resolve_batch(found, str(path))
    ours, name = found.frame, found.mapping.get("non_embedding")
    if name in ("N", "n"):
        found.notes.append(
            f"{path}: {name!r} is taken for parameters without embeddings; if it counts them, give columns "
            f'total="{name}"'
        )
    _refuse_unreadable(found, path)
    labels = [[] for _ in range(len(ours))]
    _read_status(found, frame, odd, labels, path)
    for k in np.flatnonzero(frame.duplicated().to_numpy()):
        labels[k].append("duplicate of an earlier row")
    if "loss" in ours:
        for k in np.flatnonzero(~(ours["loss"].to_numpy(dtype=float) > 0)):
            labels[k].append(_odd_loss(float(ours["loss"].iloc[k])))
    ours["labels"] = ["; ".join(each) or None for each in labels]
    ours["source"] = f"{path}"
    return found


def _read_status(found: Mapped, frame: pd.DataFrame, odd: pd.DataFrame, labels: list[list[str]], path: Path) -> None:
    """Statuses in our words; a run of unknown status is taken for finished, unless its loss is written as nan or inf or
    as a word such as "diverged" or "oom". An empty cell tells of no divergence."""
    ours = found.frame
    statuses: list[str | None] = [None] * len(ours)
    if "status" in ours:
        statuses = [None if pd.isna(each) else as_status(each) for each in ours["status"]]
        strange = sorted({str(each) for each, known in zip(ours["status"], statuses, strict=True)
                          if known is None and not pd.isna(each)})  # fmt: skip
        if strange:
            found.notes.append(f"{path}: status {', '.join(strange[:5])} is not known and taken for finished")
    for name in frame.columns:
        if normalised(name) in ("diverged", "isdiverged"):
            truth = [str(each).lower() in ("true", "1", "1.0", "yes") for each in frame[name]]
            statuses = [DIVERGED if each else status for each, status in zip(truth, statuses, strict=True)]
    if "loss" in ours:
        infinite = np.isinf(ours["loss"].to_numpy(dtype=float))
        names = [name for name in odd if _is_read_from(found.mapping["loss"], name)]
        for k, cells in enumerate(frame[names].to_numpy(dtype=object)):
            said = next((as_status(each) for each in cells if isinstance(each, str)), None)
            if said not in (None, FINISHED) and statuses[k] in (None, FINISHED):
                statuses[k] = said
                labels[k].append(f"its loss says {said}")
        written = odd[names].any(axis=1).to_numpy()
        for k in np.flatnonzero(infinite | written):
            if statuses[k] in (None, FINISHED):
                statuses[k] = DIVERGED
                labels[k].append("the loss is not finite")
    ours["status"] = [each or FINISHED for each in statuses]


def _is_read_from(expression: str, name: str) -> bool:
    """Whether a column was read from one of this name: as it is, as its logarithm, or times a factor."""
    times = TIMES.match(expression)
    return expression in (name, f"ln({name})") or (times is not None and times[1] == name)


def _odd_loss(loss: float) -> str:
    return "no finite loss" if not np.isfinite(loss) else f"the loss is {loss:.4g}"


def _refuse_unreadable(found: Mapped, path: Path) -> None:
    """ValueError where the loss, a size or the tokens were refused and nothing else stands in for them."""
    frame, refused = found.frame, found.refusals
    has_size = any(name in frame for name in SIZES)
    has_tokens = "tokens" in frame or ("flops" in frame and has_size) or {"steps", "batch_tokens"} <= set(frame)
    if "loss" in refused:
        raise ValueError(f"{path}: {refused['loss']}")
    wanted = ([] if has_size else list(SIZES)) + ([] if has_tokens else ["tokens", "flops"])
    for name in wanted:
        if name in refused:
            raise ValueError(f"{path}: {refused[name]}")
    found.notes += [f"{path}: {each}" for name, each in (refused | found.texts).items() if name not in frame]


def _parse(path: Path, data: bytes) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table, and where it has a written "nan"."""
    suffix = suffix_of(path)
    if suffix == ".parquet" or data[:4] == b"PAR1":
        import pyarrow

        try:
            return _parquet(data)
        except (pyarrow.ArrowException, ValueError) as error:
            raise ValueError(f"{path}: not a Parquet table: {error}") from None
    if b"\0" in data[:65536]:
        raise ValueError(f"{path}: holds binary data, not a table")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}), so not a table") from None
    if not text.strip():
        raise ValueError(f"{path}: is empty")
    if suffix in (".json", ".jsonl", ".ndjson") or text.lstrip()[0] in "{[":
        is_lines = text.lstrip()[0] == "{" and (suffix in (".jsonl", ".ndjson") or _is_lines(text))
        return _marked(_flat(_json_lines(path, text)) if is_lines else _json(path, text))
    return _delimited(path, text)


def _parquet(data: bytes) -> tuple[pd.DataFrame, pd.DataFrame]:
    from pyarrow import compute, parquet, types

    table = parquet.read_table(io.BytesIO(data))
    frame = table.to_pandas()
    frame = frame.reset_index([name for name in frame.index.names if name is not None and name not in frame])
    odd = pd.DataFrame(False, index=frame.index, columns=frame.columns)
    for field in table.schema:
        if types.is_floating(field.type) and field.name in odd:
            odd[field.name] = compute.is_nan(table[field.name]).fill_null(False).to_numpy()
    return frame, odd


def _scalar(value: Any) -> Any:
    """A cell that can be compared: lists and objects as their JSON."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return json.dumps(value, default=str) if isinstance(value, list | dict) else value


def _marked(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table from JSON with numbers in place of marks, and where they were."""
    odd = frame.map(lambda value: isinstance(value, str) and value == NOT_A_NUMBER).astype(bool)
    return frame.mask(odd).infer_objects() if odd.to_numpy().any() else frame, odd


def _constant(name: str) -> float | str:
    return NOT_A_NUMBER if name == "NaN" else float(name)


def _delimited(path: Path, text: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    lines = text.splitlines()
    comments = _comments(lines)
    header = lines[comments]
    delimiter = "\t" if suffix_of(path) == ".tsv" else max(DELIMITERS, key=header.count)
    if header.count(delimiter) == 0:
        delimiter = r"\s+" if _is_aligned(lines[comments:]) else ","
    if not all(character.isprintable() or character == "\t" for character in header):
        raise ValueError(f"{path}: its first line is not the header of a table")
    options = {"sep": delimiter, "skiprows": comments, "skipinitialspace": True, "low_memory": False}
    cells = pd.read_csv(io.StringIO(text), **options, dtype=str, keep_default_na=False)
    has_commas = delimiter in (";", "\t") and _has_decimal_commas(cells)
    frame = pd.read_csv(io.StringIO(text), **options, decimal="," if has_commas else ".")
    if has_commas:  # those beside a word or with a margin of error
        frame = frame.map(lambda cell: cell.replace(",", ".") if isinstance(cell, str) and COMMA.match(cell) else cell)
    odd = pd.DataFrame(np.isin(cells.to_numpy(dtype=object), NANS), index=frame.index, columns=frame.columns)
    return frame, odd


def _comments(lines: list[str]) -> int:
    """How many lines lie before the header. A line that begins with # is one too, if it has as many cells as the first
    line that does not, and that one has numbers."""
    first = next((k for k, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    if first + 1 < len(lines) and _is_title(lines[first]) and not _is_title(lines[first + 1]):
        return first + 1
    if first and first < len(lines):
        above, row = lines[first - 1], lines[first]
        has_numbers = any(NUMBER.fullmatch(cell) for cell in re.split(f"[{DELIMITERS}]", row))
        if has_numbers and any(above.count(each) == row.count(each) > 0 for each in DELIMITERS):
            return first - 1
    return first if first < len(lines) else 0


def _is_title(line: str) -> bool:
    """Whether a line has no cells, or tells Excel what parts them."""
    return not any(each in line for each in DELIMITERS) or re.fullmatch(f"sep=[{DELIMITERS}]", line.strip()) is not None


def _is_aligned(lines: list[str]) -> bool:
    """Whether blanks part the cells: each line has the same number of words, and more than one."""
    counts = {len(line.split()) for line in lines if line.strip()}
    return len(counts) == 1 and counts != {1}


def _has_decimal_commas(cells: pd.DataFrame) -> bool:
    """Whether numbers are written as 3,9 and none as 3.9, beside which a comma parts thousands."""
    texts = [str(each).strip() for each in pd.unique(cells.to_numpy(dtype=object).ravel())]
    return any(COMMA.match(each) for each in texts) and not any(POINT.match(each) for each in texts)


def _is_lines(text: str) -> bool:
    """Whether JSON that begins with an object has further ones, one a line."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _json_lines(path: Path, text: str) -> list[dict[str, Any]]:
    lines = text.split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_constant)
        except ValueError:
            if number == len(lines):  # a writer's unfinished last line
                continue
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {line[:80]!r} is not a JSON object")
        found.append(row)
    return found


def _json(path: Path, text: str) -> pd.DataFrame:
    try:
        content = json.loads(text, parse_constant=_constant)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    content = _unwrapped(content)
    if isinstance(content, dict) and content and all(isinstance(each, list) for each in content.values()):
        if len({len(each) for each in content.values()}) != 1:
            raise ValueError(f"{path}: its columns differ in length")
        return pd.DataFrame(content)
    if isinstance(content, dict) and content and all(isinstance(each, dict) for each in content.values()):
        content = [{"run": name, **each} for name, each in content.items()]
    elif isinstance(content, dict):
        content = [content]
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        raise ValueError(f"{path}: neither a list of objects, one a run, nor an object of columns")
    return _flat(content)


def _unwrapped(content: Any) -> Any:
    """The table in an object that has little else: one list of objects beside what is said about them, as {"runs":
    [...]}, and pandas' forms "columns" and "split"."""
    if not isinstance(content, dict):
        return content
    if {"columns", "data"} <= set(content) <= {"columns", "data", "index"}:
        return [dict(zip(content["columns"], row, strict=False)) for row in content["data"]]
    parts = list(content.values())
    if parts and all(isinstance(each, dict) and [*each] == [str(k) for k in range(len(each))] for each in parts):
        return {name: [*each.values()] for name, each in content.items()} if parts[0] else content
    tables = [each for each in parts if isinstance(each, list) and each and all(isinstance(row, dict) for row in each)]
    if len(tables) == 1 and not any(isinstance(each, list) and each is not tables[0] for each in parts):
        numbers = [name for name, each in content.items() if isinstance(each, int | float)]
        is_run = any(map(candidate, numbers)) or (_has_size(numbers) and not _has_size(tables[0][0]))
        return content if is_run else tables[0]
    return content


def _has_size(names: Iterable[str]) -> bool:
    known = {alias for column in COLUMNS if column.name in SIZES for alias in (column.name, *column.aliases)}
    return not known.isdisjoint(map(normalised, names))


def _flat(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Nested objects become columns such as "config.lr", and losses in a list of results "results.pile.loss"."""
    return pd.json_normalize([{name: _losses(each) for name, each in row.items()} for row in rows])


def _losses(content: Any) -> Any:
    """Of a list of objects, as results on several sets, the losses by the text that tells the objects apart: counts
    and times beside them are not of the run. All else as it is."""
    if not (isinstance(content, list) and content and all(isinstance(each, dict) for each in content)):
        return content
    losses = [{name: value for name, value in each.items() if candidate(name)} for each in content]
    texts = ([_text(each.get(name)) for each in content] for name in content[0])
    names = next((found for found in texts if all(found) and len(set(found)) == len(found)), None)
    return content if names is None else dict(zip(names, losses, strict=True))


def _text(value: Any) -> str:
    """A text, or several as one; of all else none."""
    parts = value if isinstance(value, list) else [value]
    return ", ".join(parts) if all(isinstance(each, str) for each in parts) else ""
