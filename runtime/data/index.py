"""The `.idx` half of a Megatron dataset: a fixed header, then three arrays.

Layout (megatron-core `datasets/indexed_dataset.py`), little-endian: 9 bytes magic, uint64 version, uint8 type
code, uint64 sequences, uint64 documents + 1; int32 lengths and int64 byte offsets of the sequences, int64 index of
the sequence that opens each document (and one past the last), and, in multimodal datasets, int8 modes.
"""

import os
import struct
from bisect import bisect_right
from typing import NamedTuple

import numpy as np

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_INTEGERS = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CHUNK = 1 << 20


class Index(NamedTuple):
    """A checked index. `lengths`, `pointers` [sequences] and `documents` [documents + 1] are mapped, not loaded."""

    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray
    num_tokens: int

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    def document_at(self, position: int) -> int:
        """The document that holds the token at `position`. Looks at a few entries only, however long the index."""
        sequence = bisect_right(self.pointers, position * self.dtype.itemsize) - 1
        return bisect_right(self.documents, sequence) - 1

    def document_starts(self, first: int, last: int) -> np.ndarray:
        """Positions of the first tokens of the documents `first` to `last`, both included: [last - first + 1]."""
        return self.pointers[self.documents[first : last + 1]] // self.dtype.itemsize


def read_index(path: str) -> Index:
    """Map the index at `path` and check all of it. ValueError naming the file where anything contradicts."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            header = stream.read(_HEADER.size)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not header.startswith(_MAGIC):
        raise ValueError(f"{path}: not a Megatron index (it begins with {header[:9]!r}, not {_MAGIC!r})")
    if len(header) < _HEADER.size:
        raise ValueError(f"{path}: truncated, {size} bytes do not hold the header")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1:
        raise ValueError(f"{path}: version {version} of the Megatron index; only 1 is known")
    if code not in _INTEGERS:
        raise ValueError(f"{path}: type code {code}; token ids have one of the integer codes {sorted(_INTEGERS)}")
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (expected, expected + sequences):  # the latter with one mode a sequence
        raise ValueError(f"{path}: {size:,} bytes, but its header needs {expected:,}: truncated or damaged")
    if sequences == 0:
        raise ValueError(f"{path}: holds no tokens")
    raw = np.memmap(path, mode="r")
    lengths, pointers, documents = (
        np.frombuffer(raw, kind, count, offset)
        for kind, count, offset in (
            ("<i4", sequences, _HEADER.size),
            ("<i8", sequences, _HEADER.size + 4 * sequences),
            ("<i8", boundaries, _HEADER.size + 12 * sequences),
        )
    )
    dtype = np.dtype(_INTEGERS[code])
    _check_documents(path, documents, sequences)
    return Index(dtype, lengths, pointers, documents, _count_tokens(path, lengths, pointers, dtype.itemsize))


def write_index(path: str, dtype: np.dtype, lengths: np.ndarray) -> None:
    """The index of documents of `lengths` tokens each, one sequence a document."""
    code = next(code for code, name in _INTEGERS.items() if np.dtype(name) == dtype)
    starts = (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize
    with open(path, "wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        for array in (lengths.astype("<i4"), starts.astype("<i8"), np.arange(len(lengths) + 1, dtype="<i8")):
            stream.write(array.tobytes())


def _count_tokens(path: str, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> int:
    total = 0
    for first in range(0, len(lengths), _CHUNK):
        chunk = lengths[first : first + _CHUNK].astype(np.int64)
        if chunk.min() < 0:
            raise ValueError(f"{path}: sequence {first + int(chunk.argmin())} has the negative length {chunk.min()}")
        starts = total + np.cumsum(chunk) - chunk
        wrong = pointers[first : first + _CHUNK] != starts * itemsize
        if wrong.any():
            raise ValueError(f"{path}: sequence {first + int(wrong.argmax())} does not begin where the one before ends")
        total += int(chunk.sum())
    if total == 0:
        raise ValueError(f"{path}: holds no tokens")
    return total


def _check_documents(path: str, documents: np.ndarray, sequences: int) -> None:
    if len(documents) < 2 or documents[0] != 0 or documents[-1] != sequences:
        raise ValueError(f"{path}: its documents do not cover its {sequences:,} sequences")
    for first in range(0, len(documents), _CHUNK):
        if (np.diff(documents[first : first + _CHUNK + 1]) < 0).any():
            raise ValueError(f"{path}: its documents are out of order")
