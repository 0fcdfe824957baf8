"""From a table of runs to all that a report says: which rows, which laws, how they tell held-out runs, decisions."""

import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pandas as pd

from scaling import decisions, frontier
from scaling.candidates import SIZES
from scaling.cells import AXES, cells_of, levels
from scaling.columns import DIVERGED
from scaling.fitting import fit
from scaling.gates import select
from scaling.growth_optima import LEAST_TIMES, growth_optima
from scaling.inputs import compute
from scaling.laws import find
from scaling.laws.law import Law
from scaling.laws.timescale import TIMESCALE
from scaling.loss_laws import LossLaws, fit_losses, fit_rows
from scaling.optimum_laws import find_optima
from scaling.results import Analysis, Fit, Verdict
from scaling.table import RunTable

ON_ROWS = ("critical_batch", TIMESCALE.quantity)
"""Quantities that each run has a measurement of, in a column of that name."""
GROWTH = "growth_tokens"
"""Of which runs that grew at different times tell one measurement together."""
Progress = Callable[[str], None]


def analyse(
    table: RunTable,
    *,
    laws: Sequence[str] = (),
    targets: Sequence[Mapping[str, float]] = (),
    size: str | None = None,
    loss_kind: str | None = None,
    pool: Sequence[str] = (),
    replicates: int = 1000,
    seed: int = 0,
    far: bool = False,
    provenance: Mapping[str, Any] = {},
    progress: Progress = lambda step: None,
) -> Analysis:
    """All that can be told of a table of runs.

    `laws`: names or products of powers that are asked for; without any of a quantity, all that the table has the
    columns for are tried and the best is chosen. `targets`: as of `decisions.decide`. `size`: the column that N means;
    by default the one that tells held-out runs better. `pool`: columns whose rows are fitted together although they
    differ. ValueError for what a user can put right: a law or column that is not there, a target that says too little,
    a table without a run to fit.
    """
    for target in targets:
        decisions.check(target)
    asked = [find(each) for each in laws]
    progress("quality gates")
    needs_loss = not asked or any(_needs_loss(law) for law in asked)
    used, gates = select(table, loss_kind=loss_kind, pool=tuple(pool), needs_loss=needs_loss)
    if not used.any():
        reasons = "; ".join(each.message for each in gates if each.level != "ok")
        raise ValueError(f"none of the {len(table)} runs can be fitted: {reasons or 'no finished run has a loss'}")
    sizes = _sizes(table.where(used), size)
    best, losses = used.copy(), LossLaws()
    if table.has("loss"):
        best[used] = best_of_cells(table.where(used), sizes[0])
        progress("laws of loss")
        losses = fit_losses(table, best, asked, sizes, replicates, seed)
    chosen = losses.fits[0].size if losses.fits else sizes[0]
    progress("optima of learning rate and batch")
    optima = find_optima(_with_diverged(table, used), chosen, asked, replicates, seed)
    progress("decisions")
    runs = table.where(used)
    measured = [_measured(runs, law, sizes, replicates, seed) for law in asked if law.quantity in ON_ROWS]
    measured += [_growth(table, used, law, chosen, replicates, seed) for law in asked if law.quantity == GROWTH]
    fits = (*losses.fits, *optima.fits, *measured)
    shared = constants(runs)
    options = {
        "laws": list(laws), "targets": [dict(each) for each in targets], "size": size, "loss_kind": loss_kind,
        "pool": list(pool), "replicates": replicates, "seed": seed, "far": far,
    }  # fmt: skip
    return Analysis(
        table=table,
        used=used,
        gates=(*gates, *_batches(runs), *losses.verdicts, *optima.verdicts),
        fits=fits,
        held_out=(*losses.held_out, *optima.held_out),
        bowls=optima.bowls,
        decisions=tuple(
            decisions.decide(each, fits, optima.bowls, constants=shared, far=far, seed=seed) for each in targets
        ),
        frontier=_frontier(table.where(best), losses.fits, replicates, seed),
        provenance={**provenance, "options": options, "versions": versions(), "fingerprint": table.fingerprint},
        fitted=() if (best == used).all() else tuple(int(each) for each in np.flatnonzero(best)),
    )


def _needs_loss(law: Law) -> bool:
    """Whether a law cannot be fitted without losses. Laws of lr and batch are of the best runs where there are losses,
    and where there are none each row is an optimum."""
    return "loss" in law.inputs or law.quantity not in (*ON_ROWS, *AXES)


