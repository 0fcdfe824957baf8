"""Check that a parametrisation transfers: `check_coordinates.py CONFIG --widths 128,256,512 --out FOLDER`."""

import argparse
import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: the project's root is where its packages are found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if TYPE_CHECKING:
    from launch.coordinates import Coordinate
    from runtime.config import Config
    from runtime.model.config import ModelConfig

NOT_TRANSFERRING = 3
"""Exit code: an answer, and not the one hoped for."""
READOUTS = ("logits", "feed_forward.router")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="check_coordinates",
        description="Take a few steps at several widths or depths and compare the mean absolute activation of every "
        "module's output, each use of a reused block apart. Under muP it does not depend on the width, under CompleteP "
        "on the depth either. Writes coordinates.csv and coordinates.png, prints the slopes on logarithmic axes and a "
        "verdict. One process, on one batch of random tokens.",
        epilog="Exit codes: 0 transfers, 2 bad input, 3 does not transfer. See docs/parametrization.md.",
    )
    parser.add_argument("config", help="a TOML preset; of it the model and the optimizer count")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. model.parametrization.kind=mup")
    parser.add_argument(
        "--widths", type=_numbers, default=[], metavar="N,N,...", help="hidden sizes, such as 128,256,512"
    )
    parser.add_argument("--depths", type=_numbers, default=[], metavar="N,N,...", help="unrolled, such as 2,4,8")
    parser.add_argument(
        "--scale", choices=("heads", "head_dim"), default="heads", help="what grows with the width (default heads)"
    )
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="updates (default 4)")
    parser.add_argument("--lr", type=float, metavar="X", help="constant; a large one shows more (default optim.lr)")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="averaged (default 2)")
    parser.add_argument("--sequences", type=int, default=4, metavar="N", help="of the batch (default 4)")
    parser.add_argument("--seq-len", type=int, default=64, metavar="N", help="tokens of a sequence (default 64)")
    parser.add_argument("--tolerance", type=float, default=0.3, metavar="X", help="largest slope (default 0.3)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the table and the plot go")
    return parser


def _numbers(text: str) -> list[int]:
    return sorted({int(each) for each in text.split(",")})


def main(argv: list[str] | None = None) -> int:
    """Check once; returns the exit code."""
    arguments = parser().parse_intermixed_args(argv)
    try:
        return check(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check(arguments: argparse.Namespace) -> int:
    """Measure, write and print; the exit code. ValueError for bad input, before anything is written."""
    from launch.config import compose

    _require(arguments)
    config = compose(arguments.config, arguments.overrides)
    models = {
        axis: _models(config.model, axis, sizes, arguments.scale)
        for axis, sizes in (("width", arguments.widths), ("depth", arguments.depths))
        if sizes
    }
    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}") from None
    found = {axis: _measure(config, each, arguments) for axis, each in models.items()}
    write_table(found, out / "coordinates.csv")
    draw(found, out / "coordinates.png", f"{config.model.parametrization.kind}, lr {_lr(config, arguments):g}")
    transfers = True
    for axis, rows in found.items():
        text, passes = verdict(axis, rows, arguments.tolerance)
        print(text)
        transfers &= passes
    print(f"{out / 'coordinates.csv'}, {out / 'coordinates.png'}")
    return 0 if transfers else NOT_TRANSFERRING


def _require(arguments: argparse.Namespace) -> None:
    sizes = {"--widths": arguments.widths, "--depths": arguments.depths}
    if not any(sizes.values()):
        raise ValueError("give --widths or --depths, two or more of either")
    for option, values in sizes.items():
        if values and (len(values) < 2 or values[0] < 1):
            raise ValueError(f"{option} {','.join(map(str, values))}: accepted: two or more positive numbers")
    for option in ("steps", "seeds", "sequences", "seq_len", "lr", "tolerance"):
        value = getattr(arguments, option)
        if value is not None and value <= 0:
            raise ValueError(f"--{option.replace('_', '-')} {value} is not positive")


def _models(model: "ModelConfig", axis: str, sizes: list[int], scaled: str) -> dict[int, "ModelConfig"]:
    from pydantic import ValidationError

    from launch.coordinates import at_depth, at_width, with_base

    try:
        built = [at_width(model, size, scaled) if axis == "width" else at_depth(model, size) for size in sizes]
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"--{axis}s {','.join(map(str, sizes))}: {message}") from None
    return dict(zip(sizes, with_base(built), strict=True))


