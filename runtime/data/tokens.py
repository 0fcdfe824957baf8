"""A tokenized corpus: a Megatron `.bin`/`.idx` pair.

megatron-core writes these pairs (`IndexedDatasetBuilder`); here they are read without it, since importing it costs
every rank seconds at start and the index has to be checked in full anyway.
"""

import json
import os
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np

from runtime.data.index import read_index

_WHOLE = 64 << 20
"""Up to this many bytes a `.bin` is hashed and checked whole; above it, by `_BLOCKS` evenly spaced blocks."""
_BLOCKS = 256
_BLOCK = 64 << 10


class TokenFile:
    """The tokens of all documents of a corpus, end to end, and where each document begins.

    `path` is the pair's path without its suffix. `fingerprint` identifies the content wherever it lies: a hash of
    the whole index and of the token file, whole up to 64 MiB and else by 256 evenly spaced blocks of 64 KiB and its
    size. `metadata` is what `prepare` wrote to `<path>.json`, empty for a dataset without it.

    ValueError naming the file if the pair is missing, damaged, or not the one its metadata was written for.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._index = read_index(self.path + ".idx")
        self.num_tokens = self._index.num_tokens
        self.num_documents = self._index.num_documents
        try:
            self._file = open(self.path + ".bin", "rb", buffering=0)  # noqa: SIM115 (open as long as this object)
        except OSError as error:
            raise ValueError(f"{self.path}.bin: cannot be read ({error.strerror})") from None
        size, expected = os.fstat(self._file.fileno()).st_size, self.num_tokens * self._index.dtype.itemsize
        if size != expected:
            problem = "truncated" if size < expected else "longer than its index says"
            raise ValueError(f"{self.path}.bin: {problem} ({size:,} bytes, the index needs {expected:,})")
        self.metadata = _read_metadata(self.path + ".json")
        self.fingerprint = self._fingerprint()
        recorded = self.metadata.get("fingerprint", self.fingerprint)
        if recorded != self.fingerprint:
            raise ValueError(
                f"{self.path}.bin, .idx: changed since {self.path}.json was written "
                f"(fingerprint {self.fingerprint}, recorded {recorded})"
            )

    def windows(self, seq_len: int) -> int:
        """How many windows of `seq_len` tokens and one more target the file holds; neighbours share that one token."""
        return (self.num_tokens - 1) // seq_len

    def read(self, start: int, length: int) -> np.ndarray:
        """Token ids [length] int64 from position `start`, straight across documents."""
        assert 0 <= start <= start + length <= self.num_tokens
        itemsize = self._index.dtype.itemsize
        return np.frombuffer(self._bytes(start * itemsize, length * itemsize), self._index.dtype).astype(np.int64)

    def document_ids(self, start: int, length: int) -> np.ndarray:
        """The document of each token, [length] int64, from position `start`."""
        first, last = self._index.document_at(start), self._index.document_at(start + length - 1)
        starts = self._index.document_starts(first + 1, last)
        return first + np.searchsorted(starts, np.arange(start, start + length), side="right")

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError if an id lies outside the vocabulary: of the whole file, or of the blocks of its fingerprint."""
        declared = self.metadata.get("vocab_size")
        if isinstance(declared, int) and declared > vocab_size:
            raise ValueError(
                f"{self.path}.json: tokenized with a vocabulary of {declared:,}, more than the model's vocab_size of "
                f"{vocab_size:,}"
            )
        for block in self._blocks():
            self.refuse_unknown(np.frombuffer(block, self._index.dtype), vocab_size)

    def refuse_unknown(self, tokens: np.ndarray, vocab_size: int) -> None:
        """ValueError naming this file if one of `tokens`, read from it, is no id of the vocabulary."""
        for worst in (int(tokens.max()), int(tokens.min())):
            if not 0 <= worst < vocab_size:
                raise ValueError(
                    f"{self.path}.bin: token id {worst:,} is not in the vocabulary (0 to {vocab_size - 1:,})"
                )

    def _blocks(self) -> Iterator[bytes]:
        """The evenly spaced blocks that stand for the token file; all of it if it is small."""
        size = os.fstat(self._file.fileno()).st_size
        if size <= _WHOLE:
            offsets = range(0, size, _BLOCK)
        else:
            offsets = (-(-(size - _BLOCK) * k // (_BLOCKS - 1) // 8) * 8 for k in range(_BLOCKS))
        for offset in offsets:
            yield self._bytes(offset, min(_BLOCK, size - offset))

    def _bytes(self, offset: int, count: int) -> bytes:
        """Read without a mapping, so that a file cut short under us is an error and not a bus fault."""
        try:
            data = os.pread(self._file.fileno(), count, offset)
        except OSError as error:
            raise ValueError(f"{self.path}.bin: cannot be read at byte {offset:,} ({error.strerror})") from None
        if len(data) != count:
            raise ValueError(f"{self.path}.bin: cut short while in use (byte {offset + len(data):,} is missing)")
        return data

    def _fingerprint(self) -> str:
        digest = blake2b(digest_size=16)
        with open(self.path + ".idx", "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        digest.update(os.fstat(self._file.fileno()).st_size.to_bytes(8, "little"))
        for block in self._blocks():
            digest.update(block)
        return digest.hexdigest()


def _read_metadata(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as stream:
            metadata = json.load(stream)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not the metadata that prepare writes ({error})") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: not the metadata that prepare writes (a table is expected)")
    return metadata
