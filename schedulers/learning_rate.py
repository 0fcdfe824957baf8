"""The base learning rate as a function of tokens.

A schedule is called with n, the tokens seen before a step, and B, the tokens of that step. The warm-up is
evaluated at n + B, the end of the step, and the decay at n, its beginning: so the first step does not have rate
zero, and neither has the last. Nothing is counted or replayed: a rate follows from (n, B) alone, and two schedules
that divide the same tokens into other batches agree wherever their batches end (warm-up) or begin (decay) together.

With peak η0, final share r, warm-up W, horizon D and tail K, all in tokens:

    warm-up      η0 min(1, (n + B) / W)
    decay        η0 (r + (1 - r) f(p)),  f from 1 to 0 over progress p in [0, 1]
    cosine       p = (n - W) / (D - W)
    WSD          p = (n - (D - K)) / K   (MiniCPM, arXiv 2404.06395; tails: Hägele et al., arXiv 2405.18392)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Landmark = tuple[int, str, float]
"""Tokens, what happens there, and the learning rate there."""


class Schedule(Protocol):
    """A base learning rate; groups of parameters scale it."""

    def __call__(self, tokens: int, batch_tokens: int) -> float:
        """The rate of a step of `batch_tokens` that begins after `tokens`."""
        ...

    def landmarks(self) -> list[Landmark]:
        """Where the schedule changes its course, in order of tokens."""
        ...


TAILS: dict[str, Callable[[float], float]] = {
    "linear": lambda p: 1 - p,
    "1-sqrt": lambda p: 1 - math.sqrt(p),
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
}
"""Shapes f(p) that fall from 1 to 0; the exponential tail, final ** p, never reaches 0."""

TAIL_NAMES = (*TAILS, "exponential")


@dataclass(frozen=True)
class Constant:
    """Warm-up, then the peak."""

    peak: float
    warmup: int
    horizon: int

    def __post_init__(self) -> None:
        _check(self.warmup, self.horizon, decay=0)

    def __call__(self, tokens: int, batch_tokens: int) -> float:
        return self.peak * _warmup(tokens + batch_tokens, self.warmup)

    def landmarks(self) -> list[Landmark]:
        return _landmarks(self, (self.warmup, "end of warm-up"), (self.horizon, "end"))


@dataclass(frozen=True)
class Cosine:
    """Warm-up, then half a cosine from the peak down to `final` times the peak at the horizon."""

    peak: float
    warmup: int
    horizon: int
    final: float = 0.0

    def __post_init__(self) -> None:
        _check(self.warmup, self.horizon, decay=0, final=self.final)

    def __call__(self, tokens: int, batch_tokens: int) -> float:
        progress = _progress(tokens, self.warmup, self.horizon)
        factor = self.final + (1 - self.final) * TAILS["cosine"](progress)
        return self.peak * _warmup(tokens + batch_tokens, self.warmup) * factor

    def landmarks(self) -> list[Landmark]:
        middle = (self.warmup + self.horizon) // 2
        return _landmarks(self, (self.warmup, "end of warm-up"), (middle, "middle of decay"), (self.horizon, "end"))


@dataclass(frozen=True)
class WSD:
    """Warm-up, the peak, and a tail of `decay` tokens down to `final` times the peak at the horizon."""

    peak: float
    warmup: int
    horizon: int
    decay: int
    tail: str = "1-sqrt"
    final: float = 0.0

    def __post_init__(self) -> None:
        _check(self.warmup, self.horizon, self.decay, self.final)
        if self.tail not in TAIL_NAMES:
            raise ValueError(f"tail {self.tail!r} is not known; accepted: {', '.join(TAIL_NAMES)}")
        if self.tail == "exponential" and self.final == 0:
            raise ValueError("an exponential tail never reaches zero; give final above 0")

    def __call__(self, tokens: int, batch_tokens: int) -> float:
        progress = _progress(tokens, self.horizon - self.decay, self.horizon)
        return self.peak * _warmup(tokens + batch_tokens, self.warmup) * self._factor(progress)

    def _factor(self, progress: float) -> float:
        if self.tail == "exponential":
            return self.final**progress
        return self.final + (1 - self.final) * TAILS[self.tail](progress)

    def landmarks(self) -> list[Landmark]:
        begin = self.horizon - self.decay
        tail = ((begin, "start of decay"), (begin + self.decay // 2, "middle of decay")) if self.decay else ()
        return _landmarks(self, (self.warmup, "end of warm-up"), *tail, (self.horizon, "end"))


def build(
    kind: str, *, peak: float, warmup: int, horizon: int, decay: int, tail: str = "1-sqrt", final: float = 0.0
) -> Schedule:
    """The schedule of a kind: "constant", "cosine" or "wsd". `decay` and `tail` belong to WSD alone; a constant one
    has no `final`. ValueError for an unknown kind and for spans that do not fit into the horizon."""
    if kind == "constant":
        return Constant(peak, warmup, horizon)
    if kind == "cosine":
        return Cosine(peak, warmup, horizon, final)
    if kind == "wsd":
        return WSD(peak, warmup, horizon, decay, tail, final)
    raise ValueError(f"schedule kind {kind!r} is not known; accepted: constant, cosine, wsd")


def _check(warmup: int, horizon: int, decay: int, final: float = 0.0) -> None:
    if min(warmup, decay) < 0 or warmup + decay > horizon:
        raise ValueError(f"a warm-up of {warmup:,} and a decay of {decay:,} tokens do not fit into {horizon:,}")
    if not 0 <= final <= 1:
        raise ValueError(f"final = {final} is not a share of the peak, between 0 and 1")


def _warmup(tokens: int, length: int) -> float:
    return min(1.0, tokens / length) if length else 1.0


def _progress(tokens: int, begin: int, end: int) -> float:
    """Share of [begin, end] that lies behind, in [0, 1]; a decay of no length never begins."""
    return min(1.0, max(0.0, (tokens - begin) / (end - begin))) if end > begin else 0.0


def _landmarks(schedule: Schedule, *points: tuple[int, str]) -> list[Landmark]:
    """The start and those points that lie past it, with the rate of a step that begins and ends there."""
    found = [(0, "start"), *((tokens, label) for tokens, label in points if tokens > 0)]
    return [(tokens, label, schedule(tokens, 0)) for tokens, label in found]
