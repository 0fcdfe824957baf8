"""Which source the n-th sample comes from: exact shares in closed form."""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple


class _Split(NamedTuple):
    """Of the first m samples that arrive here, round(m * share / whole) go left and the others right."""

    left: "_Split | int"
    right: "_Split | int"
    share: int
    whole: int

    def left_count(self, samples: int) -> int:
        return (2 * samples * self.share + self.whole) // (2 * self.whole)


class Quotas:
    """Deals samples to sources in the proportion of `weights`, in integer arithmetic.

    The sources are the leaves of a Huffman tree and each inner node deals evenly between its two sides, so a count
    never falls, nothing drifts, and any place in the order is found by one descent. Where a side holds an inner
    node it has at most 2/3 of its parent's weight, so the error e of a node obeys e <= 1/2 + 2/3 e(parent) and the
    number of samples of any source is always within 2 of its share.
    """

    def __init__(self, weights: Sequence[Fraction]):
        scale = math.lcm(*(weight.denominator for weight in weights))
        heap: list[tuple[int, int, _Split | int]] = [(int(w * scale), i, i) for i, w in enumerate(weights)]
        heapq.heapify(heap)
        for rank in range(len(weights), 2 * len(weights) - 1):
            light, heavy = heapq.heappop(heap), heapq.heappop(heap)
            whole = light[0] + heavy[0]
            heapq.heappush(heap, (whole, rank, _Split(heavy[2], light[2], heavy[0], whole)))
        self._root = heap[0][2]

    def draw(self, n: int) -> tuple[int, int]:
        """(source, k): sample `n` is the k-th sample of that source, both counted from 0."""
        node = self._root
        while isinstance(node, _Split):
            before = node.left_count(n)
            goes_left = node.left_count(n + 1) > before
            node, n = (node.left, before) if goes_left else (node.right, n - before)
        return node, n

    def counts(self, n: int) -> dict[int, int]:
        """How many of the first `n` samples each source gives."""
        counts, pending = {}, [(self._root, n)]
        while pending:
            node, samples = pending.pop()
            if isinstance(node, _Split):
                left = node.left_count(samples)
                pending += [(node.left, left), (node.right, samples - left)]
            else:
                counts[node] = samples
        return counts


def exact_weight(weight: float | int | str | Fraction) -> Fraction:
    """The weight as it is written: 0.3 is 3/10. ValueError unless it is positive and finite."""
    try:
        exact = weight if isinstance(weight, Fraction) else Fraction(str(weight))
    except (ValueError, ZeroDivisionError):
        exact = Fraction(0)
    if exact <= 0:
        raise ValueError(f"{weight!r} is not the weight of a source; it is a positive number")
    return exact
