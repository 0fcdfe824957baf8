"""What runs cost to the same loss: `compare.py RUN RUN ... [--levels L ...] [--out DIR]`."""

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: the project's root is where its packages are found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from runtime.resilience.exits import BAD_INPUT, FINISHED

if TYPE_CHECKING:
    from scaling.comparison import Curve, Row
    from scaling.cost_curves import Lineage

SIGNS = {"exact": "", "at least": "> ", "at most": "< ", "unknown": ""}
TITLES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "wall time"}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare",
        description="Say what runs cost to come to the same losses: tokens, FLOPs over all ancestors, and wall time, "
        "each beside the first run. What one run did not reach is shown as a bound.",
        epilog="Exit codes: 0 done, 2 bad input. See docs/sweeps.md.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's folder, or its name in runs/; several seeds of one as "
        "name:RUN,RUN or as a quoted pattern. The first is what the others are compared with")  # fmt: skip
    add("--levels", nargs="+", type=float, metavar="L", help="losses in nats (default: 5 that all have come through)")
    add("--set", metavar="SET", help='held-out set; "training" for the smoothed training loss (default: the first set '
        "that all were evaluated on, else the training loss)")  # fmt: skip
    add("--out", metavar="DIR", help="also write compare.json and compare.png there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Compare, print, and write; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        compared(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return FINISHED


def compared(arguments: argparse.Namespace) -> None:
    """What `main` does. ValueError for bad input."""
    from scaling.comparison import compare
    from scaling.cost_curves import common_measure, curve

    lineages = read_groups(arguments.runs)
    every = [each for group in lineages.values() for each in group]
    if len(lineages) < 2:
        raise ValueError("give two runs or more, or groups of them, to compare")
    if arguments.levels and not all(math.isfinite(each) for each in arguments.levels):
        raise ValueError(f"--levels {arguments.levels}: accepted are losses in nats")
    measure = common_measure(every, arguments.set)
    groups = {name: [curve(each, measure) for each in group] for name, group in lineages.items()}
    rows = compare(groups, arguments.levels)
    notes = [describe(measure), *dict.fromkeys(note for each in every for note in each.notes)]
    show(rows, notes)
    if arguments.out is not None:
        write(Path(arguments.out), groups, rows, measure, notes)


def read_groups(texts: Sequence[str]) -> "dict[str, list[Lineage]]":
    """The runs of each argument by the name of the group, which for a single run is the run's. ValueError for what
    cannot be read, and names that are there twice."""
    from scaling.cost_curves import read_lineage

    groups: dict[str, list[Lineage]] = {}
    for text in texts:
        label, folders = members(text)
        found = [read_lineage(each) for each in folders]
        name = label or found[0].name
        if name in groups and label is None:
            name = str(folders[0])
        if name in groups:
            raise ValueError(f"{text!r}: there are two of {name}; give each a name of its own, as name:RUN")
        groups[name] = found
    return groups


def members(text: str) -> tuple[str | None, list[Path]]:
    """The name of a group, if it has one, and the folders of its runs. ValueError where there are none."""
    label, runs = None, text
    if (match := re.fullmatch(r"([^:/]+):(.+)", text)) and not Path(text).exists():
        label, runs = match[1], match[2]
    folders = []
    for part in runs.split(","):
        if any(each in part for each in "*?["):
            label = label or part
            matched = [each for each in sorted(Path().glob(part) if not Path(part).is_absolute() else _below(part))
                       if (each / "metrics.jsonl").exists()]  # fmt: skip
            if not matched:
                raise ValueError(f"{part!r} matches no run's folder")
            folders += matched
            continue
        place = next((each for each in (Path(part), Path("runs") / part) if each.is_dir()), None)
        if place is None:
            raise ValueError(f"{part!r} is no folder of a run, and there is none of that name in runs/")
        folders.append(place)
    if twice := next((each for each in folders if folders.count(each) > 1), None):
        raise ValueError(f"{text!r} has {twice} twice")
    return label, folders


def _below(pattern: str) -> list[Path]:
    return list(Path("/").glob(pattern.lstrip("/")))


def describe(measure: str) -> str:
    """How the losses are taken."""
    if measure == "training":
        return "loss: running median of the training loss, and the lowest so far of it"
    return f"loss: held-out set {measure}, the lowest so far, with the cost's logarithm a line between evaluations"


def show(rows: "Sequence[Row]", notes: Sequence[str]) -> None:
    """The table, and what is to be known of it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("loss", justify="right")
    table.add_column("run")
    for title in TITLES.values():
        table.add_column(title, justify="right")
        table.add_column("ratio", justify="right")
    last = None
    for row in rows:
        cells = [f"{row.level:.4f}" if row.level != last else "", Text(row.group)]
        for cost in TITLES:
            cells += [told(row.costs[cost], cost), told_ratio(row.ratios[cost])]
        table.add_row(*cells)
        last = row.level
    # Not on a terminal, a line may be as long as it needs to be.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 240)
    console.print(table)
    for note in notes:
        console.print(note, markup=False)
    missing = {(row.group, row.level, each.reached, each.runs) for row in rows for each in [row.costs["tokens"]]
               if each.reached < each.runs}  # fmt: skip
    for group, level, reached, runs in sorted(missing, key=lambda each: (each[0], -each[1])):
        console.print(f"{group}: {reached} of {runs} runs came down to {level:.4f}; > is a lower bound", markup=False)


def told(cost: Any, kind: str) -> str:
    """A cost as a cell."""
    if math.isnan(cost.value):
        return "?"
    return SIGNS[cost.bound] + (duration(cost.value) if kind == "seconds" else f"{cost.value:.4g}")


def told_ratio(ratio: Any) -> str:
    if math.isnan(ratio.value):
        return "?"
    interval = "" if math.isnan(ratio.low) or ratio.low == ratio.high else f" ({ratio.low:.3f} to {ratio.high:.3f})"
    return f"{SIGNS[ratio.bound]}{ratio.value:.3f}{interval}"


def duration(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 600
        else f"{seconds / 60:.1f} min"
        if seconds < 36000
        else f"{seconds / 3600:.1f} h"
    )


def write(
    out: Path, groups: "Mapping[str, Sequence[Curve]]", rows: "Sequence[Row]", measure: str, notes: Sequence[str]
) -> None:
    """compare.json and compare.png. ValueError where they cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        contents = {"measure": measure, "baseline": next(iter(groups)), "notes": list(notes),
                    "runs": {name: [each.name for each in group] for name, group in groups.items()},
                    "rows": [asdict(row) for row in rows]}  # fmt: skip
        (out / "compare.json").write_text(json.dumps(known(contents), indent=2, allow_nan=False) + "\n")
        draw(out / "compare.png", groups, rows, measure)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror or error}") from None
    print(f"\nwritten: {out / 'compare.json'}, {out / 'compare.png'}")


