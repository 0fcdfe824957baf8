"""The report: loss on the second text and on the first after the second stage."""

from pathlib import Path

from matplotlib.figure import Figure

from experiments.analysis import compare
from experiments.arms import Results
from experiments.contest import standing
from experiments.reporting import COLORS, Numbers, common, figure, interval, page, publish, table
from experiments.rewarming import plan

FOLDER = Path(__file__).parent
BASELINE = "no re-warming"


def report(size: str, results: Results) -> None:
    """Write the report of one size and say where it is; nothing while no arm has finished."""
    numbers = measure(size, results)
    if numbers is None:
        return

    def text(pictures: list[str]) -> str:
        shown = [line for each in pictures for line in (f"![]({each})", "")]
        return page("A second stage of other text", "rewarming", numbers, _both(numbers), shown)

    publish(FOLDER / "results" / size, numbers, text, {"texts": _texts(numbers)})


def measure(size: str, results: Results) -> Numbers | None:
    numbers = common(size, results)
    if numbers is None:
        return None
    sides = plan.contenders(size)
    numbers["contenders"], numbers["texts"] = {}, {}
    for label, side in sides.items():
        numbers["contenders"][label] = standing(side, results)
        runs = [results[arm.name].evaluations for arm in side.runs(results).values()]
        if runs:
            numbers["texts"][label] = {name: [_last(rows, name) for rows in runs] for name in plan.SETS}
    return numbers


def _last(rows: list[Numbers], name: str) -> float:
    return next(row["loss"] for row in reversed(rows) if row["set"] == name)


def _both(numbers: Numbers) -> list[str]:
    first = numbers["texts"].get("first stage")
    if first is None:
        return []
    rows = []
    for label, texts in numbers["texts"].items():
        cells = []
        for name in plan.SETS:
            base = numbers["texts"].get(BASELINE, {}).get(name, []) if name == "second" else first["heldout"]
            itself = label == (BASELINE if name == "second" else "first stage")
            known = min(len(base), len(texts[name])) > 1 and not itself
            cells += [f"{_mean(texts[name]):.4f}", interval(vars(compare(texts[name], base))) if known else ""]
        rows.append([label, *cells])
    header = ["", "first text", "above the end of the first stage", "second text", f"above {BASELINE}"]
    return ["## Both texts", "", "Held-out losses, means over seeds; differences with 95 % intervals.", "",
            *table(header, rows)]  # fmt: skip


def _mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def _texts(numbers: Numbers) -> Figure | None:
    """Every side as a point: what it lost of the first text, and what it learned of the second."""
    if not numbers["texts"]:
        return None
    made, (axes,) = figure(1, width=7)
    for number, (label, texts) in enumerate(numbers["texts"].items()):
        marker = "o" if number < len(COLORS) else "s"
        axes.plot(
            _mean(texts["heldout"]), _mean(texts["second"]), marker, color=COLORS[number % len(COLORS)], label=label
        )
    axes.set_xlabel("held-out loss on the first text")
    axes.set_ylabel("held-out loss on the second text")
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return made
