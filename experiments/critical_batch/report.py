"""The report: final loss by batch at each point, the critical batch that follows, and the noise scale there."""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.arms import Result, Results
from experiments.critical_batch import plan
from experiments.reporting import COLORS, Numbers, common, figure, page, publish, table

FOLDER = Path(__file__).parent


def report(size: str, results: Results) -> None:
    """Write the report of one size and say where it is; nothing while no arm has finished."""
    numbers = measure(size, results)
    if numbers is None:
        return

    def text(pictures: list[str]) -> str:
        shown = [line for each in pictures for line in (f"![]({each})", "")]
        return page("Noise scale and critical batch", "critical_batch", numbers, _section(numbers), shown)

    publish(FOLDER / "results" / size, numbers, text, {"branches": _branches(numbers), "batches": _batches(numbers)})


def measure(size: str, results: Results) -> Numbers | None:
    """At each point, by seed: losses by multiple, the critical batch, and the noise scale with its interval."""
    numbers = common(size, results)
    if numbers is None:
        return None
    rate, own = plan.leader(size).rate(results), plan.SIZES[size].config["batch"]["sequences"]
    numbers |= {"lr": rate, "sequences": own, "points": {}}
    if rate is None:
        return numbers
    losses: dict[tuple[float, int], dict[int, float]] = {}
    for share, multiple, seed, arm in plan.points(size, rate):
        if arm.name in results:
            losses.setdefault((share, seed), {})[multiple] = results[arm.name].loss
    for (share, seed), found in losses.items():
        if len(found) < len(plan.MULTIPLES):
            continue
        parent = results[plan.stable(size, rate, seed).name]
        at = plan.tokens_at(size, share)
        point = numbers["points"].setdefault(f"{share:g}", {"tokens": at, "seeds": {}})
        point["seeds"][str(seed)] = {
            "losses": {str(multiple): loss if math.isfinite(loss) else None for multiple, loss in found.items()},
            "critical batch": critical(found) * own,
            "best batch": min(found, key=found.__getitem__) * own,
            "noise scale": noise_scale(parent, at),
        }
    return numbers


def critical(losses: Mapping[int, float], tolerance: float = plan.TOLERANCE) -> float:
    """The multiple up to which the loss is no more than `tolerance` above the lowest of the smaller multiples: between
    the last that is and the first that is not, linear in the logarithm. The largest or smallest multiple is a bound."""
    multiples = sorted(losses)
    for last, each in pairwise(multiples):
        limit = min(losses[smaller] for smaller in multiples if smaller <= last) + tolerance
        if losses[each] > limit:
            if not math.isfinite(losses[each]):
                return float(last)
            share = (limit - losses[last]) / (losses[each] - losses[last])
            return float(last * (each / last) ** share)
    return float(multiples[-1])


def noise_scale(run: Result, tokens: int) -> dict[str, float | None]:
    """Of the logged row nearest to these tokens: the scale in sequences, and its interval."""
    rows = [row for row in run.metrics if "noise_scale" in row]
    if not rows:
        return {"value": None, "low": None, "high": None}
    row = min(rows, key=lambda each: abs(each["tokens"] - tokens))
    return {"value": row["noise_scale"], "low": row.get("noise_scale_low"), "high": row.get("noise_scale_high")}


def _section(numbers: Numbers) -> list[str]:
    rows = []
    for share, point in numbers["points"].items():
        for seed, each in point["seeds"].items():
            losses = ", ".join("-" if loss is None else f"{loss:.4f}" for loss in each["losses"].values())
            noise, edge = each["noise scale"], each["critical batch"] >= plan.MULTIPLES[-1] * numbers["sequences"]
            critical_batch = f"{'at least ' if edge else ''}{each['critical batch']:.0f}"
            interval = f"{_number(noise['value'])} [{_number(noise['low'])}, {_number(noise['high'])}]"
            rows.append([share, f"{point['tokens']:,}", seed, losses, critical_batch, interval])
    if not rows:
        return []
    multiples = ", ".join(f"x{each}" for each in plan.MULTIPLES)
    header = ["point", "tokens", "seed", f"final loss at {multiples}", "critical batch", "noise scale, 95 % interval"]
    return ["## Sequences", "", f"The stable run's batch is {numbers['sequences']}.", "", *table(header, rows)]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f}"


def _branches(numbers: Numbers) -> Figure | None:
    """Loss above that of the smallest batch, means over seeds, by batch."""
    made, (axes,) = figure(1)
    for (share, point), color in zip(numbers["points"].items(), COLORS, strict=False):
        known = [each["losses"] for each in point["seeds"].values() if None not in each["losses"].values()]
        if known:
            excess = np.array([[each[str(m)] - each["1"] for m in plan.MULTIPLES] for each in known])
            batches = [numbers["sequences"] * each for each in plan.MULTIPLES]
            axes.errorbar(batches, excess.mean(0), excess.std(0), fmt="o-", color=color, label=f"at {share}", capsize=3)
    if not axes.lines:
        return None
    axes.axhline(plan.TOLERANCE, color="#888888", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch of the branch, sequences")
    axes.set_ylabel("final loss above the stable run's batch")
    axes.legend(frameon=False, fontsize=9)
    return made


def _batches(numbers: Numbers) -> Figure | None:
    """Critical batch and noise scale over tokens, every seed."""
    points = [(point["tokens"], each) for point in numbers["points"].values() for each in point["seeds"].values()]
    if not points:
        return None
    made, (axes,) = figure(1)
    axes.plot([x for x, _ in points], [each["critical batch"] for _, each in points], "o", color=COLORS[0],
              label="critical batch by branches")  # fmt: skip
    known = [(x, each["noise scale"]["value"]) for x, each in points if each["noise scale"]["value"]]
    if known:
        axes.plot(*zip(*known, strict=True), "s", color=COLORS[1], label="noise scale, measured", alpha=0.7)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("sequences")
    axes.legend(frameon=False, fontsize=9)
    return made
