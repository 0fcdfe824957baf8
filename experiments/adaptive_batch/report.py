"""The report: final loss at equal tokens and the steps it took, and loss over tokens and over steps."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.adaptive_batch import plan
from experiments.arms import Result, Results
from experiments.contest import Contender, duel, standing
from experiments.reporting import (
    COLORS,
    Numbers,
    common,
    draw_rates,
    duels,
    figure,
    interval,
    page,
    power,
    publish,
    standings,
    table,
)  # fmt: skip

FOLDER = Path(__file__).parent
CLAIMS = (
    ("small", "large"),
    *((f"noise scale, {coupling}", "noise scale, none") for coupling in plan.COUPLINGS if coupling != "none"),
    *((f"ramp, {coupling}", "ramp, none") for coupling in plan.COUPLINGS if coupling != "none"),
    ("noise scale, sqrt", "ramp, sqrt"),
    ("noise scale, sqrt", "large"),
    ("seesaw of the cosine", "small, cosine"),
)
DRAWN = ("small", "large", "ramp, sqrt", "noise scale, sqrt", "norm test, sqrt", "seesaw of the cosine")


def report(size: str, results: Results) -> None:
    """Write the report of one size and say where it is; nothing while no arm has finished."""
    numbers = measure(size, results)
    if numbers is None:
        return
    sides = list(numbers["contenders"].values())

    def text(pictures: list[str]) -> str:
        shown = [line for each in pictures for line in (f"![]({each})", "")]
        sections = [_costs(numbers), standings("Every side", sides, "small"), power(sides), duels(numbers["claims"])]
        return page("Batches that grow", "adaptive_batch", numbers, *sections, shown)

    figures = {"curves": _curves(size, results), "rates": draw_rates(sides)}
    publish(FOLDER / "results" / size, numbers, text, figures)


def measure(size: str, results: Results) -> Numbers | None:
    numbers = common(size, results)
    if numbers is None:
        return None
    sides = plan.contenders(size)
    numbers["contenders"] = {
        label: standing(each, results, sides["small"] if label != "small" else None) | _batches(each, results)
        for label, each in sides.items()
    }
    numbers["claims"] = [duel(sides[first], sides[second], results) for first, second in CLAIMS]
    return numbers


def _batches(side: Contender, results: Results) -> Numbers:
    """Steps, and the last batch in tokens, of each seed."""
    rows = [results[arm.name].metrics[-1] for arm in side.runs(results).values()]
    return {"steps": [row["step"] for row in rows], "last batch": [row["batch_tokens"] for row in rows]} if rows else {}


def _costs(numbers: Numbers) -> list[str]:
    known = {label: each for label, each in numbers["contenders"].items() if each.get("steps")}
    if not known:
        return []
    first = known.get("small", next(iter(known.values())))
    steps = math.fsum(first["steps"]) / len(first["steps"])
    rows = []
    for label, each in known.items():
        mean = math.fsum(each["steps"]) / len(each["steps"])
        gain = interval(each["gain"]) if "gain" in each else ""
        last = ", ".join(f"{batch:,}" for batch in sorted(set(each["last batch"])))
        rows.append([label, f"{mean:,.0f}", f"{mean / steps:.2f}", last, f"{each['mean']:.4f}", gain])
    header = ["", "steps", "of the small batch's", "last batch, tokens", "final loss", "gain over small, 95 % interval"]
    return ["## Loss and steps at equal tokens", "", *table(header, rows)]


def _curves(size: str, results: Results) -> Figure | None:
    """Held-out loss over tokens and over steps, means over seeds."""
    sides = plan.contenders(size)
    made, axes = figure(2)
    for label, color in zip(DRAWN, COLORS, strict=False):
        runs = [results[arm.name] for arm in sides[label].runs(results).values()]
        if not runs:
            continue
        tokens = [row["tokens"] for row in runs[0].evaluations if row["tokens"]]
        losses = np.mean([_at(run, tokens) for run in runs], axis=0)
        steps = np.mean([np.interp(tokens, *_columns(run)) for run in runs], axis=0)
        axes[0].plot(tokens, losses, "o-", color=color, label=label, markersize=3)
        axes[1].plot(steps, losses, "o-", color=color, markersize=3)
    if not axes[0].lines:
        return None
    axes[0].set_xlabel("tokens")
    axes[1].set_xlabel("steps")
    axes[1].set_xscale("log")
    axes[0].set_ylabel("held-out loss")
    axes[0].legend(frameon=False, fontsize=8)
    return made


def _at(run: Result, tokens: list[int]) -> np.ndarray:
    rows = [row for row in run.evaluations if row["tokens"]]
    return np.interp(tokens, [row["tokens"] for row in rows], [row["loss"] for row in rows])


def _columns(run: Result) -> tuple[list[int], list[int]]:
    """Tokens and steps of the rows of a run."""
    return [row["tokens"] for row in run.metrics], [row["step"] for row in run.metrics]
