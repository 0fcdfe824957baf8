"""The report: final loss by tail, by the point of the branch and what it costs, and by average."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from experiments.analysis import compare
from experiments.arms import Results
from experiments.contest import SEEDS, standing
from experiments.reporting import COLORS, Numbers, common, figure, interval, page, power, publish, standings, table
from experiments.tails import averages, plan

FOLDER = Path(__file__).parent
BASELINE = "tail-linear"


def report(size: str, results: Results) -> None:
    """Write the report of one size and say where it is; nothing while no arm has finished."""
    numbers = measure(size, results)
    if numbers is None:
        return
    tails = [each for label, each in numbers["contenders"].items() if label.startswith("tail-")]
    others = [each for label, each in numbers["contenders"].items() if not label.startswith("tail-")]

    def text(pictures: list[str]) -> str:
        shown = [line for each in pictures for line in (f"![]({each})", "")]
        sections = [standings("Tails from one point, equal tokens", tails, BASELINE), power(tails)]
        sections += [_equality(numbers), standings("The fan, and runs from scratch", others)]
        return page("Tails, branches and averages", "tails", numbers, *sections, _averages(numbers), shown)

    publish(FOLDER / "results" / size, numbers, text, {"tails": _tails(tails), "fan": _fan(numbers)})


def measure(size: str, results: Results) -> Numbers | None:
    numbers = common(size, results)
    if numbers is None:
        return None
    sides = plan.contenders(size)
    numbers["contenders"] = {
        label: standing(each, results, sides[BASELINE] if label.startswith("tail-") and label != BASELINE else None)
        for label, each in sides.items()
    }
    rate = plan.leader(size).rate(results)
    parents = [plan.stable(size, rate, seed) for seed in SEEDS] if rate is not None else []
    numbers["stable"] = {str(seed): results[arm.name].loss for seed, arm in zip(SEEDS, parents, strict=False)
                         if arm.name in results}  # fmt: skip
    numbers["averages"] = averages.measured(size, rate) if numbers["stable"] else {}
    return numbers


def _equality(numbers: Numbers) -> list[str]:
    """Whether a branch is the run from scratch that had been meant to end there, and what each costs."""
    rows = []
    for share in plan.SCRATCH:
        label = f"tail-{plan.TAIL}" if share == plan.AT else f"fan-{share:g}"
        branch, scratch = numbers["contenders"][label], numbers["contenders"][f"scratch-{share:g}"]
        both = branch.get("losses", {}).keys() & scratch.get("losses", {}).keys()
        if both:
            apart = max(abs(branch["losses"][seed] - scratch["losses"][seed]) for seed in both)
            rows.append([f"{share:g}", f"{apart:.2g}", f"{len(both)}"])
    if not rows:
        return []
    header = ["branch point, of the tokens", "largest difference of the final loss", "seeds"]
    return ["## A branch against the run from scratch", "", *table(header, rows)]


def _averages(numbers: Numbers) -> list[str]:
    tail = list(numbers["contenders"][f"tail-{plan.TAIL}"].get("losses", {}).values())
    sides = {"none: the newest checkpoint": numbers["stable"], **numbers["averages"]}
    rows = []
    for label, found in sides.items():
        losses = list(found.values())
        gap = interval(vars(compare(losses, tail))) if min(len(losses), len(tail)) > 1 else ""
        rows.append([label, ", ".join(f"{loss:.4f}" for loss in losses), f"{_mean(losses):.4f}", gap])
    if not numbers["averages"]:
        return []
    header = ["average", "held-out loss, by seed", "mean", f"above the {plan.TAIL} tail, 95 % interval"]
    return [
        "## Averages of stable checkpoints",
        "",
        f"Of the last {plan.AVERAGED:.0%} of the stable run, as many tokens as the tails take; no step of training.",
        "",
        *table(header, rows),
    ]


def _mean(losses: list[float]) -> float:
    return math.fsum(losses) / len(losses) if losses else math.nan


def _tails(tails: list[Numbers]) -> Figure | None:
    known = sorted((each for each in tails if "mean" in each), key=lambda each: each["mean"])
    if not known:
        return None
    made, (axes,) = figure(1, width=6.2)
    for place, each in enumerate(known):
        axes.plot(list(each["losses"].values()), [place] * len(each["losses"]), ".", color=COLORS[0], alpha=0.6)
        axes.plot(each["mean"], place, "o", color=COLORS[1])
    axes.set_yticks(range(len(known)), [each["label"].removeprefix("tail-") for each in known])
    axes.set_xlabel("final held-out loss; seeds and their mean")
    return made


def _fan(numbers: Numbers) -> Figure | None:
    """Final loss of every branch of the fan by the tokens at its end."""
    labels = [*(f"fan-{share:g}" for share in plan.POINTS[:-1]), f"tail-{plan.TAIL}"]
    known = [each for each in (numbers["contenders"][label] for label in labels) if "mean" in each]
    if not known:
        return None
    made, (axes,) = figure(1)
    axes.plot([each["tokens"] for each in known], [each["mean"] for each in known], "o-", color=COLORS[0])
    axes.set_xscale("log")
    axes.set_xlabel("tokens at the end of the branch")
    axes.set_ylabel("final held-out loss")
    return made
