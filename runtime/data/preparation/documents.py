"""Documents in files: text, JSON lines and Parquet, found in folders and cut into pieces of work."""

import fnmatch
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

TEXT, JSONL, PARQUET = "text", "jsonl", "parquet"
FORMATS = ("auto", TEXT, JSONL, PARQUET, "folder")
_SUFFIXES = {".jsonl": JSONL, ".ndjson": JSONL, ".jsonl.gz": JSONL, ".parquet": PARQUET}

PIECE_BYTES = (4 << 20, 64 << 20)
"""A larger file is read in pieces, by several processes: 64 of them, of at least and at most this size."""
FILE_DOCUMENT_BYTES = 1 << 20
"""A text file found in a folder is one document, unless larger than this: then it is cut at line ends."""
GIVEN_DOCUMENT_BYTES = 64 << 10
"""A text file given by name is cut at line ends into documents of about this size, so that some can be held out."""


@dataclass(frozen=True)
class Selection:
    """What to read: inputs as typed, and which files and fields of them."""

    inputs: tuple[str, ...]
    format: str = "auto"
    glob: str = "**/*"
    exclude: tuple[str, ...] = ()
    key: str = "text"
    column: str = "text"


@dataclass(frozen=True)
class Piece:
    """A part of a file: bytes `start` to `stop` (lines that begin there), or those row groups of a Parquet file."""

    path: str
    format: str
    start: int
    stop: int
    size: int
    """Bytes, for progress and for even shares."""
    field: str = ""
    document_bytes: int = FILE_DOCUMENT_BYTES


def find(selection: Selection, outside: Path | None = None) -> list[Piece]:
    """The pieces of all selected files, in the order of the inputs and of the paths below each.

    A file reached twice is read once, and files below the folder `outside` not at all. ValueError for an input that
    is missing, empty, or not of the format asked for.
    """
    if selection.format not in FORMATS:
        raise ValueError(f"--format {selection.format} is unknown; known: {', '.join(FORMATS)}")
    found: dict[Path, list[Piece]] = {}
    for name in selection.inputs:
        root = Path(name)
        if not root.exists():
            raise ValueError(f"{name}: no such file or folder")
        if selection.format == "folder" and not root.is_dir():
            raise ValueError(f"{name}: not a folder")
        document_bytes = FILE_DOCUMENT_BYTES if root.is_dir() else GIVEN_DOCUMENT_BYTES
        for file in _below(root, selection) if root.is_dir() else [root]:
            real = file.resolve()
            if real not in found and outside not in real.parents:
                found[real] = _pieces(file, selection, document_bytes)
    pieces = [piece for each in found.values() for piece in each]
    if not pieces:
        raise ValueError(f"{', '.join(selection.inputs)}: empty")
    return pieces


def read(piece: Piece, tally: Counter[str]) -> Iterator[str]:
    """The documents of a piece. `tally` counts the "empty" and "binary" (with NUL bytes) ones left out, and the
    "repaired" ones, in which bytes that are not UTF-8 became U+FFFD. ValueError naming file and place of bad input."""
    readers = {TEXT: _read_text, JSONL: _read_jsonl, PARQUET: _read_parquet}
    try:
        for raw in readers[piece.format](piece):
            text = _decode(raw, tally)
            if text:
                yield text
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{piece.path}: cannot be read ({error})") from None


def _below(root: Path, selection: Selection) -> list[Path]:
    try:
        found = [path for path in root.glob(selection.glob) if path.is_file()]
    except (ValueError, NotImplementedError, IndexError) as error:
        raise ValueError(f"--glob {selection.glob!r}: {error}") from None
    names = {path.relative_to(root).as_posix(): path for path in found}
    kept = [name for name in sorted(names) if not any(_matches(name, each) for each in selection.exclude)]
    if not kept:
        raise ValueError(f"{root}: no file matches {selection.glob!r} and no --exclude")
    return [names[name] for name in kept]


