"""Where a schedule is stable, so that a branch may be annealed from there."""

from bisect import bisect_right

from schedulers.adjustments import Remapped, Rewarmed
from schedulers.coupling import Coupled
from schedulers.learning_rate import Annealed, Schedule
from schedulers.seesaw import Seesaw
from schedulers.stages import Periods, Sequence


def is_warming(schedule: Schedule, tokens: float) -> bool:
    """Whether a step after `tokens` lies in a warm-up, or in a re-warm that rises."""
    if isinstance(schedule, Coupled | Seesaw):
        return is_warming(schedule.schedule, tokens)
    if isinstance(schedule, Rewarmed):
        rises = schedule.peak > schedule.start and schedule.at <= tokens < schedule.at + schedule.tokens
        return rises or is_warming(schedule.schedule, tokens)
    if isinstance(schedule, Remapped):
        return is_warming(schedule.schedule, schedule.inner(tokens))
    if isinstance(schedule, Annealed):
        return tokens < schedule.begin and is_warming(schedule.schedule, tokens)
    if isinstance(schedule, Sequence):
        number, start = schedule.stage(tokens)
        stage = schedule.stages[number]
        if number and tokens - start < stage.warmup:
            return schedule(start + stage.warmup, 0) > schedule(start, 0)
        return is_warming(stage.schedule, tokens - start)
    return tokens < getattr(schedule, "warmup", 0)


def decay_began(schedule: Schedule, tokens: float) -> int | None:
    """Where the tail began that a schedule with a stable part is in after `tokens`; None outside of tails.

    A tail's first token is not in it: the rate there is the stable one. A schedule that decays all along, as a cosine
    does, has no stable part that a decay would end.
    """
    if isinstance(schedule, Rewarmed | Coupled | Seesaw):
        return decay_began(schedule.schedule, tokens)
    if isinstance(schedule, Remapped):
        return _in_remapped(schedule, tokens)
    if isinstance(schedule, Annealed):
        if tokens <= schedule.begin:
            return decay_began(schedule.schedule, tokens)
        stable = schedule.begin > getattr(schedule.schedule, "warmup", 0)
        return schedule.begin if schedule.decay and stable else None
    if isinstance(schedule, Periods):
        begin = schedule.decay_begins(min(bisect_right(schedule.ends, tokens), len(schedule.ends) - 1))
        return begin if tokens > begin else None
    if isinstance(schedule, Sequence):
        number, start = schedule.stage(tokens)
        began = decay_began(schedule.stages[number].schedule, tokens - start)
        return None if began is None else start + began
    return None


def _in_remapped(schedule: Remapped, tokens: float) -> int | None:
    if tokens < schedule.at:
        return decay_began(schedule.schedule, tokens)
    began = decay_began(schedule.schedule, schedule.inner(tokens))
    return None if began is None else max(schedule.at, round(schedule.outer(began)))