def known(value: Any) -> Any:
    """With null for what is not a finite number, for which JSON has no word."""
    if isinstance(value, Mapping):
        return {key: known(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [known(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(path: Path, groups: "Mapping[str, Sequence[Curve]]", rows: "Sequence[Row]", measure: str) -> None:
    """Loss over FLOPs of every run, and the ratio of FLOPs to the first over the loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for order, (name, curves) in enumerate(groups.items()):
        color = f"C{order % 10}"
        for number, curve in enumerate(curves):
            left.plot(curve.costs["flops"], curve.loss, color=color, alpha=0.25, linewidth=1)
            label = {"label": name.replace("$", r"\$")} if not number else {}
            left.plot(
                curve.costs["flops"], curve.envelope(), color=color, linewidth=1.6, marker="o", markersize=2.5, **label
            )
        own = [row for row in rows if row.group == name and row.ratios["flops"].bound != "unknown"]
        levels, ratios = [row.level for row in own], [row.ratios["flops"] for row in own]
        right.plot(levels, [each.value for each in ratios], color=color, marker="o", markersize=4)
        for level, each in zip(levels, ratios, strict=True):
            if each.bound != "exact":
                sign, off = ("^", 6) if each.bound == "at least" else ("v", -12)
                place, offset = (level, each.value), {"xytext": (0, off), "textcoords": "offset points"}
                right.annotate(sign, place, ha="center", color=color, **offset)
            elif not math.isnan(each.low):
                right.plot([level, level], [each.low, each.high], color=color, linewidth=1)
    for level in {row.level for row in rows}:
        left.axhline(level, color="#888888", linewidth=0.6, linestyle=":")
    left.set(
        xscale="log", xlabel="FLOPs, ancestors included", ylabel=f"loss, {measure} (nats per token)".replace("$", r"\$")
    )
    left.legend(frameon=False, fontsize=8)
    right.invert_xaxis()
    right.set(xlabel="loss", ylabel="FLOPs to it, of the first run's (^ at least, v at most)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
