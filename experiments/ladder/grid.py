"""A sweep over learning rate and batch at once: numbers in, numbers out."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

STEPS = 4
"""Doublings or halvings of the rate that a sweep goes from where it starts before it gives up."""

Point = tuple[float, int]
"""Learning rate, and batch in sequences."""


@dataclass(frozen=True)
class Search:
    """Where a sweep stands."""

    wanted: tuple[Point, ...]
    """All points that it asks for so far."""
    best: Point | None
    """That with the lowest loss, once no more points are wanted."""
    interior: bool
    """Whether worse points were measured on all four sides of the best."""


def around(centre: Point) -> list[Point]:
    """A point and its eight neighbours at factors of two, which a bowl over both settings needs at the least."""
    lr, batch = centre
    return [(lr * 2**i, math.floor(batch * 2**j)) for i, j in product((-1, 0, 1), repeat=2)]


def search(start: Iterable[Point], largest: int, loss: Callable[[Point], float | None]) -> Search:
    """Points on a grid of factors of two, begun at `start` and extended until all neighbours of the best are measured.

    Batches are 1 to `largest`. loss: of a point, None while it is not measured; infinite where training diverged, NaN
    where no loss could be had: such a point is never the best, and the best is not interior beside it.
    """
    wanted = dict.fromkeys(point for point in start if 1 <= point[1] <= largest)
    rates = [lr for lr, _ in wanted]
    lowest, highest = min(rates) / 2**STEPS, max(rates) * 2**STEPS
    while None not in (losses := {point: loss(point) for point in wanted}).values():
        known = {point: each for point, each in losses.items() if math.isfinite(each)}
        if not known:
            return Search(tuple(wanted), None, False)
        best = min(known, key=known.__getitem__)
        near = [each for each in around(best) if lowest <= each[0] <= highest and 1 <= each[1] <= largest]
        if wanted.keys() >= set(near):
            lr, batch = best
            sides = ((lr / 2, batch), (lr * 2, batch), (lr, batch / 2), (lr, batch * 2))
            return Search(tuple(wanted), best, all(not math.isnan(losses.get(side, math.nan)) for side in sides))
        wanted |= dict.fromkeys(near)
    return Search(tuple(wanted), None, False)
