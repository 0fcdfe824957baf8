"""`grow.py CHECKPOINT --advise`: what is known of growing this model now, in these ways, before anything is done."""

import io
import math
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from growth import timing
from growth.operator import preview
from growth.plan import Step
from growth.timing import Timing, amount, growth_timing
from launch.candidates import Candidate, of_steps, parse_candidate
from launch.growth_config import RunConfiguration, segments
from runtime.checkpoint import manifest, retention
from runtime.checkpoint.storage import open_storage
from runtime.checkpoint.store import STATE, read_state
from runtime.checkpoint.unsharded import split
from runtime.config import Config
from runtime.model.counts import Counts, count, flops_per_token
from runtime.observe.dry_run import supposed_device
from runtime.observe.memory import estimate
from runtime.parallel.mesh import Layout, plan_layout
from runtime.state import TrainState, check_description
from runtime.units import parse_tokens
from schedulers.learning_rate import Annealed

DEFAULTS = ("depth.stack factor=2", "depth.stack factor=4")
"""The candidates where none is given."""

_ABREAST = 3
_NO_LAW = (
    "No timing law is published for growth other than in depth; SPARKLING widened at half of the horizon (arXiv "
    "2602.02472)."
)
_REMINDER = (
    "Which candidate ends best does not show at the growth, but a while after it (arXiv 2406.02469): try them with "
    "--probe."
)


def run(arguments: Namespace, steps: Sequence[Step] = ()) -> str:
    """The advice that the command line asks for, on its candidates and the growth of these steps, where there are any.

    ValueError for bad input.
    """
    given = [parse_candidate(text) for text in arguments.candidate or ()] + ([of_steps(steps)] if steps else [])
    candidates = given or [parse_candidate(text) for text in DEFAULTS]
    try:
        horizon = None if arguments.horizon is None else parse_tokens(arguments.horizon)
    except ValueError as error:
        raise ValueError(f"--horizon: {error}") from None
    _, state = read_description(arguments.checkpoint)
    return advise(state, candidates, horizon=horizon, world_size=arguments.world_size, tensor=arguments.tensor)


