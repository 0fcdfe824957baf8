"""Plots of loss laws: losses, residuals, hold-out and parameters."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaling.inputs import compute, of_rows
from scaling.laws import find
from scaling.report.answer import chosen
from scaling.report.drawing import BLUE, COLORS, GRID, INK, ORANGE, QUIET, RED, logarithmic, shades, sheet, spread
from scaling.report.tables import counting, quantity_of
from scaling.report.words import count, label, number, plain, target
from scaling.results import Analysis, Fit, HeldOut
from scaling.table import RunTable

CURVES = 9
PANELS = 6


def losses(analysis: Analysis) -> Figure | None:
    """Loss against compute: runs, the law at constant N, its frontier, and targets."""
    fit = analysis.best("loss")
    if fit is None:
        return None
    table = fitted(analysis)
    flops, sizes, measured = compute(table, fit.size), table.numbers(fit.size), table.numbers("loss")
    known = np.isfinite(flops) & np.isfinite(sizes)
    figure, axes = sheet(1, 1, 7.6, 4.6)
    axis = axes[0, 0]
    colors = colormaps[COLORS]
    places = shades(sizes[known])
    axis.scatter(flops[known], measured[known], s=14, color=colors(places), linewidths=0, alpha=0.85, zorder=3)
    for size in spread(sizes[known], CURVES):
        place = places[np.argmin(np.abs(sizes[known] - size))]
        _curve(axis, fit, table.where(np.abs(np.log(sizes / size)) < 0.2), size, colors(place))
    _targets(axis, analysis, fit)
    if {"N", "D"} == set(find(fit.law).inputs):
        _frontier(axis, fit, flops[known])
    axis.set_yscale("log")
    logarithmic(axis, "x", "flops")
    logarithmic(axis, "y", "loss", 9)
    axis.legend(loc="upper right")
    return figure


def fitted(analysis: Analysis) -> RunTable:
    """The rows that loss laws were fitted to."""
    if not analysis.fitted:
        return analysis.table.where(analysis.used)
    return analysis.table.where(np.isin(np.arange(len(analysis.table)), analysis.fitted))


def _curve(axis: Axes, fit: Fit, near: RunTable, size: float, color: tuple) -> None:
    """The law at one N over the tokens of runs of about this size; other inputs are their median."""
    x = of_rows(near, find(fit.law).inputs, fit.size)
    tokens = near.numbers("tokens")
    if not len(tokens) or not np.isfinite(tokens).all():
        return
    span = np.geomspace(tokens.min() / 1.3, tokens.max() * 1.3, 50)
    flops = span * np.median(compute(near, fit.size) / tokens)
    given = {name: np.full(50, np.median(values)) for name, values in x.items()}
    given |= {name: values for name, values in {"D": span, "N": np.full(50, size), "C": flops}.items() if name in x}
    text = f"{label(fit.size)} {count(size)}"
    axis.plot(flops, fit.predict(given), color=color, linewidth=1.2, alpha=0.9, label=text)


def _frontier(axis: Axes, fit: Fit, flops: np.ndarray) -> None:
    """The least loss that the law gives for a compute of 6 N D."""
    low, high = axis.get_xlim()
    grid = np.geomspace(max(low, flops.min() / 2), max(high, flops.max()), 40)
    sizes = np.geomspace(fit.spans["N"][0] / 30, fit.spans["N"][1] * 300, 240)
    budget, size = (each.ravel() for each in np.meshgrid(grid, sizes, indexing="ij"))
    least = fit.predict({"N": size, "D": budget / (6 * size)}).reshape(40, 240).min(axis=1)
    axis.plot(grid, least, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label="least for the compute, 6 N D")


def _targets(axis: Axes, analysis: Analysis, fit: Fit) -> None:
    for decision in analysis.decisions:
        loss = decision.proposal.get("loss")
        if loss is None:
            continue
        largest = np.nanmax(compute(fitted(analysis), fit.size))
        error = [[max(0.0, loss.value - loss.low)], [max(0.0, loss.high - loss.value)]]
        bars = error if np.isfinite(error).all() else None
        axis.errorbar(
            [decision.extrapolation * largest], [loss.value], yerr=bars, fmt="D", color=RED, markersize=5, capsize=3,
            zorder=4, label=target(decision.target),
        )  # fmt: skip


def residuals(analysis: Analysis) -> Figure | None:
    """ln of measured over predicted against N and D, in percent."""
    fit = analysis.best("loss")
    if fit is None:
        return None
    table = fitted(analysis)
    x = of_rows(table, find(fit.law).inputs, fit.size)
    found = 100 * (np.log(table.numbers("loss")) - np.log(fit.predict(x)))
    figure, axes = sheet(1, 2, 7.6, 3.1)
    band = 200 * fit.noise
    limit = max(1.5 * band, float(np.nanquantile(np.abs(found), 0.98)) * 1.15, 1e-3)
    for axis, name in zip(axes[0], (fit.size, "tokens"), strict=True):
        values = table.numbers(name) if table.has(name) else np.full(len(table), np.nan)
        known = np.isfinite(values) & np.isfinite(found)
        axis.axhspan(-band, band, color=GRID, alpha=0.7, zorder=0)
        axis.axhline(0, color=QUIET, linewidth=0.8)
        outside = known & (np.abs(found) > limit)
        inside = known & ~outside
        axis.scatter(values[inside], found[inside], s=12, color=BLUE, linewidths=0, alpha=0.6)
        ends = np.sign(found[outside]) * limit * 0.97
        axis.scatter(values[outside], ends, s=22, color=RED, marker="x", label=f"beyond ({outside.sum()})")
        if known.any():
            axis.plot(*_medians(values[known], found[known]), color=ORANGE, linewidth=1.4)
        axis.set_ylim(-limit, limit)
        logarithmic(axis, "x", name, 5)
        if outside.any():
            axis.legend(loc="upper right")
    axes[0, 0].set_ylabel("measured over predicted (%)")
    return figure


def _medians(values: np.ndarray, found: np.ndarray, bins: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Medians over groups of about equal size along an axis."""
    order = np.argsort(values, kind="stable")
    distinct = np.unique(values)
    if len(distinct) <= bins:
        return distinct, np.array([np.median(found[values == each]) for each in distinct])
    groups = np.array_split(order, bins)
    places = np.array([np.exp(np.mean(np.log(values[each]))) for each in groups])
    return places, np.array([np.median(found[each]) for each in groups])


