"""The next runs of a grid of learning rates and batches, each as a configuration."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from launch.auto import FileLaws, Laws, columns_of, round_batch, round_rate
from launch.growth_config import RunConfiguration
from launch.planning import (
    Machine,
    Preset,
    Target,
    Unidentified,
    checked,
    draft,
    first_held,
    held_by,
    short,
    sizes,
    told_by,
    whole_steps,
)
from launch.shapes import Family
from runtime.model.counts import count as counted
from scaling.columns import DIVERGED, RUNNING
from scaling.decisions import NOTHING, by_parameter, settle
from scaling.design import Proposal, next_runs, of_one_training
from scaling.proposal import reach

MOST_APART = 0.02
"""Of ln N: a shape further from the size that was asked for is another cell of the grid."""


@dataclass(frozen=True)
class NextRun:
    """A run that was chosen, and its configuration if there is a preset."""

    proposal: Proposal
    number: int
    count: int
    size: str
    """The count that N is."""
    raw: dict[str, Any] | None = None
    config: RunConfiguration | None = None
    notes: tuple[str, ...] = ()


def design(
    laws: Laws, target: Target, preset: Preset | None, machine: Machine, count: int, budget: float, far: bool = False
) -> list[NextRun]:
    """Up to `count` runs of at most `budget` FLOPs together that reduce the expected regret at the target most.

    Laws of learning rate and batch need not be identified: that is what the runs are for. ValueError for bad input,
    `Unidentified` where the compute is to be split by a loss law that is not identified, and, unless `far`, where the
    target is further from the data of these laws than is trusted.
    """
    if not isinstance(laws, FileLaws):
        raise ValueError(f"--next needs the runs that a laws file keeps, and {laws.name} is a publication")
    fits = told_by(laws, ["loss"] if target.splits else [])
    if preset is not None and "optim.weight_decay" in preset.auto:
        told_by(laws, ["timescale"])
    ordered = sorted(laws.fits, key=lambda fit: ("lr", "batch_tokens", "loss", fit.quantity).index(fit.quantity))
    known = ordered[0] if ordered else None
    size = known.size if known else "non_embedding"
    family = Family(preset.config.model, preset.config.parallel.tensor) if preset else None
    flops_of = family.flops_per_token(size, preset.config.data.seq_len) if family else by_parameter
    found = sizes(laws, target, flops_of).proposal
    compute = target.compute or found["D"].value * float(flops_of(np.array([found["N"].value]))[0])
    judged = reach([*fits.values(), *([known] if known and known.quantity not in fits else [])], compute)
    if not far and (beyond := next((each for each in judged if each.level == "failure"), None)):
        raise Unidentified(f"{beyond.message}; --far takes the law's word for it")
    warned = tuple(each.message for each in judged)
    table = laws.analysis.table
    status = table.frame["status"] if "status" in table.frame else np.full(len(table), None)
    rows = table.where(laws.analysis.used | np.isin(np.array(status, dtype=object), (DIVERGED, RUNNING)))
    alike = of_one_training(rows, size)
    if not alike.all():
        warned += (
            f"{int((~alike).sum())} of {len(rows)} runs are left out: they differ from the most of their N and D in "
            "weight decay, schedule or other settings",
        )
        rows = rows.where(alike)
    chosen = next_runs(rows, size, [(found["N"].value, found["D"].value)], count=count, budget_flops=budget)
    runs = [NextRun(each, number, len(chosen), size, notes=warned) for number, each in enumerate(chosen, 1)]
    return [_configured(run, laws, preset, machine) for run in runs] if preset else runs


def _configured(run: NextRun, laws: Laws, preset: Preset, machine: Machine) -> NextRun:
    """The run with its configuration. ValueError, naming the run, where the machine cannot hold it."""
    try:
        return first_held(preset, machine, partial(_shaped, run, laws, preset, machine))
    except ValueError as error:
        each = run.proposal
        raise ValueError(f"run {run.number} of {run.count} (N = {each.N:.4g}, D = {each.D:.4g}): {error}") from None


def _shaped(run: NextRun, laws: Laws, preset: Preset, machine: Machine, tensor: int) -> NextRun | None:
    """The nearest shape, and the batch that the mesh carries, with a tensor-parallel degree; None where the machine
    cannot hold it."""
    each, notes = run.proposal, list(run.notes)
    model = Family(preset.config.model, tensor).nearest(run.size, each.N)
    have = getattr(counted(model), run.size)
    if abs(np.log(have / each.N)) > MOST_APART:
        notes.append(f"the nearest shape of the preset's family has {have:,} {run.size} parameters")
    raw = draft(preset, model, each.D, tensor)
    sequences = round_batch(each.batch_tokens, checked(raw), machine.world_size)
    if not 2 / 3 < sequences * preset.config.data.seq_len / each.batch_tokens < 3 / 2:
        notes.append(f"the mesh carries batches of {sequences:,} sequences")
    raw["batch"]["sequences"], raw["optim"]["lr"] = sequences, round_rate(each.lr)
    raw["schedule"]["horizon"] = whole_steps(each.D, sequences * preset.config.data.seq_len)
    if "optim.weight_decay" in preset.auto:
        known = {name: value for name, value in columns_of(checked(raw)).items() if name != "weight_decay"}
        decided = settle(NOTHING, laws.fits, laws.bowls, known, far=True, quantities=["timescale"])
        preset.refuse_placeholders({"lr", "batch_tokens", *decided.proposal}, laws)
        raw["optim"]["weight_decay"] = round_rate(decided.proposal["weight_decay"].value)
    raw["run"]["name"] += f"-next-{run.number}-{short(have)}-{short(each.D)}"
    if (held := held_by(raw, machine)) is None:
        return None
    return replace(run, raw=held[0], config=checked(held[0]), notes=tuple(notes))