def read_description(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Path and JSON state of a checkpoint, or of the newest complete one of a run; its tensors are not even verified.

    ValueError if there is none, or it is damaged or of another version.
    """
    location, name = split(path)
    storage = open_storage(location)
    if name is None:
        complete = [each for each in storage.folders() if storage.exists(f"{each}/{manifest.MANIFEST}")]
        name = (retention.by_age(complete) or [""])[-1]
    try:
        files = manifest.read(storage, name)
        if problem := manifest.first_problem(storage, name, [(STATE, files[STATE])]):
            raise ValueError(problem)
        state = read_state(storage, name)
        if not state.get("config"):
            raise ValueError("it was imported and belongs to no run, whose data, batch and schedule this needs")
        check_description(state)
    except ValueError as error:
        raise ValueError(f"{storage}/{name}: {error}") from None
    return f"{storage}/{name}", state


def advise(
    state: dict[str, Any],
    candidates: Sequence[Candidate],
    *,
    horizon: int | None = None,
    world_size: int | None = None,
    tensor: int | None = None,
    device_type: str | None = None,
) -> str:
    """What is known of growing the model of a checkpoint by each of the candidates, as text.

    state: the checkpoint's JSON state. `horizon` (tokens), `world_size` (processes) and `tensor` (degree) suppose
    others than the checkpoint's; `device_type` is "cpu" or "cuda", by default what a dry run supposes. Nothing is built
    or written. ValueError for what cannot be, a candidate that does not fit the model included.
    """
    train = TrainState.from_json(state["train"])
    config = _supposed(state, horizon, tensor, free=world_size is not None or tensor is not None)
    tokens, horizon = train.clock.tokens, config.schedule.end
    if horizon is None:
        raise ValueError("the checkpoint's run has no horizon; suppose one: --horizon")
    if tokens >= horizon:
        raise ValueError(
            f"the checkpoint has seen {tokens:,} tokens and its run ends at {horizon:,}; suppose a later end: --horizon"
        )
    world_size = world_size or len(state["generators"])
    mesh = (world_size, device_type or supposed_device(config, world_size))
    now = _Option("as it is", config, True, *mesh)
    options = [_Option(each.text, *_grow(config, each, tokens), *mesh, each.operators) for each in candidates]

    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(Text(f"{_standing(config, train)}; {world_size} {'process' if world_size == 1 else 'processes'}\n"))
    for first in range(0, len(options), _ABREAST):
        console.print(_numbers([now, *options[first : first + _ABREAST]], train), Text(""))
    notes = {option.name: _notes(now, option, tokens) for option in options}
    shared = [
        note for note in notes[options[0].name] if len(notes) > 1 and all(note in each for each in notes.values())
    ]
    for name, found in notes.items():
        _print_notes(console, name, [note for note in found if note not in shared])
    _print_notes(console, "each of them", shared)
    console.print(Text(_REMINDER))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _print_notes(console: Console, name: str, notes: Sequence[str]) -> None:
    if notes:
        console.print(Text(name), *(Padding(Text(note), (0, 0, 0, 4)) for note in notes), Text(""))


@dataclass(frozen=True)
class _Option:
    """A model to go on with: this one, or one that a candidate makes of it."""

    name: str
    config: Config
    preserves: bool
    world_size: int
    device_type: str
    operators: tuple[str, ...] = ()

    @cached_property
    def counts(self) -> Counts:
        return count(self.config.model)

    @cached_property
    def flops(self) -> int:
        """Per token, forward and backward."""
        return flops_per_token(self.config.model, self.config.data.seq_len)

    @cached_property
    def layout(self) -> Layout | str:
        """How the processes share the model, or why they cannot."""
        config, model = self.config, self.config.model
        try:
            return plan_layout(config.parallel, self.world_size, model, config.data.seq_len, *config.batches.sizes)
        except ValueError as error:
            return str(error)

    @cached_property
    def memory(self) -> float:
        """Bytes on the fullest device; none where there is no layout."""
        if isinstance(self.layout, str):
            return math.nan
        return estimate(self.config, self.layout, device_type=self.device_type).total


def _supposed(state: dict[str, Any], horizon: int | None, tensor: int | None, free: bool) -> Config:
    """The configuration of a checkpoint's run, with another horizon or tensor degree; with `free` the number of data
    shards follows from the others."""
    stored = {key: value for key, value in state["config"].items() if key in Config.model_fields}
    schedule = {"horizon": horizon, "branch": {}} if horizon is not None else {}
    parallel = ({"tensor": tensor} if tensor is not None else {}) | ({"data_shard": "auto"} if free else {})
    changed = {"model": state["model"], "run": {"until": None}, "schedule": schedule, "parallel": parallel}
    raw = stored | {section: stored.get(section, {}) | change for section, change in changed.items()}
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}") from None


def _grow(config: Config, candidate: Candidate, tokens: int) -> tuple[Config, bool]:
    """The configuration of the segment that a candidate begins here, and whether the logits stay."""
    raw = config.model_dump(mode="json", by_alias=True) | {"growth": [candidate.entry_at(tokens, config.schedule.end)]}
    try:
        grown = segments(RunConfiguration.model_validate(raw))[1]
    except ValueError as error:
        raise ValueError(f"candidate {candidate.text!r}: {error}") from None
    model, preserves = config.model, True
    for name, options in candidate.config.steps:
        step = preview(name, options, model)
        model, preserves = step.model, preserves and step.preserves
    return grown, preserves


def _standing(config: Config, train: TrainState) -> str:
    tokens, schedule = train.clock.tokens, config.schedule
    begins = _decay_begins(config)
    decay = f", decay from {begins:,}" if schedule.warmup < begins < schedule.end else ""
    share = f"{tokens / schedule.end:.1%}"
    return f"{config.run.name} at {tokens:,} of {schedule.end:,} tokens ({share}), {schedule.kind}{decay}"


def _decay_begins(config: Config) -> int:
    """Tokens at which the decay up to the horizon begins; the horizon where there is none."""
    rate = config.schedule.build(config.optim.lr, config.batch.sequences, config.data.seq_len)
    return rate.begin if isinstance(rate, Annealed) else config.schedule.end


def _numbers(options: list[_Option], train: TrainState) -> Table:
    """The options side by side, the model as it is first."""
    now, horizon = options[0], options[0].config.schedule.end
    left = horizon - train.clock.tokens

    def total(each: _Option) -> float:
        return train.flops + left * each.flops

    rows: list[tuple[str, Callable[[_Option], str]]] = [
        ("keeps the logits", lambda each: "yes" if each.preserves else "no"),
        ("growth factor", lambda each: f"{each.counts.non_embedding / now.counts.non_embedding:.3g}"),
        ("parameters", lambda each: f"{each.counts.total:,}"),
        ("  without embeddings", lambda each: f"{each.counts.non_embedding:,}"),
        ("  tokens per parameter", lambda each: f"{horizon / each.counts.total:.3g}"),
        ("FLOPs per token", lambda each: f"{each.flops:.4g}"),
        ("FLOPs of the run", lambda each: f"{total(each):.4g}"),
        ("  share of scratch", lambda each: f"{total(each) / (horizon * each.flops):.1%}"),
        ("tokens left", lambda each: f"{left:,}"),
        ("  at the same FLOPs", lambda each: f"{left * now.flops // each.flops:,}"),
        ("memory of a device", lambda each: _bytes(each.memory)),
    ]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    table.add_column("", min_width=20)
    for each in options:
        table.add_column(each.name, justify="right", min_width=14, max_width=17, overflow="fold")
    for label, cell in rows:
        table.add_row(label, *map(cell, options))
    return table


def _bytes(number: float) -> str:
    if math.isnan(number):
        return "no layout"
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{number / 2**20:,.2f} MiB"


def _notes(now: _Option, option: _Option, tokens: int) -> list[str]:
    """What is known for and against an option at this time, in sentences."""
    config, model = option.config, option.config.model
    horizon, grown = config.schedule.end, option.counts.total
    factor = option.counts.non_embedding / now.counts.non_embedding
    deeper = model.num_layers > now.config.model.num_layers
    found = [
        *(_timing(growth_timing(grown, horizon, factor), tokens, horizon) if deeper else [_NO_LAW]),
        *timing.factor_caveats(factor, now.config.model.num_layers if deeper else None),
        *timing.warm_start_caveats(horizon, grown),
        *timing.schedule_caveats(config.schedule.kind, tokens / horizon, _decay_begins(config) / horizon),
    ]
    if "depth.stack" in option.operators:
        found += timing.stacking_caveats(tokens / now.counts.total)
    if isinstance(option.layout, str):
        found.append(f"The processes cannot share it: {option.layout}.")
    elif model.vocab_size % option.layout.tensor:
        found.append(
            f"The vocabulary of {model.vocab_size:,} is not a multiple of the {option.layout.tensor} tensor-parallel "
            "ranks: each of them keeps the whole embedding and head."
        )
    return found


def _timing(law: Timing, tokens: int, horizon: int) -> list[str]:
    """What the timing law says of a growth at this time."""
    distance = law.recommended - tokens
    place = f"{amount(distance)} from here" if distance > 0 else f"{amount(-distance)} ago"
    if not law.outside:
        return [f"The timing law of stacking: grow after {amount(law.law)} tokens, {place} (arXiv 2405.15319)."]
    if law.clamped:
        share = f"{law.recommended / horizon:.2g} of the horizon"
        advice = f"It is not extrapolated: the nearest measured is {amount(law.recommended)}, {share}, {place}"
    else:
        advice = f"Taken with care, that is {place}"
    return [
        f"The timing law of stacking (arXiv 2405.15319) says {amount(law.law)} tokens, but was not fitted there: "
        f"{'; '.join(law.outside)}. {advice}."
    ]
