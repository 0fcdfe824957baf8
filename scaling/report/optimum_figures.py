"""Plots of optimal learning rates and batches: bowls, their laws, and the plateau of a decision."""

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaling.cells import SAME
from scaling.laws import find
from scaling.optima.cells import inputs
from scaling.report.drawing import BLUE, COLORS, GREEN, INK, ORANGE, QUIET, RED, logarithmic, shades, sheet, spread
from scaling.report.tables import keys
from scaling.report.words import label, number, plain, target, written
from scaling.results import Analysis, Bowl, Decision, Estimate, Fit
from scaling.table import RunTable

SHOWN = 12
LEVELS = (0.001, 0.005, 0.01, 0.02)
SETTINGS = ("lr", "batch_tokens")


def bowls(analysis: Analysis) -> Figure | None:
    """Small multiples of cells, evenly over their compute."""
    if not analysis.bowls:
        return None
    ordered = sorted(analysis.bowls, key=lambda each: each.cell.get("flops", 0.0))
    shown = [ordered[place] for place in spread(np.arange(len(ordered)), SHOWN)]
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = sheet(rows, columns, 0.7 + 2.4 * columns, 0.5 + 2.1 * rows, between=(0.55, 0.5))
    for axis in axes.ravel()[len(shown) :]:
        axis.set_axis_off()
    names = keys(analysis.bowls)
    table = analysis.table.where(analysis.used)
    numbers = {name: _numbers(table, name) for name in (*names, *SETTINGS, "loss")}
    for place, (axis, bowl) in enumerate(zip(axes.ravel(), shown, strict=False)):
        inside = np.ones(len(table), dtype=bool)
        for name in names:
            inside &= np.isclose(numbers[name], bowl.cell.get(name, math.nan), rtol=SAME, equal_nan=True)
        lr, batch, loss = (numbers[name][inside] for name in (*SETTINGS, "loss"))
        if _varies(lr) and _varies(batch):
            _plane(axis, bowl, lr, batch, loss)
        else:
            _section(axis, bowl, "batch_tokens" if _varies(batch) else "lr", batch if _varies(batch) else lr, loss)
        told = ((_short(name), written(name)(bowl.cell[name])) for name in names if name in bowl.cell)
        axis.set_title(", ".join(f"{name} {value}" for name, value in told), fontsize=8.5)
        if place % columns:
            axis.set_ylabel("")
        if place + columns < len(shown):
            axis.set_xlabel("")
    return figure


def _numbers(table: RunTable, name: str) -> np.ndarray:
    return table.numbers(name) if table.has(name) else np.full(len(table), np.nan)


def _varies(values: np.ndarray) -> bool:
    known = values[np.isfinite(values)]
    return len(known) > 1 and known.max() > known.min() * (1 + SAME)


def _short(name: str) -> str:
    return {"tokens": "D", "total": "N", "non_embedding": "N", "active": "N"}.get(name, plain(name))


def _plane(axis: Axes, bowl: Bowl, lr: np.ndarray, batch: np.ndarray, loss: np.ndarray) -> None:
    """Runs over learning rate and batch, coloured by their excess over the lowest loss, and contours of the bowl."""
    known = np.isfinite(lr) & np.isfinite(batch) & np.isfinite(loss)
    lr, batch, excess = lr[known], batch[known], loss[known] / bowl.loss - 1
    if len(lr):
        shade = np.clip(excess / 0.03, 0, 1)
        axis.scatter(lr, batch, c=colormaps[COLORS](0.95 * shade), s=11, linewidths=0, alpha=0.85)
        axis.set_xlim(lr.min() / 1.4, lr.max() * 1.4)
        axis.set_ylim(batch.min() / 1.4, batch.max() * 1.4)
    if (
        len(bowl.curvature) == 3
        and np.isfinite(bowl.curvature).all()
        and bowl.lr is not None
        and bowl.batch_tokens is not None
    ):
        x, y = (np.geomspace(*limits, 60) for limits in (axis.get_xlim(), axis.get_ylim()))
        away = np.log(x)[None] - math.log(bowl.lr.value), np.log(y)[:, None] - math.log(bowl.batch_tokens.value)
        a, b, c = bowl.curvature
        surface = np.expm1(0.5 * (a * away[0] ** 2 + 2 * b * away[0] * away[1] + c * away[1] ** 2))
        axis.contour(x, y, surface, levels=LEVELS, colors=INK, linewidths=0.7, alpha=0.7)
    _mark(axis, bowl)
    logarithmic(axis, "x", "lr", 4)
    logarithmic(axis, "y", "batch_tokens", 4)


