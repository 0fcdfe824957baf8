"""What a run's clock decides, batch, learning rate and what follows them: as configured, and as events changed it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from runtime.config import Config
from schedulers.adjustments import Remapped, Rewarmed
from schedulers.batch_size import BatchPlan
from schedulers.coupling import Coupled, Coupling
from schedulers.learning_rate import Schedule
from schedulers.phases import is_warming

Event = dict[str, Any]
Change = tuple[int, dict[str, Any]]
"""Tokens of a growth, and its `schedule`."""


class Settings(NamedTuple):
    """Of one step."""

    sequences: int
    lr: float
    """The base rate, which groups of parameters scale."""
    beta2: float
    weight_decay: float
    """A factor of the configured one."""


@dataclass(frozen=True)
class Timetable:
    """Functions of the clock alone; what is measured in training reaches them as events."""

    schedule: Schedule
    batches: BatchPlan
    coupling: Coupling
    beta2: float
    """Of the first batch."""
    seq_len: int

    def at(self, tokens: int) -> Settings:
        """Of the step that begins after `tokens`."""
        sequences = self.batches(tokens)
        return Settings(
            sequences,
            self.schedule(tokens, sequences * self.seq_len),
            self.coupling.beta2_of(self.beta2, self.batches, tokens),
            self.coupling.decay_factor(self.batches, tokens),
        )

    def rate(self, tokens: int) -> float:
        """The learning rate at a point, for a table: with the batch that is there, and in a warm-up at its very place,
        not at the end of a step."""
        rises = is_warming(self.schedule, tokens) or self.coupling.blend
        return self.schedule(tokens, 0) if rises else self.at(tokens).lr


def build_timetable(config: Config, events: Sequence[Event] = ()) -> Timetable:
    """The timetable of a segment, after a run's events. ValueError for what cannot be.

    A growth event's `schedule` is {"kind": "continue"}, {"kind": "rewarm", "scope", "start", "peak", "tokens"} or
    {"kind": "remap", "to"}; they adjust the learning rate in their order. A re-warm of what is new alone is none of the
    base rate: the regions have it. What its parent has grown through is part of what a branch anneals, and its own
    growths change the tail. A measured batch_change event names the `sequences` from there on.
    """
    section, batch, coupling = config.schedule, config.batch, config.batch.coupling.build()
    batches, at = config.batches, section.branch.at
    grown = [(event["tokens"], event["schedule"]) for event in events if event["event"] == "growth"]
    inherited = grown if at is None else grown[: _inherited(events, at)]
    schedule = section.unbranched(config.optim.lr, batch.sequences, config.data.seq_len)
    schedule = _adjusted(schedule, inherited, section.horizon)
    if batch.kind == "seesaw":
        schedule = batch.staircase(schedule, section.warmup, section.horizon)
        coupling = replace(coupling, lr="sqrt")  # which its stairs are above the schedule
    if at is not None:
        schedule = _adjusted(section.annealed(schedule), grown[len(inherited) :], section.end)
    for event in events if batch.is_measured else ():
        if event["event"] == "batch_change":
            batches = batches.changed(event["tokens"], event["sequences"])
    if batch.coupling.lr != "none":
        schedule = Coupled(schedule, batches, coupling)
    return Timetable(schedule, batches, coupling, config.optim.adam_betas[1], config.data.seq_len)


def branch_event(tokens: int) -> Event:
    """Of a run that leaves its parent as a branch after `tokens`: growths before it are the parent's."""
    return {"event": "branch", "tokens": tokens}


def _inherited(events: Sequence[Event], at: int) -> int:
    """Growths that a branch anneals: its parent's, and any of before the branch point. At the point itself both may
    have grown, and there the order of events tells."""
    left = max((number for number, each in enumerate(events) if each["event"] == "branch"), default=0)
    growths = [number for number, each in enumerate(events) if each["event"] == "growth"]
    return sum(number < left or events[number]["tokens"] < at for number in growths)


def _adjusted(schedule: Schedule, grown: Sequence[Change], horizon: int | None) -> Schedule:
    for tokens, change in grown:
        if change["kind"] == "remap":
            schedule = _remapped(schedule, tokens, change["to"], horizon)
    # Outside all remaps, so that going back to an earlier place of the schedule repeats no re-warm.
    for tokens, change in grown:
        if change["kind"] == "rewarm" and change["scope"] == "all":
            schedule = Rewarmed(
                schedule, at=tokens, tokens=change["tokens"], start=change["start"], peak=change["peak"]
            )
    return schedule


def _remapped(schedule: Schedule, at: int, to: int, horizon: int | None) -> Remapped:
    if horizon is None:
        raise ValueError(f"the growth at {at:,} tokens has remapped towards schedule.horizon, which is not given")
    try:
        return Remapped(schedule, at=at, to=to, horizon=horizon)
    except ValueError as error:
        raise ValueError(f"the growth at {at:,} tokens: {error}") from None
