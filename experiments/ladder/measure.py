"""What the ladder measured, as numbers: rungs, the law, its proposal, and the regret at the held-out cell."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.analysis import compare
from experiments.arms import Results
from experiments.contest import SEEDS
from experiments.ladder.cells import Cell, held_out, rungs
from experiments.ladder.grid import Point, Search
from experiments.ladder.law import OURS, Proposal, analysed
from experiments.ladder.plan import SWEPT, standing
from experiments.reporting import Numbers, common
from runtime.model.config import ModelConfig
from runtime.model.counts import count
from scaling.optima import find_bowls
from scaling.readers import read
from scaling.results import Analysis, Bowl, Estimate, Fit, Verdict

WINDOWS = (0.02, 0.05)
"""Excess loss within which a bowl of the held-out cell is looked for: that of fits, and a wider one where the factors
of two of a grid leave too few runs in it."""


def measure(size: str, results: Results) -> Numbers | None:
    """Everything of one size; None while no arm has finished."""
    numbers = common(size, results)
    if numbers is None:
        return None
    now = standing(size, results)
    found = analysed(now.folders) if now.folders else "not all rungs have ended"
    bowls = () if isinstance(found, str) else found.bowls
    cells = list(zip(rungs(size), now.rungs, strict=True))
    numbers["rungs"] = [rung(cell, sweep, results, bowls) for cell, sweep in cells]
    numbers["law"] = {"problem": found} if isinstance(found, str) else law(found)
    if now.held_out is None:
        return numbers
    cell, largest = held_out(size), cells[-1][0]
    swept = rung(cell, now.held_out, results, _own_bowls(cell, now.held_out, results))
    swept["times the largest"] = swept["flops"] / cell_numbers(largest)["flops"]
    numbers["held out"] = swept
    numbers["proposals"] = [proposal(each) for each in now.proposals]
    numbers["contenders"] = contenders(cell, now.contenders, results, swept["bowl"])
    numbers["prediction"] = prediction(now.proposals, numbers["contenders"])
    return numbers


def cell_numbers(cell: Cell) -> Numbers:
    config = cell.arm((1e-3, 1)).config
    counts = count(ModelConfig.model_validate(config["model"]))
    return {
        "label": cell.label,
        "width": config["model"]["hidden_size"],
        "layers": config["model"]["num_layers"],
        "non_embedding": counts.non_embedding,
        "total": counts.total,
        "tokens": cell.tokens,
        "flops": cell.arm((1e-3, 1)).flops,
        "seq_len": config["data"]["seq_len"],
    }


def rung(cell: Cell, sweep: Search, results: Results, bowls: Sequence[Bowl]) -> Numbers:
    """A cell with its losses by point, where the sweep stands, and its bowl."""
    numbers = cell_numbers(cell)
    losses = [(lr, batch, cell.loss(results, (lr, batch))) for lr, batch in sweep.wanted]
    numbers["losses"] = [[lr, batch, _finite(loss)] for lr, batch, loss in losses if loss is not None]
    numbers["best"], numbers["interior"] = list(sweep.best) if sweep.best else None, sweep.interior
    if sweep.best:
        numbers["loss"] = cell.loss(results, sweep.best)
    numbers["bowl"] = next((bowl(each) for each in bowls if _is_of(each, numbers)), None)
    return numbers


def _is_of(found: Bowl, numbers: Numbers) -> bool:
    known = [name for name in ("non_embedding", "total") if name in found.cell]
    same = all(math.isclose(found.cell[name], numbers[name], rel_tol=1e-3) for name in known)
    return same and math.isclose(found.cell["tokens"], numbers["tokens"], rel_tol=0.02)


def _own_bowls(cell: Cell, sweep: Search, results: Results) -> Sequence[Bowl]:
    """Of the held-out cell's sweep, within the first window in which it has one with a vertex."""
    names = [cell.arm(point).name for point in sweep.wanted]
    ended = [results[name].folder for name in names if name in results and results[name].outcome != "failed"]
    found: Sequence[Bowl] = ()
    for window in WINDOWS if ended else ():
        found = find_bowls(read(ended), "non_embedding", window=window)
        if any(each.curvature for each in found):
            break
    return found


def bowl(found: Bowl) -> Numbers:
    """The vertex, or where it is none what bounds the optimum."""
    return {
        "lr": estimate(found.lr),
        "batch_tokens": estimate(found.batch_tokens),
        "loss": found.loss,
        "curvature": [_finite(each) for each in found.curvature],
        "window": found.window,
        "censored": dict(found.censored),
        "note": found.note,
    }


