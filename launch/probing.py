"""`grow.py CHECKPOINT [OUT] --probe K`: try several growths for K steps each, and rank them by the loss after those.

The loss at the growth itself hardly predicts which one ends best, the loss a while later does (landscape-aware growing,
arXiv 2406.02469). Each candidate is tried by the trainer itself: a run that branches from the checkpoint, grows before
its first step, and trains on the samples to come, with the optimizer's state and at the rates the checkpoint has.
"""

import gc
import io
import math
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from launch.advising import read_description
from launch.between_runs import Chosen, grow_by
from launch.candidates import Candidate, parse_candidate
from launch.chain import run as run_chain
from launch.config import dump
from launch.growth_config import GrowthConfig, RunConfiguration, segments
from launch.new_checkpoint import all_processes, refuse_existing
from runtime.checkpoint.ranks import Ranks
from runtime.config import Config
from runtime.observe.jsonl import Row, read_rows
from runtime.resilience.exits import INTERRUPTED
from runtime.timetable import build_timetable
from runtime.trainer import Outcome

TAIL = 5
"""Without held-out sets, the last 1/5 of the steps are averaged."""


@dataclass(frozen=True)
class Probe:
    """What became of one candidate."""

    name: str
    outcome: str
    preserves: bool
    """Whether its operators keep the logits."""
    first: float | None
    """Loss at the growth."""
    last: float | None
    """Loss after the steps; None where it did not get there."""
    tokens: int
    flops: int
    """What it cost, without evaluations."""


def probe(arguments: Namespace) -> str:
    """Try the candidates of the command line, and with OUT grow by the best; a collective over torchrun's processes.

    The table of the candidates, and what was written, as text. ValueError for bad input, on all processes;
    `SystemExit` with its own code where a signal ends it.
    """
    steps = arguments.probe
    candidates = [parse_candidate(text) for text in arguments.candidate]
    with all_processes() as (ranks, stack):
        if arguments.out is not None:
            ranks.broadcast(lambda: refuse_existing(arguments.out))
        path, description = ranks.broadcast(lambda: read_description(arguments.checkpoint))
        folder = stack.enter_context(_workspace(arguments.workspace, ranks))
        configs = [
            probe_config(description, path, each, f"{folder}/{number}", steps) for number, each in enumerate(candidates)
        ]
        probes = []
        for number, (candidate, config) in enumerate(zip(candidates, configs, strict=True), 1):
            if ranks.is_first:
                print(f"probe {number} of {len(candidates)}: {candidate.text}", file=sys.stderr, flush=True)
            probes.append(_try(config, candidate, description["train"], steps, ranks))
        ranked = ranking(probes)
        text = table(ranked, steps, held_out=bool(configs[0].evaluation.sets))
        if arguments.out is None:
            return f"{text}\n\nnothing is written; the probes' FLOPs are in no ledger unless OUT is given"
        if ranked[0].last is None:
            raise ValueError(f"no candidate got through its {steps} steps, so there is none to grow by\n{text}")
        best = configs[probes.index(ranked[0])].growth[0]
        chosen = Chosen(best, [asdict(each) for each in ranked], steps)
        return f"{text}\n\n{grow_by(arguments, chosen, path, ranks, stack)}{_own_settings(best)}"


def probe_config(
    description: dict[str, Any], checkpoint: str, candidate: Candidate, folder: str, steps: int
) -> RunConfiguration:
    """The run that tries a candidate: it branches from the checkpoint into `folder`, and grows before its first step.

    description: the checkpoint's JSON state. The run ends after as many tokens as the checkpoint's own run would take
    for the steps, all of the batch that it has there, and writes no more than it must. ValueError for a candidate that
    does not fit, and for more steps than the run has left.
    """
    stored = {key: value for key, value in description["config"].items() if key in Config.model_fields}
    tokens = description["train"]["clock"]["tokens"]
    parent = Config.model_validate(stored)
    plan, end = build_timetable(parent, description["train"]["events"]), parent.schedule.end
    batch_tokens = plan.batches(tokens) * plan.seq_len
    until = tokens + steps * batch_tokens
    if end is not None and until > end:
        raise ValueError(
            f"--probe {steps}: so many steps of {batch_tokens:,} tokens, from {tokens:,} on, end past the end of the "
            f"checkpoint's run, {end:,}"
        )
    observe = {"log_every": 1, "tensorboard": False, "wandb": None, "health_every": None, "profile_steps": None}
    changed = {
        "run": {"name": "probe", "dir": folder, "until": until, "max_minutes": None},
        "model": description["model"],
        "parallel": {"data_shard": "auto"},
        "evaluation": {"every": 0},
        "checkpoint": {"every": 0, "keep_last": 1, "keep_every": None, "dir": None},
        "observe": {**observe, "memory_snapshot": False},
        "start": {"from": checkpoint, "carry": "all"},
    }
    if parent.batch.is_measured:  # what was measured before stays, and nothing is decided within a probe
        changed["batch"] = {"control": stored["batch"]["control"] | {"every": until + batch_tokens}}
    raw = stored | {section: stored.get(section, {}) | change for section, change in changed.items()}
    try:
        config = RunConfiguration.model_validate(raw | {"growth": [candidate.entry_at(tokens, end)]})
        segments(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"candidate {candidate.text!r}: {key + ': ' if key else ''}{message}") from None
    except ValueError as error:
        raise ValueError(f"candidate {candidate.text!r}: {error}") from None
    return config


