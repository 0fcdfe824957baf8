"""Schedules one after another: the periods of WSD-S, and any sequence."""

from bisect import bisect_right
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass

from schedulers import tails
from schedulers.learning_rate import Landmark, Schedule, check_span, landmarks, warm_up

JOINT = 1e-6
"""Relative difference of two rates that are called the same where stages join."""


@dataclass(frozen=True)
class Periods:
    """WSD-S (Wen et al. 2024, arXiv 2410.05192): every period ends in a decay, and the next goes on from the decayed
    weights at the peak again, without a warm-up.

    `ends`: tokens at which periods end, ascending. `decay`: share of a period that its tail takes. `peaks`: the factor
    of the peak in each period, 1 by default. Past the last period the last rate stays.
    """

    peak: float
    warmup: int
    ends: tuple[int, ...]
    decay: float = 0.1
    tail: str = "inverse-proportional"
    final: float = 0.1
    peaks: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_span("warm-up", self.warmup)
        tails.check(self.tail, self.final)
        if not self.ends or sorted(set(self.ends)) != list(self.ends) or self.ends[0] < 1:
            raise ValueError(f"periods = {list(self.ends)} are not ascending numbers of tokens")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay = {self.decay} is not a share of a period, between 0 and 1")
        if self.peaks and (len(self.peaks) != len(self.ends) or min(self.peaks) <= 0):
            raise ValueError(
                f"peaks = {list(self.peaks)}: accepted: {len(self.ends)} positive factors, one for a period"
            )
        if self.warmup > self.decay_begins(0):
            raise ValueError(
                f"a warm-up of {self.warmup:,} tokens does not fit before the decay of a period of {self.ends[0]:,}"
            )

    def __call__(self, tokens: int, batch_tokens: int) -> float:
        period = min(bisect_right(self.ends, tokens), len(self.ends) - 1)
        begin, end = self.decay_begins(period), self.ends[period]
        share = tails.factor(self.tail, (tokens - begin) / (end - begin), self.final) if end > begin else 1.0
        peak = self.peak * (self.peaks[period] if self.peaks else 1.0)
        return peak * share * warm_up(tokens + batch_tokens, self.warmup)

    def decay_begins(self, period: int) -> int:
        """Tokens at which a period's tail begins."""
        end, begin = self.ends[period], self.ends[period - 1] if period else 0
        return end - round((end - begin) * self.decay)

    def landmarks(self) -> list[Landmark]:
        points = [(self.warmup, "end of warm-up")]
        for period, end in enumerate(self.ends):
            points += [
                (self.decay_begins(period), f"start of decay {period + 1}"),
                (end, f"end of period {period + 1}"),
            ]
        return landmarks(self, *points)


@dataclass(frozen=True)
class Stage:
    """One schedule of a sequence, on a clock of its own that begins where the stage before ends.

    `tokens`: its length; None for one without an end. `warmup`: tokens in which its rate goes in a line from the last
    rate before it to its own. `jumps`: that its first rate may be another than the last one before it.
    """

    schedule: Schedule
    tokens: int | None = None
    warmup: int = 0
    jumps: bool = False


@dataclass(frozen=True)
class Sequence:
    """Stages one after another. ValueError where the rate would jump between two, unless the later one says so."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a sequence without stages has no rate")
        for number, stage in enumerate(self.stages):
            check_span("warm-up", stage.warmup)
            length = stage.tokens
            if length is None and number < len(self.stages) - 1:
                raise ValueError(f"stage {number} of {len(self.stages)} has no end, and only the last may have none")
            if length is not None and not stage.warmup <= length > 0:
                raise ValueError(f"stage {number}: {length:,} tokens do not hold a warm-up of {stage.warmup:,}")
        for number in range(1, len(self.stages)):
            self._check_joint(number)

    def _check_joint(self, number: int) -> None:
        stage, before = self.stages[number], self._last(number - 1)
        after = stage.schedule(0, 0)
        if not stage.warmup and not stage.jumps and abs(after - before) > JOINT * max(after, before):
            raise ValueError(
                f"stage {number} begins at a rate of {after:.6g} and the stage before ends at {before:.6g}; give it a "
                "warm-up, or say that it jumps"
            )

    def stage(self, tokens: float) -> tuple[int, int]:
        """Number and first token of the stage that is in force after `tokens`."""
        starts = self._starts()
        number = bisect_right(starts, tokens) - 1
        return number, starts[number]

    def spans(self) -> Iterator[tuple[Stage, int]]:
        """The stages, each with its first token."""
        return zip(self.stages, self._starts(), strict=True)

    def _starts(self) -> Many[int]:
        starts = [0]
        for stage in self.stages[:-1]:
            starts.append(starts[-1] + stage.tokens)
        return starts

    def _last(self, number: int) -> float:
        """The rate at the end of a stage."""
        return self._rate(number, self.stages[number].tokens, 0)

    def _rate(self, number: int, tokens: int, batch_tokens: int) -> float:
        stage = self.stages[number]
        if not number or tokens + batch_tokens >= stage.warmup:
            return stage.schedule(tokens, batch_tokens)
        before, after = self._last(number - 1), stage.schedule(stage.warmup, 0)
        return before + (after - before) * (tokens + batch_tokens) / stage.warmup

    def __call__(self, tokens: int, batch_tokens: int) -> float:
        number, start = self.stage(tokens)
        return self._rate(number, tokens - start, batch_tokens)

    def landmarks(self) -> list[Landmark]:
        points = []
        last = len(self.stages) - 1
        for number, (stage, start) in enumerate(self.spans()):
            if number:
                points.append((start, f"stage {number + 1}"))
            inner = {(tokens, label) for tokens, label, _ in stage.schedule.landmarks() if tokens}
            inner |= {(stage.warmup, "end of warm-up")} if stage.warmup else set()
            # Only the last stage's end is the schedule's.
            inside = [each for each in sorted(inner) if each[0] <= (stage.tokens or each[0])]
            points += [(start + tokens, label) for tokens, label in inside if number == last or label != "end"]
        return landmarks(self, *points)
