"""What a schedule comes to before anything is trained: its trace, and what is wrong or unusual about it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from schedulers.adjustments import Remapped, Rewarmed
from schedulers.batch_size import BatchPlan
from schedulers.coupling import Coupled
from schedulers.learning_rate import Annealed, Schedule
from schedulers.power import Power
from schedulers.seesaw import Seesaw
from schedulers.stages import Periods, Sequence

MOST_STEPS = 200_000
"""Steps of a trace; a longer run is read at so many of them."""

JUMP = 0.05
"""Relative change of the rate within one token that is called a jump."""


@dataclass(frozen=True)
class Step:
    """One step of a trace."""

    number: int
    tokens: int
    """Seen before it."""
    sequences: int
    lr: float


def trace(schedule: Schedule, batches: BatchPlan, seq_len: int, end: int) -> Iterator[Step]:
    """The steps up to `end`, the last included; evenly chosen ones where there are more than MOST_STEPS."""
    stretches = list(batches.stretches(end, seq_len))
    every = -(-sum(each.steps for each in stretches) // MOST_STEPS)
    for stretch in stretches:
        batch_tokens = stretch.sequences * seq_len
        for step in sorted({*range(0, stretch.steps, every), stretch.steps - 1}):
            tokens = stretch.tokens + step * batch_tokens
            yield Step(stretch.step + step, tokens, stretch.sequences, schedule(tokens, batch_tokens))


def caveats(schedule: Schedule, batches: BatchPlan, seq_len: int, end: int) -> list[str]:
    """What a person should know of a schedule that is followed for `end` tokens, as sentences; none if all is usual."""
    steps = list(trace(schedule, batches, seq_len, end))
    return [*_rates(steps), *_jumps(schedule, batches, end), *_reach(schedule, end), *_growing(batches, end)]


def _rates(steps: list[Step]) -> Iterator[str]:
    rates = [(step.lr, step.tokens) for step in steps]
    lowest, where = min(rates)
    if lowest < 0:
        yield f"The rate is negative: {lowest:.4g} at {where:,} tokens."
    if zeros := [tokens for rate, tokens in rates if rate == 0]:
        yield f"The rate is zero in {len(zeros):,} of {len(rates):,} steps, first at {zeros[0]:,} tokens."


def _jumps(schedule: Schedule, batches: BatchPlan, end: int) -> Iterator[str]:
    """A steep line is no jump: over two tokens it changes twice as much as over one. Where the batch changes, the rate
    is to follow."""
    changes = dict(batches.changes)
    for tokens, label, _ in schedule.landmarks():
        if tokens in changes:
            continue
        if not 1 < tokens < end:
            continue
        before, after = schedule(tokens - 1, 0), schedule(tokens, 0)
        earlier = schedule(tokens - 2, 0)
        scale = max(abs(before), abs(after))
        slope = abs(before - earlier)
        if scale and abs(after - before) > JUMP * scale and abs(after - before) > 4 * slope:
            yield f"The rate jumps at {tokens:,} tokens ({label}), from {before:.4g} to {after:.4g}."


@dataclass(frozen=True)
class _Part:
    """A schedule within another, on a clock of its own."""

    schedule: Schedule
    end: float
    """Tokens of that clock up to which it is followed."""
    place: Callable[[float], float] = float
    """The run's clock at tokens of its own."""

    def at(self, tokens: float) -> str:
        return f"{round(self.place(tokens)):,}"


def _reach(schedule: Schedule, end: int) -> Iterator[str]:
    """What the run does not live to see."""
    for part in _parts(_Part(schedule, end)):
        yield from _unrisen(part)
        yield from _unfinished(part)


