"""The report: by how much the loss of each cell is higher with one carried setting than with the cell's best rate."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from experiments.analysis import compare
from experiments.arms import Results
from experiments.contest import standing
from experiments.power import plan
from experiments.reporting import COLORS, Numbers, common, figure, interval, page, publish, standings, table

FOLDER = Path(__file__).parent
CARRIED = ("wsd-carried", "power")


def report(size: str, results: Results) -> None:
    """Write the report of one size and say where it is; nothing while no arm has finished."""
    numbers = measure(size, results)
    if numbers is None:
        return
    sides = list(numbers["contenders"].values())

    def text(pictures: list[str]) -> str:
        shown = [line for each in pictures for line in (f"![]({each})", "")]
        return page(
            "Power against constant rates", "power", numbers, _regrets(numbers), standings("Every cell", sides), shown
        )

    publish(FOLDER / "results" / size, numbers, text, {"regret": _drawn(numbers)})


def measure(size: str, results: Results) -> Numbers | None:
    numbers = common(size, results)
    if numbers is None:
        return None
    sides = plan.contenders(size)
    numbers["contenders"] = {label: standing(each, results) for label, each in sides.items()}
    numbers["regret"] = {kind: {} for kind in CARRIED}
    for cell in plan.cells():
        best = _losses(numbers, plan.label("wsd", cell))
        for kind in CARRIED:
            carried = _losses(numbers, plan.label(kind, cell))
            if min(len(best), len(carried)) > 1:
                key = plan.label("cell", cell).removeprefix("cell-")
                numbers["regret"][kind][key] = vars(compare(carried, best))
    return numbers


def _losses(numbers: Numbers, label: str) -> list[float]:
    return list(numbers["contenders"][label].get("losses", {}).values())


def mean_regret(found: Numbers) -> float:
    """Over the cells beside the calibration cell."""
    away = plan.label("cell", plan.CALIBRATION).removeprefix("cell-")
    others = [each["mean"] for key, each in found.items() if key != away]
    return math.fsum(others) / len(others) if others else math.nan


def _regrets(numbers: Numbers) -> list[str]:
    keys = list(numbers["regret"]["power"])
    if not keys:
        return []
    rows = [[key, *(interval(numbers["regret"][kind][key]) for kind in CARRIED)] for key in keys]
    means = [f"{mean_regret(numbers['regret'][kind]):+.4f}" for kind in CARRIED]
    header = ["cell", "WSD at the rate of the cheapest cell", "Power as set at the cheapest cell"]
    return [
        "## Regret",
        "",
        "Loss above that of WSD at the cell's own best rate, in nats, 95 % interval; tokens as shares of the largest "
        "budget (t), batches as multiples of the smallest (b).",
        "",
        *table(header, [*rows, ["mean of the others", *means]]),
    ]


def _drawn(numbers: Numbers) -> Figure | None:
    keys = list(numbers["regret"]["power"])
    if not keys:
        return None
    made, (axes,) = figure(1, width=6.5)
    for number, (kind, color) in enumerate(zip(CARRIED, COLORS, strict=False)):
        found = [numbers["regret"][kind][key] for key in keys]
        axes.errorbar(
            [place + 0.15 * (number - 0.5) for place in range(len(keys))], [each["mean"] for each in found],
            [each["half_width"] for each in found], fmt="o", color=color, label=kind, capsize=3,
        )  # fmt: skip
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xticks(range(len(keys)), keys)
    axes.set_xlabel("cell: tokens (t) and batch (b)")
    axes.set_ylabel("regret, nats")
    axes.legend(frameon=False, fontsize=9)
    return made
