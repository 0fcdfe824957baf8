"""What a configuration's schedule comes to: its course as a table, as a plot, and what is unusual about it."""

from pathlib import Path
from typing import Any

from launch.growth_config import RunConfiguration, segments
from runtime.config import Config
from runtime.model.counts import count, flops_per_token
from runtime.observe.console import duration
from runtime.parallel.mesh import plan_layout
from runtime.timetable import Timetable, build_timetable
from schedulers.explain import Step, caveats, decay_caveats, trace

MOST_CHANGES = 12
"""Of the batch, that have a row each."""

Point = tuple[int, str]
"""Tokens, and what happens there."""


def planned(config: RunConfiguration) -> Timetable:
    """The timetable with what the growths are to change in the learning rate."""
    events = [{"event": "growth", "tokens": each.at, "schedule": _change(each)} for each in config.growth]
    return build_timetable(config, events)


def _change(entry: Any) -> dict[str, Any]:
    return entry.schedule.model_dump()


def explain_schedule(
    config: RunConfiguration, end: int, tokens_per_second: float | None = None, processes: int | None = None
) -> str:
    """The course of a run up to `end` tokens, and what is to be known of it, as text.

    `tokens_per_second`: of the first segment's model; a grown one is as much slower as its FLOPs are more.
    ValueError for a layout that `processes` cannot make.
    """
    plan, clock = planned(config), _Seconds(config, tokens_per_second)
    cadence = [f"{name} every {_every(every)}" for name, every in _cadences(config).items()]
    table = _table(config, plan, end, clock if tokens_per_second else None)
    notes = _notes(config, plan, end, processes)
    return "\n".join([_title(config, plan, end), ", ".join(cadence), "", *table, "", *(notes or ["Nothing unusual."])])


def _title(config: RunConfiguration, plan: Timetable, end: int) -> str:
    smallest, largest = min(plan.batches.sizes), max(plan.batches.sizes)
    sizes, tokens = f"{smallest:,}", f"{smallest * plan.seq_len:,}"
    if smallest != largest:
        sizes, tokens = f"{sizes} to {largest:,}", f"{tokens} to {largest * plan.seq_len:,}"
    betas = config.optim.adam_betas
    return (
        f"{config.run.name}: {config.schedule.kind}, {plan.batches.step_at(end, plan.seq_len):,} steps of {tokens} "
        f"tokens ({sizes} sequences), betas {betas[0]:g} and {betas[1]:g}"
    )


def _table(config: RunConfiguration, plan: Timetable, end: int, clock: "_Seconds | None") -> list[str]:
    """The columns of what changes, at the points where something does."""
    grows, follows = len(plan.batches.sizes) > 1, config.batch.coupling.beta2 != "none"
    header = ["tokens", "step", *(["after"] if clock else []), *(["batch"] if grows else [])]
    rows = [[*header, "learning rate", *(["beta2"] if follows else []), "weight decay", ""]]
    for tokens, label in points(config, plan, end):
        step, rate = plan.at(tokens), plan.rate(tokens)
        row = [f"{tokens:,}", f"{plan.batches.step_at(tokens, plan.seq_len):,}"]
        row += [duration(clock.at(tokens))] if clock else []
        row += [f"{step.sequences:,}"] if grows else []
        row += [f"{rate:.4g}", *([f"{step.beta2:.5g}"] if follows else [])]
        rows.append([*row, f"{config.optim.weight_decay * step.weight_decay * rate:.4g}", label])
    return _aligned(rows)


def points(config: RunConfiguration, plan: Timetable, end: int) -> list[Point]:
    """What happens up to `end`, in order: where the rate changes its course, the batch, growths, checkpoints that are
    named, the end."""
    found = {(tokens, label) for tokens, label, _ in plan.schedule.landmarks() if tokens <= end and label != "end"}
    found |= {(each.at, f"growth: {each.operator}") for each in config.growth if each.at < end}
    found |= {(tokens, "checkpoint") for tokens in config.checkpoint.at if tokens < end}
    changes = [(tokens, f"batch of {sequences:,}") for tokens, sequences in plan.batches.changes if tokens < end]
    if len(changes) > MOST_CHANGES:
        changes = [changes[0], (changes[-1][0], f"{changes[-1][1]}, after {len(changes) - 2} more sizes")]
    found |= set(changes)
    return [*sorted(found), (end, "end")]


def _cadences(config: Config) -> dict[str, int]:
    every = {"checkpoint": config.checkpoint.every}
    return every | ({"evaluation": config.evaluation.every} if config.evaluation.sets else {})


def _every(tokens: int) -> str:
    return f"{tokens:,} tokens" if tokens else "launch, at its end"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return lines