def _parts(part: _Part) -> Iterator[_Part]:
    """The shapes that a schedule is made of, as far as the run gets, and each sequence before its stages."""
    schedule, end, place = part.schedule, part.end, part.place
    if isinstance(schedule, Coupled | Seesaw | Rewarmed):
        yield from _parts(replace(part, schedule=schedule.schedule))
    elif isinstance(schedule, Remapped):
        moved = place if end < schedule.at else lambda tokens: place(schedule.outer(tokens))
        yield from _parts(_Part(schedule.schedule, schedule.inner(end), moved))
    elif isinstance(schedule, Sequence):
        yield part
        for stage, start in schedule.spans():
            if start < end:
                last = end - start if stage.tokens is None else min(end - start, stage.tokens)
                yield from _parts(_Part(stage.schedule, last, lambda tokens, start=start: place(start + tokens)))
    else:
        yield part


def _unrisen(part: _Part) -> Iterator[str]:
    schedule, end = part.schedule, part.end
    if isinstance(schedule, Annealed):
        for inner in _parts(replace(part, schedule=schedule.schedule)):
            yield from _unrisen(inner)
        return
    warmup = getattr(schedule, "warmup", 0)
    if warmup >= end:
        ends = f"{part.at(warmup)} tokens and the run at {part.at(end)}"
        yield f"The warm-up ends at {ends}: the rate never gets to its peak."
    if isinstance(schedule, Power) and schedule.knee() >= end:
        knee = f"{part.place(schedule.knee()):.4g} tokens"
        yield f"The power rule is above its cap of {schedule.cap:.4g} up to {knee}, past the end: the rate is constant."


def _unfinished(part: _Part) -> Iterator[str]:
    schedule, end = part.schedule, part.end
    if isinstance(schedule, Annealed) and schedule.decay and end < schedule.horizon:
        share = float((end - schedule.begin) / schedule.decay)
        if share <= 0:
            yield f"The run ends at {part.at(end)} tokens, before its decay begins at {part.at(schedule.begin)}."
        else:
            done = f"{share:.0%} of the decay up to {part.at(schedule.horizon)}"
            yield f"The run ends at {part.at(end)} tokens, when {done} are done."
    if isinstance(schedule, Sequence):
        late = [(number, start) for number, (_, start) in enumerate(schedule.spans(), 1) if start >= end]
        for number, start in late[:1]:
            yield f"The run ends at {part.at(end)} tokens, before stage {number} begins at {part.at(start)}."
    if isinstance(schedule, Periods) and end not in schedule.ends:
        yield f"The run ends at {part.at(end)} tokens, within a period: the last decay is not complete."


def _growing(batches: BatchPlan, end: int) -> Iterator[str]:
    if late := [(tokens, sequences) for tokens, sequences in batches.changes if tokens >= end]:
        reached, (tokens, sequences) = batches(end - 1), late[-1]
        yield (
            f"The batch ends at {reached:,} sequences: it would come to {sequences:,} at {tokens:,} tokens, past the "
            f"end of the run at {end:,}."
        )


LEAST_RATIO, MOST_RATIO = 1 / 3, 3.0
"""Of a weight decay's time scale and the published optimum, between which nothing is said."""


def timescale(batch_tokens: int, mean_lr: float, weight_decay: float, tokens: int) -> float:
    """B / (lr x weight decay x D): the part of a run that AdamW's weights average over (arXiv 2405.13698)."""
    return batch_tokens / (mean_lr * weight_decay * tokens)


def best_timescale(tokens_per_parameter: float) -> float:
    """1.084 TPP^-0.527, fitted to tuned runs (Power Lines, Bergsma et al. 2025, arXiv 2505.13738)."""
    return 1.084 * tokens_per_parameter**-0.527


def decay_caveats(batch_tokens: int, mean_lr: float, weight_decay: float, tokens: int, parameters: int) -> list[str]:
    """What is known against a weight decay at this rate, batch and length."""
    if not weight_decay or not mean_lr:
        return []
    found, best = timescale(batch_tokens, mean_lr, weight_decay, tokens), best_timescale(tokens / parameters)
    if LEAST_RATIO <= found / best <= MOST_RATIO:
        return []
    ratio = tokens / parameters
    return [
        f"The time scale of weight decay is {found:.3g} of the run; at {ratio:.3g} tokens a parameter {best:.3g} was "
        f"best (arXiv 2505.13738), which here is a weight decay of {weight_decay * found / best:.2g}."
    ]