def _lr(config: "Config", arguments: argparse.Namespace) -> float:
    return arguments.lr or config.optim.lr


def _measure(config: "Config", models: dict[int, "ModelConfig"], arguments: argparse.Namespace) -> list["Coordinate"]:
    import torch

    from launch.coordinates import measure

    optim = config.optim.model_copy(update={"lr": _lr(config, arguments)})
    shape = arguments.sequences, arguments.seq_len + 1
    rows = []
    for seed in range(arguments.seeds):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        for size, model in models.items():
            rows += measure(model, optim, tokens, arguments.steps, seed, size)
    return rows


def verdict(axis: str, rows: list["Coordinate"], tolerance: float) -> tuple[str, bool]:
    """The slopes as text, and whether every one after the last step is within the tolerance.

    Readouts, the logits and a router's scores, may shrink with the square root of the width, as they do at first under
    muP: what is drawn of them is random, and averages out (arXiv 2203.03466, appendix D.1).
    """
    from launch.coordinates import slopes

    found, last = slopes(rows), max(row.step for row in rows)
    outputs = list(dict.fromkeys(row.output for row in rows))
    lines = [f"{'slope over ' + axis + ' at step':<32}" + "".join(f"{step:>8}" for step in range(last + 1))]
    outside = []
    for output in outputs:
        by_step = [found.get((output, step)) for step in range(last + 1)]
        lines.append(f"{output:<32}" + "".join(f"{'-' if each is None else f'{each:.2f}':>8}" for each in by_step))
        lowest = -tolerance - (0.5 if output in READOUTS else 0.0)
        if by_step[-1] is None or not lowest <= by_step[-1] <= tolerance:
            outside.append(output)
    passes = not outside
    answer = f"transfers over {axis}: every slope is within {tolerance:g} after {last} steps"
    if not passes:
        answer = f"does not transfer over {axis}: after {last} steps beyond {tolerance:g}: {', '.join(outside)}"
    return "\n".join([*lines, answer, ""]), passes


def write_table(found: dict[str, list["Coordinate"]], path: Path) -> None:
    """A row for each measurement."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("axis", "size", "seed", "step", "output", "depth", "mean_abs", "change"))
        for axis, rows in found.items():
            writer.writerows((axis, *row) for row in rows)


def draw(found: dict[str, list["Coordinate"]], path: Path, title: str) -> None:
    """Sizes of the outputs over those at the smallest model, before the first step, after one and after the last."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    last = max(row.step for rows in found.values() for row in rows)
    steps = sorted({0, 1, last})
    figure = Figure(figsize=(3 * len(steps) + 2.6, 3 * len(found) + 0.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(found), len(steps), squeeze=False, sharey="row")
    for row, (axis, rows) in zip(panels, found.items(), strict=True):
        outputs = list(dict.fromkeys(each.output for each in rows))
        for axes, step in zip(row, steps, strict=True):
            for place, output in enumerate(outputs):
                sizes, values = _relative(rows, output, step)
                color = colormaps["tab20"](place % 20)
                axes.plot(sizes, values, marker="o", markersize=3, linewidth=1.2, color=color, label=output)
            axes.set(xscale="log", yscale="log", xlabel=axis, title=_title(step))
            axes.set_xticks(sizes, map(str, sizes))
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.6)
        low, high = row[0].get_ylim()
        row[0].set_ylim(min(low, 0.1), max(high, 10))
        row[0].set_ylabel(f"mean |activation|\nover that at {axis} {sizes[0]}")
        row[-1].legend(frameon=False, fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path)


def _title(step: int) -> str:
    return "at first" if step == 0 else f"after {step} step{'s' if step > 1 else ''}"


def _relative(rows: list["Coordinate"], output: str, step: int) -> tuple[list[int], list[Any]]:
    """Sizes, and an output's mean at each over that at the smallest."""
    by_size: dict[int, list[float]] = {}
    for row in rows:
        if (row.output, row.step) == (output, step):
            by_size.setdefault(row.size, []).append(row.mean_abs)
    means = [sum(each) / len(each) for each in by_size.values()]
    return list(by_size), [mean / means[0] if means[0] else None for mean in means]


if __name__ == "__main__":
    sys.exit(main())
