"""The one clock: tokens seen."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Where a run stands, counted over all its ancestors.

    `sequences` counts those of every batch; `tokens` counts every position of every
    sequence, masked and skipped ones included; `step` is a label for people and moves no schedule.
    """

    tokens: int = 0
    sequences: int = 0
    step: int = 0

    def advance(self, sequences: int, seq_len: int) -> "Clock":
        return Clock(self.tokens + sequences * seq_len, self.sequences + sequences, self.step + 1)


def is_due(every: int | None, before: int, after: int) -> bool:
    """Whether a multiple of `every` tokens lies in (before, after]: an event fires at the first step
    boundary at or past its token."""
    return bool(every) and before // every < after // every