def held_out(analysis: Analysis) -> Figure | None:
    """Errors of each law on held-out rows, and predicted over measured of the best two."""
    scores = counting(analysis.held_out)
    if not scores:
        return None
    shown = scores[:16]
    figure, axes = sheet(1, 2, 9.0, max(2.6, 0.8 + 0.24 * len(shown)), left=2.9, between=(0.75, 0.0))
    left, right = axes[0]
    places = np.arange(len(shown))[::-1]
    errors = 100 * np.array([each.error for each in shown])
    widths = 200 * np.nan_to_num(np.array([each.error_se for each in shown]))
    left.errorbar(errors, places, xerr=np.minimum(widths, errors), fmt="o", color=BLUE, markersize=4, capsize=2)
    left.plot(100 * np.array([each.bias for each in shown]), places, "|", color=ORANGE, markersize=9, label="bias")
    left.axvline(0, color=QUIET, linewidth=0.8)
    left.set_yticks(places, [_shortened(f"{_named(each)}: {each.split}", 44) for each in shown])
    left.set_xlabel("error (%)")
    left.legend(loc="best")
    _predicted(right, scores)
    return figure


def _named(found: HeldOut) -> str:
    return f"{found.law}, {found.size}" if found.size else found.law


def _shortened(text: str, most: int) -> str:
    text = plain(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _predicted(axis: Axes, scores: Sequence[HeldOut]) -> None:
    """Predicted over measured, in percent, of the first two laws that tell their points."""
    axis.axhline(0, color=QUIET, linewidth=0.8)
    told = [each for each in scores if each.measured and each.size and quantity_of(each) == "loss"]
    laws = list(dict.fromkeys((each.law, each.size) for each in told))[:2]
    for color, marker, (law, size) in zip((BLUE, ORANGE), ("o", "s"), laws, strict=False):
        same = [each for each in told if (each.law, each.size) == (law, size)]
        measured = np.concatenate([each.measured for each in same])
        predicted = np.concatenate([each.predicted for each in same])
        text = _shortened(f"{law}, {size}", 30)
        share = 100 * (predicted / measured - 1)
        axis.scatter(measured, share, s=14, color=color, marker=marker, alpha=0.6, linewidths=0, label=text)
    axis.set_xlabel("measured loss")
    axis.set_ylabel("predicted over measured (%)")
    if laws:
        axis.legend(loc="best")
    else:
        axis.set_axis_off()


def bootstrap(analysis: Analysis) -> Figure | None:
    """How each parameter of the chosen laws varies over the replicates."""
    drawn = [fit for fit in chosen(analysis) if len(fit.draws) >= 20][:3]
    if not drawn:
        return None
    columns = min(PANELS, max(len(fit.parameters) for fit in drawn))
    figure, axes = sheet(len(drawn), columns, 0.6 + 1.7 * columns, 0.4 + 1.6 * len(drawn), 0.5, (0.2, 0.55))
    for row, fit in zip(axes, drawn, strict=True):
        parameters = find(fit.law).parameters
        for axis in row[len(parameters) :]:
            axis.set_axis_off()
        for axis, parameter, draws in zip(row, parameters, fit.draws.T, strict=False):
            _density(axis, parameter.value(draws))
            value = fit.parameters[parameter.name]
            axis.axvline(value.value, color=ORANGE, linewidth=1.4)
            if np.isfinite([value.low, value.high]).all():
                axis.axvspan(value.low, value.high, color=GRID, zorder=0)
            axis.set_title(plain(parameter.name), loc="left")
            axis.tick_params(labelsize=7)
        row[0].set_ylabel(_shortened(fit.law, 18))
    return figure


def _density(axis: Axes, values: np.ndarray) -> None:
    """A histogram of the middle of the values, as one filled line."""
    low, high = np.nanquantile(values, (0.005, 0.995))
    axis.set_yticks([])
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # hardly more than rounding
        axis.set_xticks([float(low)], [number(float(low), 3)])
        return
    counts, edges = np.histogram(values[(values >= low) & (values <= high)], 24)
    axis.fill_between(edges, np.append(counts, counts[-1]), step="post", color=BLUE, alpha=0.35, linewidth=0)
    inner = [low + 0.1 * (high - low), high - 0.1 * (high - low)]
    axis.set_xticks(inner, [number(each, 3) for each in inner])
    axis.set_ylim(bottom=0)