def law(found: Analysis) -> Numbers:
    """The fits of loss, learning rate and batch, what was said of each, and of the table."""
    return {
        "rows": int(found.used.sum()),
        "gates": [verdict(each) for each in found.gates if each.level != "ok"],
        "fits": [fit(each) for each in found.fits if each.quantity in ("loss", "lr", "batch_tokens")],
    }


def fit(found: Fit) -> Numbers:
    return {
        "quantity": found.quantity,
        "law": found.law,
        "size": found.size,
        "identified": found.identified,
        "parameters": {name: estimate(each) for name, each in found.parameters.items()},
        "fixed": dict(found.fixed),
        "noise": _finite(found.noise),
        "rows": found.rows,
        "verdicts": [verdict(each) for each in found.verdicts if each.level != "ok"],
    }


def proposal(found: Proposal) -> Numbers:
    numbers: Numbers = {"label": found.label, "point": list(found.point) if found.point else None, "note": found.note}
    if found.decision is not None:
        numbers["told"] = {name: estimate(each) for name, each in found.decision.proposal.items()}
        numbers["plateau"] = {name: [each.low, each.high] for name, each in found.decision.plateau.items()}
        numbers["expected regret"] = _finite(found.decision.regret)
        numbers["verdicts"] = [verdict(each) for each in found.decision.verdicts if each.level != "ok"]
    return numbers


def contenders(
    cell: Cell, points: Mapping[str, Point], results: Results, own: Mapping[str, Any] | None
) -> list[Numbers]:
    """Each with its losses by seed, and its regret against the swept optimum once both have two seeds: in nats, as a
    share of the loss, and as the share by which the held-out cell's bowl has it above its minimum."""
    rows = []
    for label, (lr, batch) in points.items():
        arms = {seed: cell.arm((lr, batch), seed) for seed in SEEDS}
        losses = {str(seed): results[arm.name].loss for seed, arm in arms.items() if arm.name in results}
        steps = arms[SEEDS[0]].config["schedule"]["horizon"] // (batch * arms[SEEDS[0]].config["data"]["seq_len"])
        rows.append({"label": label, "lr": lr, "batch": batch, "steps": steps, "losses": losses})
    swept = next((list(each["losses"].values()) for each in rows if each["label"] == SWEPT), [])
    for row in rows:
        own_losses = list(row["losses"].values())
        known = all(map(math.isfinite, own_losses)) and bool(own_losses)
        row["mean"] = math.fsum(own_losses) / len(own_losses) if known else None
        if known and row["label"] != SWEPT and min(len(own_losses), len(swept)) > 1 and all(map(math.isfinite, swept)):
            row["regret"] = vars(compare(own_losses, swept))
            row["share"] = row["regret"]["mean"] / (math.fsum(swept) / len(swept))
        row["by the bowl"] = above(own, row["lr"], row["batch"] * cell_numbers(cell)["seq_len"])
        row["losses"] = {seed: _finite(loss) for seed, loss in row["losses"].items()}
    return rows


def above(own: Mapping[str, Any] | None, lr: float, batch_tokens: float) -> float | None:
    """The share of the loss by which a bowl over both settings has a point above its minimum; None without a bowl."""
    if not own or len(own["curvature"]) != 3 or None in own["curvature"]:
        return None
    a, b, c = own["curvature"]
    off = np.log([lr / own["lr"]["value"], batch_tokens / own["batch_tokens"]["value"]])
    return float(np.expm1(off @ np.array([[a, b], [b, c]]) @ off / 2))


def prediction(proposals: Sequence[Proposal], rows: Sequence[Mapping[str, Any]]) -> Numbers | None:
    """The loss that our law predicts at its proposal, beside what was measured there; None while either is missing."""
    ours = next((each for each in proposals if each.label == OURS and each.decision is not None), None)
    measured = next((each["mean"] for each in rows if each["label"] == OURS), None)
    if ours is None or measured is None or "loss" not in ours.decision.proposal:
        return None
    told = ours.decision.proposal["loss"]
    return {
        **estimate(told),
        "measured": measured,
        "error": told.value / measured - 1,
        "inside": told.low <= measured <= told.high,
    }


def estimate(found: Estimate | None) -> Numbers | None:
    if found is None:
        return None
    return {"value": found.value, "low": found.low, "high": _finite(found.high)}


def verdict(found: Verdict) -> Numbers:
    return {"level": found.level, "code": found.code, "message": found.message}


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
