"""A plan as a table for the terminal, and as a configuration that says where its numbers are from."""

import io
import math
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from rich.console import Console
from rich.table import Table

from launch.auto import Laws, describe
from launch.config import validated
from launch.growth_config import RunConfiguration
from launch.next_runs import NextRun
from launch.planning import Plan
from runtime.model.counts import count, flops_per_token
from runtime.observe.run_directory import write_atomically
from scaling.design.proposals import LEAST_GAIN
from scaling.results import Estimate

DAY = 86400.0
DESIGN_REGRET = "(of a decision by the bowls of all runs at once; that of the laws' decision is told without --next)"
NAMES = {
    "N": "parameters",
    "D": "tokens",
    "batch_tokens": "batch, tokens",
    "lr": "learning rate",
    "timescale": "timescale of weight decay",
    "weight_decay": "weight decay",
    "loss": "loss",
}


def table(plan: Plan, laws: Laws, throughput: float | None = None) -> str:
    """The decision, the run, and what is to be known of both, as text."""
    grid = Table(box=None, pad_edge=False, header_style="")
    for heading, justify in (("", "left"), ("proposed", "right"), ("95 % interval", "right"), ("plateau", "right")):
        grid.add_column(heading, justify=justify)
    for name, estimate in _proposed(plan):
        flat = plan.decision.plateau.get(name)
        label = f"{NAMES[name]} ({plan.size})" if name == "N" else NAMES[name]
        grid.add_row(
            label, f"{estimate.value:.4g}", _interval(estimate), f"{flat.low:.4g} to {flat.high:.4g}" if flat else ""
        )
    lines = ["", *_costs(plan)]
    if plan.config is not None:
        lines += ["", *_run(plan, throughput)]
    elif throughput is not None:
        lines.append(_days(plan.decision.proposal["D"].value, throughput))
    lines += _warnings(plan)
    return "\n".join([f"By {laws.name}\n", _text(grid), *lines])


def write(plan: Plan, laws: Laws, folder: Path) -> Path:
    """Write the configuration of a plan into a folder, under its name. ValueError if there is another of that name, or
    it cannot be written."""
    return _write_all([_file(folder, plan.config, plan.raw, _comments(plan, laws))])[0]


def write_next(runs: Sequence[NextRun], laws: Laws, folder: Path) -> list[Path]:
    """The same for each of the next runs; all of them or none."""
    return _write_all([_file(folder, run.config, run.raw, _next_comments(run, laws)) for run in runs])


def next_table(runs: Sequence[NextRun], laws: Laws, budget: float) -> str:
    """The next runs in the order of choice, as text."""
    if not runs:
        return (
            f"By {laws.name}: no run of at most {budget:.4g} FLOPs is worth its cost: together they would lower the "
            f"design regret at the target by less than {LEAST_GAIN:.0%} of it, or none is affordable"
        )
    grid = Table(box=None, pad_edge=False, header_style="")
    for heading in ("", "parameters", "tokens", "lr", "batch, tokens", "FLOPs", "design regret after"):
        grid.add_column(heading, justify="right")
    for number, each in enumerate(runs, 1):
        run = each.proposal
        numbers = (f"{value:.4g}" for value in (run.N, run.D, run.lr, run.batch_tokens, run.flops))
        grid.add_row(f"{number}", *numbers, f"{run.regret_after:.3%}")
    spent = math.fsum(each.proposal.flops for each in runs)
    below = f"{spent:.4g} of {budget:.4g} FLOPs; design regret at the target now {runs[0].proposal.regret_before:.3%}"
    notes = "".join(f"\nwarning: {each}" for each in dict.fromkeys(note for run in runs for note in run.notes))
    return f"By {laws.name}\n\n{_text(grid)}\n{below}\n{DESIGN_REGRET}{notes}"


def _text(grid: Table) -> str:
    console = Console(file=io.StringIO(), width=110, color_system=None)
    console.print(grid)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _file(folder: Path, config: RunConfiguration, raw: dict[str, Any], comments: Iterable[str]) -> tuple[Path, str]:
    """Path and text of a configuration, which is read back as it was made."""
    lines = ("".join(letter if letter.isprintable() else "?" for letter in line) for line in comments)
    path = folder / f"{config.run.name}.toml"
    text = "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n" + tomli_w.dumps(raw)
    assert validated(tomllib.loads(text), (), path) == config
    return path, text


def _write_all(files: Sequence[tuple[Path, str]]) -> list[Path]:
    """Write what is not there yet. ValueError, before any is written, where something else is there."""
    for path, text in files:
        try:
            there = path.read_text(encoding="utf-8") if path.exists() else text
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None
        if there != text:
            raise ValueError(f"{path} is there, and is another plan; move it away, or give another --out")
    for path, text in files:
        try:
            write_atomically(path, text)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from None
    return [path for path, _ in files]