def _matches(name: str, pattern: str) -> bool:
    """Shell-style; a leading ``**/`` matches at the top too."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(f"/{name}", pattern)


def _pieces(path: Path, selection: Selection, document_bytes: int) -> list[Piece]:
    kind = selection.format
    if kind == "auto":
        kind = next((each for suffix, each in _SUFFIXES.items() if path.name.lower().endswith(suffix)), TEXT)
    kind = TEXT if kind == "folder" else kind
    size, absolute = path.stat().st_size, str(path.absolute())
    if kind == PARQUET:
        return _row_groups(absolute, size, selection.column)
    field = selection.key if kind == JSONL else ""
    step = max(size, 1) if path.suffix == ".gz" else min(max(size // 64, PIECE_BYTES[0]), PIECE_BYTES[1])
    spans = [(start, min(start + step, size)) for start in range(0, size, step)]
    return [Piece(absolute, kind, start, stop, stop - start, field, document_bytes) for start, stop in spans]


def _row_groups(path: str, size: int, column: str) -> list[Piece]:
    schema, count = _open_parquet(path)
    if column not in schema.names:
        raise ValueError(f"{path}: no column {column!r}; it has {', '.join(schema.names)}")
    if "string" not in str(schema.field(column).type):
        raise ValueError(f"{path}: column {column!r} holds {schema.field(column).type}, not text")
    return [Piece(path, PARQUET, group, group + 1, size // count, column) for group in range(count)]


def _open_parquet(path: str) -> tuple[Any, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow, file.num_row_groups
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None


def _decode(raw: bytes | str, tally: Counter[str]) -> str | None:
    """Text that can be written as UTF-8, or None for what is left out."""
    content = raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass")
    if not content:
        tally["empty"] += 1
    elif isinstance(raw, bytes) and b"\0" in content:
        tally["binary"] += 1
    else:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            tally["repaired"] += 1
            return content.decode("utf-8", "replace")
    return None


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(position, line) of the lines that begin inside the piece."""
    compressed = piece.path.endswith(".gz")
    stream: IO[bytes] = gzip.open(piece.path) if compressed else open(piece.path, "rb")  # noqa: SIM115
    with stream:
        position = 0
        if piece.start > 0:  # the line that runs into this piece belongs to the one before
            position = stream.seek(piece.start - 1)
            position += len(stream.readline())
        while (compressed or position < piece.stop) and (line := stream.readline()):
            yield position, line
            position += len(line)


def _read_text(piece: Piece) -> Iterator[bytes]:
    held: list[bytes] = []
    size = 0
    for _, line in _lines(piece):
        held.append(line)
        size += len(line)
        if size >= piece.document_bytes:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def _read_jsonl(piece: Piece) -> Iterator[str]:
    for position, line in _lines(piece):
        if not line.strip():
            continue
        place = f"{piece.path}: the record at byte {position:,}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{place} is not JSON: {line[:60]!r}") from None
        if not isinstance(record, dict) or piece.field not in record:
            keys = ", ".join(map(str, record)) if isinstance(record, dict) else "none"
            raise ValueError(f"{place} has no key {piece.field!r}; its keys: {keys}")
        if not isinstance(record[piece.field], str):
            raise ValueError(f"{place} holds {record[piece.field]!r} under {piece.field!r}, not text")
        yield record[piece.field]


def _read_parquet(piece: Piece) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(piece.path) as file:
            groups = range(piece.start, piece.stop)
            for batch in file.iter_batches(row_groups=groups, columns=[piece.field], batch_size=1024):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{piece.path}: damaged Parquet ({str(error).splitlines()[0]})") from None


def read_some(pieces: Sequence[Piece], budget: int, parts: int = 64) -> Iterator[str]:
    """Documents worth about `budget` bytes, from the beginnings of many pieces taken in the order given."""
    allowance = max(budget // min(parts, len(pieces)), 1)
    for piece in pieces:
        taken = 0
        for text in read(piece, Counter()):
            yield text
            taken += len(text)
            if taken >= allowance or taken >= budget:
                break
        budget -= taken
        if budget <= 0:
            return
