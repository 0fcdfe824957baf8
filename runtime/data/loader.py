"""Batches of a rank, read ahead in the background."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from runtime.data.order import Sample
from runtime.data.tokens import TokenFile
from runtime.model.cross_entropy import IGNORE


class Batch(NamedTuple):
    """One micro-batch: `tokens`, `targets` and, where attention stays within documents, `document_ids`; each
    [sequences, seq_len] int64. Targets to be left out are IGNORE."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor | None

    def to(self, device: torch.device | str) -> "Batch":
        """On `device`; the copy from pinned memory does not wait."""
        return Batch(*(None if each is None else each.to(device, non_blocking=True) for each in self))


class Order(Protocol):
    """A `GlobalOrder` or `MixtureHistory`."""

    sources: list[TokenFile]
    seq_len: int

    def samples(self, first: int, count: int) -> list[Sample]: ...


class Loader:
    """Serves this rank's part of any batch of the global order.

    A batch is samples `first_sample` to `first_sample + sequences - 1`, whatever the world size; rank r of n takes
    the r-th of n equal runs of them. Up to `prefetch` batches that would follow with the same geometry are read
    ahead by one thread; asking for another batch instead is right too, only slower. What goes wrong there is raised
    by the next `batch`. ValueError for a source whose ids lie outside the vocabulary.
    """

    def __init__(
        self,
        order: Order,
        seq_len: int,
        data_rank: int = 0,
        data_size: int = 1,
        vocab_size: int = 2**31,
        document_mask: bool = False,
        prefetch: int = 2,
    ):
        assert order.seq_len == seq_len
        self.order, self.seq_len, self.vocab_size, self.document_mask = order, seq_len, vocab_size, document_mask
        self._rank, self._size, self._prefetch = data_rank, data_size, prefetch
        self._pin = torch.cuda.is_available()
        self._thread = ThreadPoolExecutor(1, "loader")
        self._pending: dict[tuple[int, int, int], Future[list[Batch]]] = {}
        for source in order.sources:
            source.check_vocabulary(vocab_size)

    def batch(self, first_sample: int, sequences: int, micro_sequences: int | None = None) -> list[Batch]:
        """This rank's micro-batches of `micro_sequences` (the last may be smaller; by default one holds its share).

        ValueError if `sequences` is not a multiple of the number of data ranks.
        """
        if sequences < 1 or sequences % self._size:
            raise ValueError(f"a batch of {sequences} sequences cannot be shared evenly by {self._size} data ranks")
        micro = micro_sequences or sequences // self._size
        ahead = [(first_sample + k * sequences, sequences, micro) for k in range(self._prefetch + 1)]
        for key in self._pending.keys() - set(ahead):
            self._pending.pop(key).cancel()
        for key in ahead:
            if key not in self._pending:
                self._pending[key] = self._thread.submit(self._read, *key)
        return self._pending.pop(ahead[0]).result()

    def close(self) -> None:
        """End the thread; batches not yet asked for are dropped."""
        self._thread.shutdown(cancel_futures=True)
        self._pending.clear()

    def _read(self, first_sample: int, sequences: int, micro: int) -> list[Batch]:
        share = sequences // self._size
        samples = self.order.samples(first_sample + self._rank * share, share)
        windows = np.empty((share, self.seq_len + 1), np.int64)
        documents = np.empty_like(windows) if self.document_mask else None
        for row, sample in enumerate(samples):
            source, start = self.order.sources[sample.source], sample.window * self.seq_len
            windows[row] = source.read(start, self.seq_len + 1)
            source.refuse_unknown(windows[row], self.vocab_size)
            if documents is not None:
                documents[row] = source.document_ids(start, self.seq_len + 1)
        return [
            pack(windows[k : k + micro], None if documents is None else documents[k : k + micro], self._pin)
            for k in range(0, share, micro)
        ]


def pack(windows: np.ndarray, documents: np.ndarray | None, pin: bool = False) -> Batch:
    """A batch of windows [n, seq_len + 1] and their tokens' documents: a token that opens a document is no target."""
    tokens, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
    parts = [tokens, targets]
    if documents is not None:
        targets[documents[:, 1:] != documents[:, :-1]] = IGNORE
        parts.append(documents[:, :-1].copy())
    tensors = [torch.from_numpy(part).pin_memory() if pin else torch.from_numpy(part) for part in parts]
    return Batch(*tensors, *[None] * (3 - len(tensors)))
