"""The paper that plots are drawn on: one calm style, no global state, PNG out."""

import io
import math
from collections.abc import Callable

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from scaling.report.words import label, written

INK, QUIET, GRID = "#22303c", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#2f6db3", "#d9822b", "#3f9c6b", "#c23030"
COLORS = "viridis"
DPI = 110
STYLE = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.labelsize": 9, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": QUIET, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": QUIET, "ytick.color": QUIET, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True,
    "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True, "text.parse_math": False,
}  # fmt: skip


def sheet(
    rows: int, columns: int, width: float, height: float, left: float = 0.72, between: tuple[float, float] = (0.6, 0.62)
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, (rows, columns); all measures in inches. `left`: the margin for labels; `between`: the
    gaps of columns and of rows. Margins are given, as to find them would take longer than to draw."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    across, along = between[0] * (columns - 1), between[1] * (rows - 1)
    panel = (width - left - 0.15 - across) / columns, (height - 0.5 - 0.3 - along) / rows
    figure.subplots_adjust(
        left=left / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.3 / height,
        wspace=between[0] / panel[0], hspace=between[1] / panel[1],
    )  # fmt: skip
    return figure, figure.subplots(rows, columns, squeeze=False)


def png(draw: Callable[[], Figure | None]) -> bytes | None:
    """What a plot comes to as a PNG file; None if there is nothing to draw."""
    with rc_context(STYLE), np.errstate(over="ignore"):  # margins of an axis may end beyond the largest float
        figure = draw()
        if figure is None:
            return None
        written_to = io.BytesIO()
        figure.savefig(written_to, format="png", dpi=DPI, metadata={"Software": None})
        return written_to.getvalue()


def logarithmic(axis: Axes, which: str, name: str, most: int = 6) -> None:
    """A logarithmic axis of a column or symbol, with few ticks, written as elsewhere in the report."""
    getattr(axis, f"set_{which}scale")("log")
    line = getattr(axis, f"{which}axis")
    low, high = getattr(axis, f"get_{which}lim")()
    line.set_major_locator(FixedLocator(ticks(low, high, most)))
    line.set_major_formatter(FuncFormatter(lambda value, _: written(name)(value)))
    line.set_minor_locator(NullLocator())
    line.set_minor_formatter(NullFormatter())
    getattr(axis, f"set_{which}label")(label(name))


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round places for ticks of a logarithmic axis, at most so many."""
    if not 0 < low < high < math.inf:
        return []
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    halves = (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)
    for mantissas in (halves, (1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if 2 <= len(found) <= most:
            return found
    step = math.ceil(len(decades) / most)
    found = [10.0**d for d in decades if d % step == 0 and low <= 10.0**d <= high]
    if len(found) >= 2:
        return found
    return [float(each) for each in MaxNLocator(most - 1).tick_values(low, high) if low <= each <= high]


def shades(values: np.ndarray) -> np.ndarray:
    """A place on the colour map for each positive value, by its logarithm, (n,) from 0 to 0.9."""
    logs = np.log(values)
    width = np.ptp(logs)
    return 0.9 * (logs - logs.min()) / width if width > 0 else np.full(len(logs), 0.45)


def spread(values: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the different values, evenly by rank, the ends among them."""
    distinct = np.unique(values)
    if len(distinct) <= most:
        return distinct
    return distinct[np.linspace(0, len(distinct) - 1, most).round().astype(int)]
