"""A held-out set, evaluated whole and exactly by any number of ranks."""

from collections.abc import Iterator

import numpy as np
import torch

from runtime.data.loader import Batch, pack
from runtime.data.tokens import TokenFile
from runtime.model.cross_entropy import IGNORE


class EvaluationSet:
    """Every window of a token file in its own order, the last one padded with IGNORE targets.

    With `max_sequences`, that many windows evenly spaced over the file. ValueError for a file of fewer than two
    tokens, or with ids outside the vocabulary.
    """

    def __init__(
        self,
        path: str,
        seq_len: int,
        vocab_size: int,
        *,
        max_sequences: int | None = None,
        document_mask: bool = False,
    ):
        self.file = TokenFile(path)
        if self.file.num_tokens < 2:
            raise ValueError(f"{path}.bin: one token has no target to evaluate")
        self.file.check_vocabulary(vocab_size)
        self.seq_len, self.vocab_size, self.document_mask = seq_len, vocab_size, document_mask
        every = -(-(self.file.num_tokens - 1) // seq_len)
        self._windows = range(every)
        self._pin = torch.cuda.is_available()
        if max_sequences is not None and max_sequences < every:
            self._windows = [k * every // max_sequences for k in range(max_sequences)]

    @property
    def num_sequences(self) -> int:
        return len(self._windows)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text for each token, None where the file's metadata does not tell."""
        text = self.file.metadata.get("bytes")
        return text / self.file.num_tokens if isinstance(text, int) and text > 0 else None

    def batches(self, rank: int, size: int, micro_sequences: int) -> Iterator[Batch]:
        """Rank `rank` of `size` ranks' share, in batches of one shape. Every rank yields the same number of them,
        because a forward pass is collective: rows past the end of a share have IGNORE targets only."""
        share = -(-len(self._windows) // size)
        micro = min(micro_sequences, share)
        mine = self._windows[rank * share : (rank + 1) * share]
        for first in range(0, share, micro):
            yield self._pack(mine[first : first + micro], micro)

    def _pack(self, windows: range | list[int], rows: int) -> Batch:
        tokens = np.zeros((rows, self.seq_len + 1), np.int64)
        documents = np.full_like(tokens, -1)
        valid = np.zeros((rows, self.seq_len), bool)
        for row, window in enumerate(windows):
            start = window * self.seq_len
            length = min(self.seq_len + 1, self.file.num_tokens - start)
            tokens[row, :length] = self.file.read(start, length)
            self.file.refuse_unknown(tokens[row, :length], self.vocab_size)
            valid[row, : length - 1] = True
            if self.document_mask:
                documents[row, :length] = self.file.document_ids(start, length)
        batch = pack(tokens, documents if self.document_mask else None, self._pin)
        batch.targets.numpy()[~valid] = IGNORE
        return batch