def _measured(runs: RunTable, law: Law, sizes: Sequence[str], replicates: int, seed: int) -> Fit:
    """A law of a quantity that each run has a measurement of: of a timescale that was swept the best runs'."""
    if law.quantity == TIMESCALE.quantity and runs.has("loss"):
        runs = runs.where(best_of_cells(runs, sizes[0], (TIMESCALE.quantity,)))
    return fit_rows(runs, law, sizes, replicates, seed)


def _growth(table: RunTable, used: np.ndarray, law: Law, size: str, replicates: int, seed: int) -> Fit:
    """A law of when to grow, through the best times of the runs that grew. ValueError where they tell too few."""
    x, best = growth_optima(table, used, size)
    if len(best) < len(law.parameters):
        raise ValueError(
            f"law {law.name} needs the best growth times of {len(law.parameters)} sizes or budgets, each from "
            f"{LEAST_TIMES} runs that grew at different times; these runs tell {len(best)}"
        )
    return fit(law, x, best, size=size, replicates=replicates, seed=seed)


def _sizes(runs: RunTable, size: str | None) -> tuple[str, ...]:
    """The columns that N may mean. ValueError for one that is asked for and not known."""
    known = tuple(name for name in SIZES if runs.has(name))
    if size is None:
        return known or ("total",)
    if size not in known:
        raise ValueError(f"size {size!r} is not known of these runs; known: {', '.join(known) or 'none'}")
    return (size,)


def _batches(runs: RunTable) -> list[Verdict]:
    """A warning where batches vary in sequences of unknown length: they cannot be told from one another then."""
    if runs.has("batch_tokens") or not runs.has("batch_sequences") or len(set(runs.numbers("batch_sequences"))) < 2:
        return []
    message = "batches are in sequences of unknown length, so that runs of different batches are mixed; give seq_len"
    return [Verdict("warning", "batch_unknown", message)]


def _with_diverged(table: RunTable, used: np.ndarray) -> RunTable:
    """The used rows, and those that diverged, which bound the stable rates."""
    if not table.has("status"):
        return table.where(used)
    return table.where(used | (table.frame["status"] == DIVERGED).to_numpy())


def best_of_cells(runs: RunTable, size: str, settings: Sequence[str] = AXES) -> np.ndarray:
    """The runs that loss laws are fitted to, (rows,) of bool: of a cell in which `settings` vary the best one, as a
    law of loss is of tuned runs; of any other cell all, as they are repetitions."""
    tuned = [levels(runs.numbers(name)) for name in settings if runs.has(name)]
    kept, loss = np.ones(len(runs), dtype=bool), runs.numbers("loss")
    for rows in cells_of(runs, size, tuned=True):
        if any(len(set(each[rows])) > 1 for each in tuned):
            kept[rows] = False
            kept[rows[np.argmin(loss[rows])]] = True
    return kept


def constants(runs: RunTable) -> dict[str, float]:
    """The numbers that all runs have equal, by column: they hold for a target too."""
    found = {}
    for name in runs.frame.columns:
        if name in ("seed", "loss", "loss_error", "tokens", "flops", *SIZES) or not runs.has(name):
            continue
        values = pd.to_numeric(runs.frame[name], errors="coerce").to_numpy(dtype=float, na_value=np.nan)
        if np.isfinite(values).all() and values.min() == values.max():
            found[name] = float(values[0])
    return found


def _frontier(runs: RunTable, losses: Sequence[Fit], replicates: int, seed: int) -> dict[str, Any]:
    """The compute-optimal N and D by all approaches that these runs allow, as JSON."""
    size = losses[0].size if losses else next((name for name in SIZES if runs.has(name)), None)
    found = {"law": frontier.of_law(losses[0]) if losses else None}
    if size is not None and runs.has("tokens") and runs.has("loss"):
        columns = [compute(runs, size), runs.numbers(size), runs.numbers("tokens"), runs.numbers("loss")]
        known = np.all([np.isfinite(each) & (each > 0) for each in columns], axis=0)
        columns = [each[known] for each in columns]
        if known.sum() > 2:
            found["isoflop"] = frontier.isoflop(*columns, replicates=replicates, seed=seed)
            found["envelope"] = frontier.envelope(*columns, replicates=min(replicates, 200), seed=seed)
    return {name: each.as_json() for name, each in found.items() if each is not None}


def versions() -> dict[str, str]:
    """Of what the numbers rest on."""
    found = {"python": platform.python_version()}
    for name in ("meristem", "numpy", "scipy", "pandas"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