def _mark(axis: Axes, bowl: Bowl) -> None:
    """The vertex with its interval, and arrows where it lies at an edge; else the best run."""
    if bowl.lr is not None and bowl.batch_tokens is not None and not bowl.censored:
        bars = [_bars(bowl.lr), _bars(bowl.batch_tokens)]
        axis.errorbar(
            bowl.lr.value, bowl.batch_tokens.value, xerr=bars[0], yerr=bars[1], color=RED, linewidth=1.3, fmt="+",
            markersize=7, zorder=4,
        )  # fmt: skip
        return
    at = (bowl.best["lr"], bowl.best["batch_tokens"])
    axis.plot(*at, "x", color=RED, markersize=6, zorder=4)
    for place, name in enumerate(SETTINGS):
        if name in bowl.censored:
            _arrow(axis, at, place, bowl.censored[name])


def _arrow(axis: Axes, at: tuple[float, float], place: int, side: str) -> None:
    """From the edge of the grid towards where the optimum lies."""
    offset = [0, 0]
    offset[place] = 12 if side == "above" else -12
    sign = ("→", "↑")[place] if side == "above" else ("←", "↓")[place]
    style = {"color": RED, "fontsize": 14, "fontweight": "bold", "ha": "center", "va": "center", "zorder": 5}
    axis.annotate(sign, at, offset, textcoords="offset points", annotation_clip=False, **style)


def _section(axis: Axes, bowl: Bowl, name: str, values: np.ndarray, loss: np.ndarray) -> None:
    """Loss over the one setting that varies, the fitted parabola, and its vertex."""
    estimate: Estimate | None = getattr(bowl, name)
    known = np.isfinite(values) & np.isfinite(loss)
    values, loss = values[known], loss[known]
    axis.scatter(values, loss, s=12, color=BLUE, linewidths=0, alpha=0.8)
    if len(values):
        top = max(1.06 * bowl.loss, float(np.quantile(loss, 0.75)))
        axis.set_ylim(min(loss.min(), bowl.loss) * 0.997, top)
    curvature = bowl.curvature[0 if name == "lr" else -1] if bowl.curvature else 0.0
    if estimate is not None and curvature > 0 and len(values):
        span = np.geomspace(values.min(), values.max(), 80)
        height = bowl.loss * np.exp(0.5 * curvature * (np.log(span) - math.log(estimate.value)) ** 2)
        axis.plot(span, height, color=INK, linewidth=0.9)
    if name in bowl.censored:
        _arrow(axis, (bowl.best[name], bowl.best["loss"]), 0, bowl.censored[name])
    elif estimate is not None:
        axis.errorbar(estimate.value, bowl.loss, xerr=_bars(estimate), fmt="+", color=RED, markersize=7, zorder=4)
    logarithmic(axis, "x", name, 4)
    axis.set_ylabel("loss")


def _bars(value: Estimate) -> list[list[float]] | None:
    """Both sides of an interval as error bars; None where it has no end."""
    found = [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]
    return found if np.isfinite(found).all() else None


def optima(analysis: Analysis) -> Figure | None:
    """The optimum of each cell against the first input of its law, and the law."""
    laws = [fit for name in SETTINGS if (fit := analysis.best(name)) is not None]
    if not laws or not analysis.bowls:
        return None
    figure, axes = sheet(1, len(laws), 4.6 * len(laws), 3.7, left=0.8, between=(0.85, 0.0))
    for axis, fit in zip(axes[0], laws, strict=True):
        _law(axis, fit, analysis)
    return figure


