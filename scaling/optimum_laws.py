"""The laws of the best learning rate and batch of a table, and of the largest stable rate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from scaling.cells import cells_of
from scaling.laws import LAWS
from scaling.laws.law import Law
from scaling.laws.powers import STABLE_LR
from scaling.loss_laws import fit_rows
from scaling.optima import find_bowls, fit_optima, fit_stability
from scaling.optima.cells import inputs
from scaling.optima.vertices import optima
from scaling.results import Bowl, Fit, HeldOut, Verdict
from scaling.table import RunTable

DEFAULTS = {
    "lr": ("step_law_lr", "deepseek_lr"),
    "batch_tokens": ("step_law_batch", "general_batch", "deepseek_batch"),
}
"""Laws that are tried where none is asked for; the one that is taken in a tie is first."""
LARGEST = 0.3
"""Share of the cells that are held out at the end of compute."""
MOST_APART = 4.0
"""Times the lowest, of optima of one cell that are told without losses, as several sweeps of it may find them."""
FEWEST = 4
"""Cells that a law of the optimum is tried on."""


@dataclass(frozen=True)
class OptimumLaws:
    fits: tuple[Fit, ...] = ()
    """The chosen one of lr first, then of batch_tokens, and the others; those of the largest stable rate last."""
    bowls: tuple[Bowl, ...] = ()
    held_out: tuple[HeldOut, ...] = ()
    verdicts: tuple[Verdict, ...] = ()


def find_optima(
    table: RunTable, size: str, asked: Sequence[Law], replicates: int, seed: int, checks: bool = True
) -> OptimumLaws:
    """Bowls and laws of these runs, the diverged ones among them. With `checks` the chosen laws are compared with those
    by other windows and methods. ValueError for a law that is asked for and whose columns are not there; what cannot be
    told otherwise is said in a verdict."""
    bowls: tuple[Bowl, ...] = ()
    if all(map(table.has, (size, "tokens", "loss"))) and (table.has("lr") or table.has("batch_tokens")):
        bowls = tuple(each for each in find_bowls(table, size) if each.lr or each.batch_tokens)
    fits: list[Fit] = []
    held_out: list[HeldOut] = []
    said: list[Verdict] = []
    for quantity in DEFAULTS:
        wanted = [law for law in asked if law.quantity == quantity]
        if wanted:
            fits += [_asked(table, law, size, bowls, replicates, seed) for law in wanted]
            continue
        found = [each for each in bowls if getattr(each, quantity) is not None]
        if len(found) < FEWEST:
            if found:
                said.append(_few(quantity, len(found)))
            continue
        ranked, measured = _ranked(found, quantity, size)
        held_out += measured
        fits += [
            fit_optima(table if checks and not place else bowls, name, size=size, replicates=replicates, seed=seed)
            for place, name in enumerate(ranked)
        ]
    stable, untold = _stable(table, size, asked, bool(bowls), seed)
    return OptimumLaws((*fits, *stable), bowls, tuple(held_out), (*said, *untold))


def _stable(
    table: RunTable, size: str, asked: Sequence[Law], is_swept: bool, seed: int
) -> tuple[list[Fit], list[Verdict]]:
    """The laws of the largest stable rate: those asked for, or of a sweep with diverged runs the default one; and why
    one has no fit. ValueError for a law that is asked for and whose columns are not there."""
    wanted = [law for law in asked if law.quantity == STABLE_LR.quantity]
    if wanted and not table.has("lr"):
        raise ValueError(f"law {wanted[0].name!r} needs lr, which these runs do not tell")
    if not wanted and not (is_swept and table.has("lr")):
        return [], []
    fits: list[Fit] = []
    said: list[Verdict] = []
    for law in wanted or [STABLE_LR]:
        try:
            found = fit_stability(table, size, law=law, seed=seed)
        except ValueError as error:
            if wanted:
                raise
            said.append(Verdict("ok", "no_candidate", f"{law.name} is not considered: {error}"))
            continue
        if found is not None:
            fits.append(found)
        elif wanted:
            message = f"the law {law.name}: of the runs that tell a rate none diverged, or all did"
            said.append(Verdict("warning", "no_fit", message))
    return fits, said


def _few(quantity: str, count: int) -> Verdict:
    message = f"{count} cells tell a best {quantity}; at least {FEWEST} are needed for a law of it"
    return Verdict("warning", "few_cells", message)


def _asked(table: RunTable, law: Law, size: str, bowls: Sequence[Bowl], replicates: int, seed: int) -> Fit:
    """A law that was asked for: of the optima of cells, or where no cell varies of the runs as they are, as in a table
    of tuned runs."""
    if any(getattr(each, law.quantity) is not None for each in bowls):
        return fit_optima(table, law, size=size, replicates=replicates, seed=seed)
    if table.has("loss"):
        message = f"{law.quantity} does not vary between runs that are otherwise equal: each is taken to be at its best"
        said = Verdict("warning", "taken_for_best", message)
    else:
        _check_optima(table, law, size)
        said = Verdict("ok", "taken_for_best", "the table has no losses: each row is taken for an optimum")
    found = fit_rows(table, law, (size,), replicates, seed)
    return replace(found, verdicts=(*found.verdicts, said))


def _check_optima(table: RunTable, law: Law, size: str) -> None:
    """ValueError where rows without losses are no optima: then they differ little within a cell."""
    if not table.has(law.quantity):
        return
    values = table.numbers(law.quantity)
    for rows in cells_of(table, size):
        low, high = np.nanmin(values[rows], initial=np.inf), np.nanmax(values[rows], initial=0.0)
        if high > MOST_APART * low:
            raise ValueError(
                f"law {law.name!r}: rows that are equal otherwise have {law.quantity} from {low:.4g} to {high:.4g}, "
                "and no loss says which is best; name its column with columns loss=NAME, or keep the best rows alone"
            )


def _ranked(bowls: Sequence[Bowl], quantity: str, size: str) -> tuple[list[str], list[HeldOut]]:
    """The default laws of a quantity by how they tell the cells of largest compute from the others: of those within
    one standard error of the best the one of fewest parameters, then the others."""
    known = optima(bowls, quantity)
    compute = np.array([each.cell["flops"] for each in known.bowls])
    test = known.known & (compute > np.quantile(compute, 1 - LARGEST))
    train = [each for each, is_tested in zip(known.bowls, compute > np.quantile(compute, 1 - LARGEST), strict=True)
             if not is_tested]  # fmt: skip
    measured = []
    for name in DEFAULTS[quantity]:
        law = LAWS[name]
        if test.sum() < 2 or len(train) <= len(law.parameters):
            continue
        found = fit_optima(train, law, size=size, replicates=2, checks=False)
        tested = [each for each, is_tested in zip(known.bowls, test, strict=True) if is_tested]
        predicted = found.predict(inputs(law, [each.cell for each in tested], size))
        measured.append(_measure(name, size, len(train), np.exp(known.low[test]), predicted))
    if not measured:
        return list(DEFAULTS[quantity])[:1], []
    best = min(measured, key=lambda each: each.error)
    close = [each for each in measured if each.error <= best.error + best.error_se]
    chosen = min(close, key=lambda each: (len(LAWS[each.law].parameters), each.error))
    rest = sorted((each for each in measured if each is not chosen), key=lambda each: each.error)
    return [chosen.law, *(each.law for each in rest)], [chosen, *rest]


def _measure(law: str, size: str, trained: int, measured: np.ndarray, predicted: np.ndarray) -> HeldOut:
    share = predicted / measured - 1
    error = np.abs(share)
    return HeldOut(
        law, size, "cells of largest compute", trained, len(share), float(error.mean()),
        float(error.std(ddof=1) / np.sqrt(len(error))), float(share.mean()), float("nan"),
        tuple(measured.tolist()), tuple(predicted.tolist()),
    )  # fmt: skip
