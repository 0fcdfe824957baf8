"""The plots of a report, one function each; a function gives None where there is nothing to draw."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from matplotlib.figure import Figure

from scaling.report import loss_figures, optimum_figures
from scaling.report.drawing import png
from scaling.results import Analysis


class Plot(NamedTuple):
    title: str
    caption: str
    draw: Callable[[Analysis], Figure | None]


PLOTS: Mapping[str, Plot] = {
    "losses": Plot(
        "Loss against compute",
        "Points are runs, coloured by N; lines are the chosen law at constant N; dashed is the least loss that the "
        "law gives for each compute. Diamonds are targets with the interval of their predicted loss.",
        loss_figures.losses,
    ),
    "residuals": Plot(
        "Residuals of the loss law",
        "ln of measured over predicted. The band is two residual standard deviations; the line joins the medians. A "
        "trend in it is something that the law does not tell.",
        loss_figures.residuals,
    ),
    "held_out": Plot(
        "Rows that a law was not fitted to",
        "Left: mean error of each law on held-out rows, two standard errors wide. Right: predicted over measured.",
        loss_figures.held_out,
    ),
    "bowls": Plot(
        "Loss around the best settings of each cell",
        "Each cell has equal N and D. Contours are the fitted bowl at 0.1, 0.5, 1 and 2 % above its lowest loss; the "
        "cross is its vertex with its 95 % interval. An arrow marks an optimum at the edge of the grid.",
        optimum_figures.bowls,
    ),
    "optima": Plot(
        "Laws of the optimum",
        "Points are the optima of cells with 95 % intervals, triangles those at an edge of the grid; lines are the "
        "chosen law, its 95 % interval shaded at the ends.",
        optimum_figures.optima,
    ),
    "plateau": Plot(
        "What it costs to be off the optimum",
        "Excess loss around each proposal. Green: the plateau. Grey: the 95 % interval of the optimum.",
        optimum_figures.plateau,
    ),
    "bootstrap": Plot(
        "Parameters over bootstrap replicates",
        "One panel a parameter of each chosen law; the line is the estimate, the band its 95 % interval.",
        loss_figures.bootstrap,
    ),
}


def draw(analysis: Analysis) -> dict[str, bytes]:
    """The plots that this analysis has something for, as PNG files by name."""
    drawn = {name: png(lambda plot=plot: plot.draw(analysis)) for name, plot in PLOTS.items()}
    return {name: image for name, image in drawn.items() if image is not None}