def _law(axis: Axes, fit: Fit, analysis: Analysis) -> None:
    """Optima with intervals, coloured by N, and the law at a few N."""
    law = find(fit.law)
    along = next(symbol for symbol in ("D", "tokens", "C", "flops", "N", *law.inputs) if symbol in law.inputs)
    shade = next((symbol for symbol in ("N", *law.inputs) if symbol in law.inputs and symbol != along), None)
    found = [each for each in analysis.bowls if getattr(each, fit.quantity) is not None]
    try:
        x = inputs(law, [_settings(each) for each in found], fit.size)
    except ValueError:  # some cells do not tell what the law reads
        axis.set_axis_off()
        return
    sizes = x[shade] if shade else np.ones(len(found))
    colors = colormaps[COLORS](shades(np.where(np.isfinite(sizes), sizes, 1.0)))
    for place, (bowl, color) in enumerate(zip(found, colors, strict=True)):
        _optimum(axis, bowl, fit.quantity, x[along][place], color)
    for number_of, size in enumerate(lines := spread(sizes, 6)):
        near = sizes == size
        given = {name: np.full(60, np.exp(np.mean(np.log(values[near])))) for name, values in x.items()}
        given[along] = np.geomspace(np.nanmin(x[along]) / 1.3, np.nanmax(x[along]) * 1.3, 60)
        color = colors[np.argmax(near)] if shade else INK
        text = f"{_short(shade)} {written(shade)(size)}" if shade else None
        axis.plot(given[along], fit.predict(given), color=color, linewidth=1.2, label=text)
        if len(fit.draws) >= 20 and number_of in (0, len(lines) - 1):
            low, high = np.quantile(fit.predictions(given), (0.025, 0.975), axis=0)
            axis.fill_between(given[along], low, high, color=color, alpha=0.13, linewidth=0)
    axis.set_yscale("log")
    logarithmic(axis, "x", along)
    logarithmic(axis, "y", fit.quantity)
    axis.set_title(f"{label(fit.quantity)}: {plain(fit.law)}"[:60], loc="left")
    if shade:
        axis.legend(loc="best", ncols=2)


def _settings(bowl: Bowl) -> dict[str, float]:
    """The numbers of a cell, and its optimum, by column."""
    best = {name: value.value for name in SETTINGS if (value := getattr(bowl, name)) is not None}
    return {**best, **bowl.cell}


def _optimum(axis: Axes, bowl: Bowl, name: str, at: float, color: np.ndarray) -> None:
    value: Estimate = getattr(bowl, name)
    side = bowl.censored.get(name)
    if side is not None:
        axis.plot(
            at, value.value, marker="v" if side == "below" else "^", color=color, markeredgecolor=RED, markersize=6
        )
    else:
        axis.errorbar(at, value.value, yerr=_bars(value), fmt="o", color=color, markersize=4, elinewidth=0.8)


def plateau(analysis: Analysis) -> Figure | None:
    """Excess loss around each proposed setting, from the ends of its plateau."""
    shown = [each for each in analysis.decisions if each.plateau][:4]
    if not shown:
        return None
    names = [name for name in ("N", *SETTINGS) if any(name in each.plateau for each in shown)]
    figure, axes = sheet(len(shown), len(names), 0.4 + 3.9 * len(names), 0.3 + 2.4 * len(shown))
    for row, decision in zip(axes, shown, strict=True):
        for axis, name in zip(row, names, strict=True):
            if name in decision.plateau and name in decision.proposal:
                _cost(axis, decision, name)
            else:
                axis.set_axis_off()
        row[0].set_ylabel("excess loss (%)")
    return figure


def _cost(axis: Axes, decision: Decision, name: str) -> None:
    """The excess is taken to grow as the square of the distance in ln on either side."""
    value, range_of = decision.proposal[name], decision.plateau[name]
    away = np.linspace(-2, 2, 161)
    below, above = math.log(value.value / range_of.low), math.log(range_of.high / value.value)
    if below <= 0 or above <= 0:
        axis.set_axis_off()
        return
    places = value.value * np.exp(np.where(away < 0, away * below, away * above))
    axis.axvspan(range_of.low, range_of.high, color=GREEN, alpha=0.15, linewidth=0)
    axis.plot(places, 100 * range_of.cost * away**2, color=INK, linewidth=1.3)
    if np.isfinite([value.low, value.high]).all():
        axis.axvspan(value.low, value.high, ymax=0.06, color=QUIET, alpha=0.6, linewidth=0)
    axis.axvline(value.value, color=ORANGE, linewidth=1.4)
    axis.axhline(100 * range_of.cost, color=GREEN, linewidth=0.8, linestyle="--")
    axis.set_ylim(0, 400 * range_of.cost)
    axis.set_xlim(places[0], places[-1])
    logarithmic(axis, "x", name, 5)
    axis.set_title(f"{target(decision.target)}: {number(value.value, 3)}", loc="left")
