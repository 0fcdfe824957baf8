"""The plots of the ladder: losses of the rungs over the learning rate, and the surface of the held-out cell."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.reporting import COLORS, Numbers, figure, rates_axis

MARKS = ("*", "D", "o", "s", "^", "v", "P")


def draw_rungs(numbers: Numbers) -> Figure | None:
    """A panel a width: of every batch a thin line, of the lowest batch at each rate a thick one, and where the optimum
    lies: full where a bowl tells it, hollow where the best run does."""
    widths = sorted({cell["width"] for cell in numbers["rungs"] if cell["losses"]})
    if not widths:
        return None
    made, panels = figure(len(widths), width=4.2)
    for axes, width in zip(panels, widths, strict=True):
        cells = [cell for cell in numbers["rungs"] if cell["width"] == width and cell["losses"]]
        for cell, color in zip(cells, COLORS, strict=False):
            _draw_cell(axes, cell, color)
        if axes.lines:
            rates_axis(axes, (float(lr) for cell in cells for lr, _, loss in cell["losses"] if loss is not None))
            axes.tick_params(axis="x", labelrotation=45, labelsize=8)
        axes.set_title(f"hidden {width}", fontsize=10, loc="left")
        axes.set_ylabel("final held-out loss")
    handles = {line.get_label(): line for axes in panels for line in axes.lines if line.get_label()[0] != "_"}
    made.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return made


def _draw_cell(axes: Any, cell: Mapping[str, Any], color: str) -> None:
    by_batch: dict[int, list[tuple[float, float]]] = {}
    lowest: dict[float, float] = {}
    for lr, batch, loss in cell["losses"]:
        if loss is not None:
            by_batch.setdefault(batch, []).append((lr, loss))
            lowest[lr] = min(loss, lowest.get(lr, loss))
    for points in by_batch.values():
        axes.plot(*zip(*sorted(points), strict=True), "-", color=color, alpha=0.35, linewidth=0.8)
    if not lowest:
        return
    axes.plot(
        *zip(*sorted(lowest.items()), strict=True), "o-", color=color, markersize=3, label=f"{cell['tokens']:,} tokens"
    )
    own = cell["bowl"]
    if own and own["lr"]:
        face = color if own["curvature"] else "white"
        axes.plot([own["lr"]["value"]], [own["loss"]], "D", color=color, markerfacecolor=face, markersize=8)


def draw_held_out(numbers: Numbers) -> Figure | None:
    """The sweep's losses above their lowest, with lines of equal loss, and the place of every proposal."""
    cell = numbers.get("held out")
    losses = [each for each in cell["losses"] if each[2] is not None] if cell else []
    if not losses:
        return None
    made, (axes,) = figure(1, width=8.0, height=4.8)
    lr, batch, loss = np.array(losses).T
    excess = 100 * (loss / loss.min() - 1)
    x, y = np.log2(lr), np.log2(batch)
    if len(set(x)) > 2 and len(set(y)) > 2:
        lines = axes.tricontour(x, y, excess, levels=[0.1, 0.5, 1, 2, 4, 8], colors="#888888", linewidths=0.7)
        axes.clabel(lines, fmt="%g %%", fontsize=7)
    axes.scatter(x, y, s=14, color="#444444", zorder=2)
    for at in zip(x, y, excess, strict=True):
        axes.annotate(f"{at[2]:.1f}", at[:2], textcoords="offset points", xytext=(5, -9), fontsize=7, color="#444444")
    own = cell["bowl"]
    if own and len(own["curvature"]) == 3:
        vertex = np.log2([own["lr"]["value"], own["batch_tokens"]["value"] / cell["seq_len"]])
        axes.plot(*vertex[:, None], "x", color="black", markersize=9, markeredgewidth=2, label="minimum of the bowl")
    for each, mark, color in zip(numbers["contenders"], MARKS, COLORS, strict=False):
        label = f"{each['label']}: {each['lr']:g}, {each['batch']}"
        at = [[np.log2(each["lr"])], [np.log2(each["batch"])]]
        axes.plot(*at, mark, color=color, markerfacecolor="none", markeredgewidth=1.6, markersize=10, label=label)
    rates, batches = ([row[name] for row in numbers["contenders"]] for name in ("lr", "batch"))
    axes.set_xticks(*_doublings(min(lr), [*lr, *rates]))
    axes.set_yticks(*_doublings(min(batch), [*batch, *batches]))
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("batch, sequences")
    axes.set_title("loss above the lowest, %", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return made


def _doublings(unit: float, values: Sequence[float]) -> tuple[list[float], list[str]]:
    """Ticks at factors of two from `unit` that hold all values, in log2, and their labels."""
    off = np.log2(np.array(values) / unit)
    steps = range(math.floor(off.min()), math.ceil(off.max()) + 1)
    return [math.log2(unit) + n for n in steps], [f"{unit * 2.0**n:g}" for n in steps]