def _next_comments(run: NextRun, laws: Laws) -> list[str]:
    each = run.proposal
    return [
        f"Planned by launch/plan.py --next from {laws.name}: run {run.number} of {run.count}.",
        f"N = {each.N:.4g} ({run.size}), D = {each.D:.4g}, lr = {each.lr:.4g}, batch = {each.batch_tokens:.4g} tokens.",
        f"The design regret at the target falls from {each.regret_before:.4%} to {each.regret_after:.4%}.",
        *(f"warning: {note}" for note in run.notes),
    ]


def _proposed(plan: Plan) -> Iterator[tuple[str, Estimate]]:
    for name in NAMES:
        if name in plan.decision.proposal:
            yield name, plan.decision.proposal[name]


def _interval(estimate: Estimate) -> str:
    if estimate.low == estimate.high:
        return "given"
    return f"{estimate.low:.4g} to {estimate.high:.4g}" if math.isfinite(estimate.high) else "not known"


def _costs(plan: Plan) -> list[str]:
    """Of what is not known, and of how far it is extrapolated."""
    decision = plan.decision
    n, d = (decision.proposal[name].value for name in "ND")
    lines = [f"{d / n:.3g} tokens for each parameter"]
    if decision.plateau:
        lines.append(
            f"anywhere on a plateau the loss is at most {next(iter(decision.plateau.values())).cost:.1%} higher"
        )
    if math.isfinite(decision.regret):
        lines.append(f"expected excess of the loss for what the laws leave open of the optimum: {decision.regret:.3%}")
    if math.isfinite(decision.extrapolation):
        lines.append(f"{decision.extrapolation:.3g} times the largest compute that the laws were fitted to")
    return lines


def _run(plan: Plan, throughput: float | None) -> list[str]:
    """The shape, the batch and the cost of the run that is planned."""
    config = plan.config
    model, seq_len, horizon = config.model, config.data.seq_len, config.schedule.horizon
    counts = count(model)
    lines = [
        f"{config.run.name}: {model.num_layers} layers, hidden {model.hidden_size}, intermediate "
        f"{model.intermediate_size}, {model.num_heads} heads of {model.head_dim}, {model.num_kv_heads} key-value heads",
        f"  {counts.total:,} parameters, {counts.non_embedding:,} without embeddings; {horizon:,} tokens, "
        f"{flops_per_token(model, seq_len) * horizon:.4g} FLOPs",
        f"  lr {config.optim.lr:g}, weight decay {config.optim.weight_decay:g}, batches of "
        f"{config.batch.sequences:,} sequences of {seq_len:,}, "
        f"{horizon // (config.batch.sequences * seq_len):,} steps",
    ]
    if plan.memory is not None:
        lines.append(
            f"  {plan.memory / 2**30:.1f} GiB a device: micro-batches of {config.batch.micro_sequences}, recomputation "
            f"{config.parallel.recompute}, tensor parallel {config.parallel.tensor}"
        )
    if throughput is not None:
        lines.append(f"  {_days(horizon, throughput)}")
    return lines


def _days(tokens: float, throughput: float) -> str:
    return f"{tokens / throughput / DAY:.3g} days at {throughput:,.0f} tokens/s"


def _comments(plan: Plan, laws: Laws) -> list[str]:
    """What the file says of its numbers; fit for comments of TOML."""
    asked = ", ".join(f"{name} = {value:.4g}" for name, value in plan.decision.target.items())
    lines = [f"Planned by launch/plan.py for {asked}, from {laws.name}."]
    for quantity, fit in plan.fits.items():
        told = describe(fit)
        constants = ", ".join(f"{name} = {value:.4g}" for name, value in told["constants"].items())
        lines += [f"{quantity}: {told['formula']}", f"  {constants}; N is {told['size']}; {told['publication']}"]
    for name, estimate in _proposed(plan):
        flat = plan.decision.plateau.get(name)
        plateau = f"; plateau {flat.low:.4g} to {flat.high:.4g}" if flat else ""
        lines.append(f"{NAMES[name]}: {estimate.value:.4g}, 95 % interval {_interval(estimate)}{plateau}")
    return lines + _warnings(plan)


def _warnings(plan: Plan) -> list[str]:
    """Of the decision, and of the laws that it is by."""
    said = [each.message for each in plan.decision.verdicts if each.level != "ok"]
    said += [
        f"law of {quantity} ({fit.law}): {each.message}"
        for quantity, fit in plan.fits.items()
        for each in fit.verdicts
        if each.level != "ok"
    ]
    return [f"warning: {each}" for each in said]
