"""What a growth may change in a schedule, as schedules around a schedule.

They nest in any order, and like every schedule they are functions of (n, B) alone: a step of B tokens after n. What is
warmed up is evaluated at a step's end and what decays at its beginning. Growths lie between steps; where a remap makes
one lie inside a step, the re-warm has begun for it, and the remap has not.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from schedulers.learning_rate import Landmark, Schedule


def ramp(tokens: int | Fraction, length: int, start: float, peak: float) -> float:
    """The factor of a re-warm that began `tokens` ago: linear from `start` to `peak` over `length` tokens, then `peak`.

    New entries of a grown matrix are warmed up to a peak above the common rate, and keep to it (SPARKLING: 1.3).
    """
    return float(start + (peak - start) * (tokens / length)) if tokens < length else peak


@dataclass(frozen=True)
class Rewarmed:
    """A schedule times a factor that goes from `start` to `peak` over the `tokens` tokens after `at`, and stays there.

    Like a warm-up it is evaluated at the end of a step. Before `at` the factor is 1.
    """

    schedule: Schedule
    at: int
    tokens: int
    start: float
    peak: float

    def __post_init__(self) -> None:
        _check(self.at >= 0, "re-warm", "at", self.at, "tokens, 0 and more")
        _check(self.tokens >= 0, "re-warm", "tokens", self.tokens, "0 and more")
        _check(0 <= self.start < math.inf, "re-warm", "start", self.start, "finite factors, 0 and more")
        _check(0 < self.peak < math.inf, "re-warm", "peak", self.peak, "finite factors above 0")

    def __call__(self, tokens: int, batch_tokens: int) -> float:
        rate = self.schedule(tokens, batch_tokens)
        if tokens < self.at and tokens + batch_tokens <= self.at:
            return rate
        return rate * ramp(tokens + batch_tokens - self.at, self.tokens, self.start, self.peak)

    def landmarks(self) -> list[Landmark]:
        inner = [(tokens, label) for tokens, label, _ in self.schedule.landmarks()]
        own = [(self.at, "start of re-warm"), (self.at + self.tokens, "end of re-warm")]
        return _landmarks(self, inner, own)


@dataclass(frozen=True)
class Remapped:
    """A schedule that from `at` on goes on as from `to`, faster or slower, so that it still ends at `horizon`.

    A step at n >= at is read at to + (n - at) (horizon - to) / (horizon - at), and its length in the same proportion.
    So a grown model takes the rate of the place where a model of its size, trained from the beginning, would have its
    loss (staged training: Shen et al., arXiv 2203.06211).
    """

    schedule: Schedule
    at: int
    to: int
    horizon: int

    def __post_init__(self) -> None:
        for key, value in (("at", self.at), ("to", self.to)):
            _check(
                0 <= value < self.horizon, "remap", key, value, f"tokens from 0 to before the horizon, {self.horizon:,}"
            )

    def __call__(self, tokens: int, batch_tokens: int) -> float:
        if tokens < self.at:
            return self.schedule(tokens, batch_tokens)
        return float(self.schedule(self.inner(tokens), batch_tokens * self.pace))

    @property
    def pace(self) -> Fraction:
        """Exact, so that neither a batch's division nor the float's precision moves an end."""
        return Fraction(self.horizon - self.to, self.horizon - self.at)

    def inner(self, tokens: int | Fraction) -> int | Fraction:
        """Where the schedule is read after `tokens`."""
        return tokens if tokens < self.at else self.to + (tokens - self.at) * self.pace

    def outer(self, tokens: int | Fraction) -> Fraction:
        """After how many tokens a place of the schedule past `to` is read."""
        return self.at + (tokens - self.to) / self.pace

    def landmarks(self) -> list[Landmark]:
        found = [(tokens, label) for tokens, label, _ in self.schedule.landmarks()]
        before = [each for each in found if each[0] < self.at]
        after = [(round(self.outer(tokens)), label) for tokens, label in found if tokens > self.to]
        return _landmarks(self, [*before, *after], [(self.at, f"on as from {self.to:,}")])


def _check(possible: bool, kind: str, key: str, value: float, accepted: str) -> None:
    if not possible:
        raise ValueError(f"a {kind} with {key} = {value:,} is impossible; accepted: {accepted}")


def _landmarks(schedule: Schedule, inner: list[tuple[int, str]], own: list[tuple[int, str]]) -> list[Landmark]:
    """The inner schedule's points and those of an adjustment up to its end, with the rates that are there now."""
    end = next((tokens for tokens, label in inner if label == "end"), math.inf)
    points = sorted([*inner, *(each for each in own if each[0] <= end)], key=lambda each: each[0])
    return [(tokens, label, schedule(tokens, 0)) for tokens, label in points]