def _try(config: RunConfiguration, candidate: Candidate, train: dict[str, Any], steps: int, ranks: Ranks) -> Probe:
    """Train one candidate and read what became of it; its folder is removed. A collective."""
    with redirect_stdout(sys.stderr):
        outcome = run_chain(config, dump(config))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if outcome is Outcome.INTERRUPTED:
        raise SystemExit(INTERRUPTED)

    def read() -> Probe:
        folder = Path(config.run.dir) / config.run.name
        found = read_probe(folder, candidate.text, outcome, train["clock"]["tokens"], train["flops"], steps)
        shutil.rmtree(folder.parent, ignore_errors=True)
        return found

    return ranks.broadcast(read)


def read_probe(folder: Path, name: str, outcome: Outcome, tokens: int, flops: int, steps: int) -> Probe:
    """What the logs of a probe tell. tokens, flops: of the checkpoint it began from; steps: as many as it was to take.

    Losses are those of the held-out sets, averaged over the sets, at the growth and at the end; where there are none,
    of the first batch, and of the last fifth of the steps.
    """
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["segment"] == 1]
    grown = [row for row in read_rows(folder / "events.jsonl") if row["event"] == "growth"]
    end = rows[-1] if rows else {"tokens": tokens, "flops": flops}
    held_out = [row for row in read_rows(folder / "evaluations.jsonl") if row["segment"] == 1]
    if held_out:
        first, last = (_mean(_evaluated(held_out, at)) for at in (tokens, end["tokens"]))
    else:
        losses = [row["loss"] for row in rows]
        first, last = _mean(losses[:1]), _mean(losses[-max(1, steps // TAIL) :])
    finished = outcome in (Outcome.FINISHED, Outcome.UNSAVED) and bool(rows)
    return Probe(
        name=name,
        outcome=str(outcome),
        preserves=bool(grown and grown[0]["preserves"]),
        first=first,
        last=last if finished else None,
        tokens=end["tokens"] - tokens,
        flops=end["flops"] - flops,
    )


def _evaluated(rows: Sequence[Row], tokens: int) -> list[float]:
    """The losses of all sets at a time, not those of averaged weights."""
    return [row["loss"] for row in rows if row["tokens"] == tokens and not row["set"].endswith("-ema")]


def _mean(losses: Sequence[float]) -> float | None:
    """None for no losses, and where one is not finite."""
    return math.fsum(losses) / len(losses) if losses and all(map(math.isfinite, losses)) else None


def ranking(probes: Sequence[Probe]) -> list[Probe]:
    """The best first: by the loss after the steps; those that have none come last."""
    return sorted(probes, key=lambda each: math.inf if each.last is None else each.last)


def table(ranked: Sequence[Probe], steps: int, *, held_out: bool) -> str:
    """The candidates in their order as text."""
    what = "held-out loss" if held_out else "training loss"
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    grid.add_column("candidate", overflow="fold")
    for header in ("keeps the logits", "loss at 0", f"after {steps:,}", "FLOPs"):
        grid.add_column(header, justify="right", no_wrap=True)
    for each in ranked:
        first = "" if each.first is None else f"{each.first:.4f}"
        last = each.outcome if each.last is None else f"{each.last:.4f}"
        grid.add_row(each.name, "yes" if each.preserves else "no", first, last, f"{each.flops:.4g}")
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(grid)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    notes = [f"by {what}, from the best"]
    costs = [each.flops for each in ranked if each.last is not None]
    if costs and max(costs) > 1.01 * min(costs):
        notes.append("compared at equal tokens: the candidates' FLOPs are not equal")
    return "\n".join([*lines, "", *notes])


def _own_settings(entry: GrowthConfig) -> str:
    """The sections that a candidate was tried with, for the preset of the run that begins from what was written."""
    changed = {section: each for section, each in entry.section_changes().items() if each}
    return f"\n\n{tomli_w.dumps(changed).rstrip()}" if changed else ""


@contextmanager
def _workspace(given: str | None, ranks: Ranks) -> Iterator[str]:
    """A folder for the probes' runs, removed at the end; a collective."""

    def make() -> str:
        try:
            return tempfile.mkdtemp(prefix="probes-", dir=given)
        except OSError as error:
            raise ValueError(f"--workspace {given}: {error.strerror or error}") from None

    folder = ranks.broadcast(make)
    try:
        yield folder
    finally:
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
