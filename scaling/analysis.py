"""From a table of runs to all that a report says: which rows, which laws, how well they tell held-out runs, decisions."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pandas as pd

from scaling import decisions, frontier, selection
from scaling.fitting import fit
from scaling.gates import select
from scaling.inputs import compute, of_rows
from scaling.laws import LAWS, find
from scaling.laws.law import Law
from scaling.laws.nesting import IDLE
from scaling.laws.powers import PowerLaw
from scaling.optima.bowls import bowl
from scaling.optima.cells import cells, levels
from scaling.optima.fitting import fit_optima
from scaling.results import Analysis, Bowl, Fit, HeldOut, Verdict
from scaling.table import RunTable, column_of

SIZES = ("non_embedding", "total", "active")
SETTINGS = ("lr", "batch_tokens")
APART = (
    "tokens", "unique_tokens", "streams", "recurrences", "once", "recurrent", "parent_tokens", "loss_kind", "data",
    "tokenizer",
)  # fmt: skip
"""What a loss law may depend on beside the size: runs that have it equal and differ in lr or batch are one cell."""
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
    differ. ValueError for what a user can put right, before anything is fitted: a law or column that is not there, a
    target that says too little, a table without a run to fit.
    """
    for target in targets:
        decisions.check(target)
    asked = [find(each) for each in laws]
    progress("quality gates")
    used, gates = select(table, loss_kind=loss_kind, pool=tuple(pool))
    if not used.any():
        reasons = "; ".join(each.message for each in gates if each.level != "ok")
        raise ValueError(f"none of the {len(table)} runs can be fitted: {reasons or 'no finished run has a loss'}")
    options = {"laws": list(laws), "targets": [dict(each) for each in targets], "size": size, "loss_kind": loss_kind,
               "pool": list(pool), "replicates": replicates, "seed": seed, "far": far}  # fmt: skip
    runs = table.where(used)
    sizes = _sizes(runs, size)
    best = best_of_cells(runs, sizes[0])
    losses, held_out, said = _losses(runs.where(best), sizes, asked, replicates, seed, progress)
    chosen = losses[0].size if losses else sizes[0]
    bowls, optima, of_optima = _optima(table, used, chosen, asked, replicates, seed, progress)
    others = _others(runs, chosen, asked, replicates, seed)
    fits = (*losses, *optima, *others)
    gates = (*gates, *said, *of_optima)
    progress("decisions")
    shared = constants(runs)
    decided = tuple(decisions.decide(each, fits, bowls, constants=shared, far=far) for each in targets)
    return Analysis(
        table=table,
        used=used,
        gates=gates,
        fits=fits,
        held_out=held_out,
        bowls=bowls,
        decisions=decided,
        frontier=_frontier(runs.where(best), losses, replicates, seed),
        provenance={**provenance, "options": options, "versions": versions(), "fingerprint": table.fingerprint},
        fitted=() if best.all() else tuple(int(each) for each in np.flatnonzero(used)[best]),
    )


def _sizes(runs: RunTable, size: str | None) -> tuple[str, ...]:
    """The columns that N may mean. ValueError for one that is asked for and not known."""
    known = tuple(name for name in SIZES if runs.has(name))
    if size is not None:
        if size not in known:
            raise ValueError(f"size {size!r} is not known of these runs; known: {', '.join(known) or 'none'}")
        return (size,)
    whole = [name for name in known if np.isfinite(runs.numbers(name)).all()] or list(known[:1])
    different = [name for place, name in enumerate(whole) if not _same(runs, name, whole[:place])]
    return tuple(different) or ("total",)


def _same(runs: RunTable, name: str, others: Sequence[str]) -> bool:
    return any(np.allclose(runs.numbers(name), runs.numbers(other), rtol=1e-6) for other in others)


def best_of_cells(runs: RunTable, size: str) -> np.ndarray:
    """The runs that loss laws are fitted to, (rows,) of bool: of a cell in which lr or batch vary the best one, as a
    law of loss is of tuned runs; of any other cell all, as they are repetitions."""
    names = [name for name in (size, *APART) if runs.has(name)]
    numbers = {name: levels(runs.numbers(name)) for name in names if name not in ("loss_kind", "data", "tokenizer")}
    texts = {name: pd.factorize(runs.frame[name])[0] for name in names if name not in numbers}
    settings = [levels(runs.numbers(name)) for name in SETTINGS if runs.has(name)]
    kept, loss = np.ones(len(runs), dtype=bool), runs.numbers("loss")
    for rows in pd.DataFrame(numbers | texts).groupby(names).indices.values() if names else ():
        if any(len(set(each[rows])) > 1 for each in settings):
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


def clusters_of(runs: RunTable) -> np.ndarray:
    """A number for each row, equal for rows of one run and of runs that continue one parent, (rows,)."""
    names = [f"row {place}" for place in range(len(runs))]
    for column in ("run", "parent"):
        if runs.has(column):
            told = runs.frame[column]
            names = [name if pd.isna(each) else str(each) for name, each in zip(names, told, strict=True)]
    return pd.factorize(np.array(names, dtype=object))[0]


def versions() -> dict[str, str]:
    """Of what the numbers rest on."""
    found = {"python": platform.python_version()}
    for name in ("meristem", "numpy", "scipy", "pandas"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
