"""The global order of samples: a pure function of seed, weights and the content of the sources."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np

from runtime.data.permutation import Permutation
from runtime.data.quotas import Quotas, exact_weight


class Source(Protocol):
    """What the order must know of a corpus; a `TokenFile` is one."""

    path: str
    fingerprint: str

    def windows(self, seq_len: int) -> int: ...


class Sample(NamedTuple):
    """Where a sample lies: window `w` of a source is its tokens [w * seq_len, (w + 1) * seq_len], ends included."""

    source: int
    window: int
    epoch: int


class GlobalOrder:
    """Sample i of an endless order over weighted sources, computed and not stored.

    `sources` are (source, weight) pairs; what matters is their content and the proportion of the weights, not
    their paths or the order in which they are listed. The k-th sample drawn from a source of W windows is window
    permutation(k mod W) in its epoch k // W, with a fresh permutation for each epoch, so a source is repeated whole
    as often as the samples need it. `cursors` says how many samples of a source (by fingerprint) were drawn before.

    ValueError for no source, a weight that is not positive, a source shorter than one window, or one given twice.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, float | str | Fraction]],
        seed: int,
        seq_len: int,
        cursors: Mapping[str, int] | None = None,
    ):
        if not sources:
            raise ValueError("a mixture needs at least one source")
        self.sources = [source for source, _ in sources]
        self.weights = [exact_weight(weight) for _, weight in sources]
        self.seed, self.seq_len = seed, seq_len
        self._windows = [_windows(source, seq_len) for source in self.sources]
        prints = [source.fingerprint for source in self.sources]
        for k, each in enumerate(prints):
            if each in prints[:k]:
                first = self.sources[prints.index(each)].path
                raise ValueError(
                    f"{self.sources[k].path}: holds the same data as {first}; give it once, with one weight"
                )
        self._canonical = sorted(range(len(prints)), key=prints.__getitem__)
        self._quotas = Quotas([self.weights[k] for k in self._canonical])
        self._before = [(cursors or {}).get(each, 0) for each in prints]

    def samples(self, first: int, count: int) -> list[Sample]:
        """Samples `first` to `first + count - 1` of the order."""
        places: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        for i in range(count):
            leaf, k = self._quotas.draw(first + i)
            source = self._canonical[leaf]
            epoch, k = divmod(self._before[source] + k, self._windows[source])
            slots, draws = places.setdefault((source, epoch), ([], []))
            slots.append(i)
            draws.append(k)
        found: dict[int, Sample] = {}
        for (source, epoch), (slots, draws) in places.items():
            windows = self._permutation(source, epoch)(np.array(draws)).tolist()
            found.update((i, Sample(source, window, epoch)) for i, window in zip(slots, windows, strict=True))
        return [found[i] for i in range(count)]

    def sample(self, i: int) -> Sample:
        return self.samples(i, 1)[0]

    def cursors(self, i: int) -> dict[str, int]:
        """Samples drawn from each source, by fingerprint, before sample `i`: over all epochs and `cursors` given."""
        drawn = {self._canonical[leaf]: count for leaf, count in self._quotas.counts(i).items()}
        return {source.fingerprint: self._before[k] + drawn[k] for k, source in enumerate(self.sources)}

    @property
    def fingerprint(self) -> str:
        """Identifies the whole order: seed, sequence length, contents and proportions."""
        total = sum(self.weights)
        parts = [f"seed {self.seed}", f"seq_len {self.seq_len}"]
        parts += [f"{self.sources[k].fingerprint} {self.weights[k] / total}" for k in self._canonical]
        parts += [f"drawn {self._before[k]}" for k in self._canonical]
        return blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def _permutation(self, source: int, epoch: int) -> Permutation:
        key = f"{self.seed}/{self.sources[source].fingerprint}/{epoch}".encode()
        return Permutation(self._windows[source], key)


def _windows(source: Source, seq_len: int) -> int:
    windows = source.windows(seq_len)
    if windows < 1:
        raise ValueError(f"{source.path}.bin: shorter than one sequence of {seq_len:,} tokens and the target after it")
    return windows