class _Seconds:
    """Time since the start, if every segment runs at the FLOPs a second that the first one does."""

    def __init__(self, config: RunConfiguration, tokens_per_second: float | None):
        costs = [flops_per_token(each.model, each.data.seq_len) for each in segments(config)]
        self._starts = [0, *(each.at for each in config.growth)]
        self._paces = [cost / costs[0] / (tokens_per_second or 1.0) for cost in costs]

    def at(self, tokens: int) -> float:
        ends = [*self._starts[1:], tokens]
        return sum(
            max(0, min(tokens, end) - start) * pace
            for start, end, pace in zip(self._starts, ends, self._paces, strict=True)
        )


def _notes(config: RunConfiguration, plan: Timetable, end: int, processes: int | None) -> list[str]:
    notes = [*_unknown(config), *caveats(plan.schedule, plan.batches, plan.seq_len, end)]
    steps = list(trace(plan.schedule, plan.batches, plan.seq_len, end))
    last = segments(config)[-1]
    mean, parameters = sum(each.lr for each in steps) / len(steps), count(last.model).total
    batch_tokens = round(end / plan.batches.step_at(end, plan.seq_len))
    notes += decay_caveats(batch_tokens, mean, config.optim.weight_decay, end, parameters)
    if processes is not None:
        for each in segments(config):
            plan_layout(each.parallel, processes, each.model, each.data.seq_len, *each.batches.sizes)
    return notes


def _unknown(config: RunConfiguration) -> list[str]:
    """What the course of a run depends on that its configuration does not know."""
    notes, batch, at = [], config.batch, config.schedule.branch.at
    if batch.is_measured:
        notes.append(
            f'The batch follows what is measured (batch.kind = "{batch.kind}"), up to {batch.control.largest:,} '
            f"sequences: steps, rates and weight decay are those of {batch.sequences:,}."
        )
    if at is not None:
        notes.append(
            f"This run is a branch and begins at {at:,} tokens; what its parent's growths and measurements have "
            "changed is in the checkpoint that it begins from, and not here."
        )
    return notes


def plot(config: RunConfiguration, end: int, path: Path) -> None:
    """The learning rate over tokens, with growths, checkpoints and evaluations; below it the batch, if it changes, and
    what follows it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plan = planned(config)
    steps: list[Step] = list(trace(plan.schedule, plan.batches, plan.seq_len, end))
    courses = {"learning rate": [each.lr for each in steps], **_following(config, plan, steps)}
    figure = Figure(figsize=(8, 2.5 + 1.5 * len(courses)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(courses), squeeze=False, sharex=True, height_ratios=[3, *[1] * (len(courses) - 1)])
    places = [*(each.tokens for each in steps), end]
    for axes, (name, values) in zip(panels[:, 0], courses.items(), strict=True):
        axes.step(places, [*values, values[-1]], where="post", linewidth=1.6)
        axes.set(ylabel=name)
        if name != "beta2":
            axes.set_ylim(bottom=min(0.0, *values))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    panels[-1, 0].set_xlabel("tokens")
    _mark(panels[0, 0], config, end)
    panels[0, 0].set_title(f"{config.run.name}: {config.schedule.kind}")
    figure.savefig(path)


def _following(config: RunConfiguration, plan: Timetable, steps: list[Step]) -> dict[str, list[float]]:
    """The batch of each step, if it changes, and what is coupled to it, as in the table."""
    if len(plan.batches.sizes) == 1:
        return {}
    found: dict[str, list[float]] = {"sequences": [each.sequences for each in steps]}
    settings = [plan.at(each.tokens) for each in steps]
    if config.batch.coupling.beta2 != "none":
        found["beta2"] = [each.beta2 for each in settings]
    if config.batch.coupling.weight_decay != "none":
        found["weight decay"] = [config.optim.weight_decay * each.weight_decay * each.lr for each in settings]
    return found


def _mark(axes: Any, config: RunConfiguration, end: int) -> None:
    """Growths as lines, checkpoints and evaluations as ticks."""
    top = axes.get_ylim()[1]
    for entry in config.growth:
        if entry.at < end:
            axes.axvline(entry.at, color="tab:green", linestyle="--", linewidth=1)
            place = (entry.at, top)
            axes.annotate(entry.operator, place, rotation=90, va="top", ha="right", fontsize=8, color="tab:green")
    for height, (name, every) in zip((0.02, 0.06), _cadences(config).items(), strict=False):
        marks = list(range(every, end + 1, every)) if every else [end]
        marks += [tokens for tokens in config.checkpoint.at if name == "checkpoint" and tokens < end]
        if len(marks) <= 200:
            axes.plot(marks, [top * height] * len(marks), "|", markersize=7, label=name)
    axes.legend(frameon=False, fontsize=8)
