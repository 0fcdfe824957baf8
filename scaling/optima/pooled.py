"""Step Law's procedure: all runs near the lowest loss of their cell are rows of one log-log regression.

Li et al., arXiv 2503.04715, and its code: runs within 0.25 %, 1,000 bootstraps of rows. Rows of one cell stand
together, so that the interval of rows is too narrow; the one that is reported draws cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling.cells import levels
from scaling.laws.powers import PowerLaw
from scaling.optima.cells import Cell, inputs
from scaling.optima.regression import cluster_weights, least_squares, row_weights, widened
from scaling.optima.vertices import Solution

NEAR = 0.0025


@dataclass(frozen=True)
class NearOptimal:
    """Runs (n,) with their cell's number."""

    cells: tuple[Cell, ...]
    cell: np.ndarray
    lr: np.ndarray
    batch_tokens: np.ndarray


def near_optimal(cells: Sequence[Cell], quantity: str, near: float = NEAR) -> NearOptimal:
    """The runs whose loss exceeds their cell's lowest by no more than a share `near`, of cells in which lr, or
    batch_tokens, varies: a run alone is not near anything. ValueError if it varies in none."""
    axes = [each.lr if quantity == "lr" else each.batch for each in cells]
    told = tuple(each for each, axis in zip(cells, axes, strict=True) if len(each) and levels(axis).max() > 0)
    if not told:
        raise ValueError(f"{quantity} varies within no cell; the pooled method needs runs to choose among")
    kept = [each.loss <= each.loss.min() * (1 + near) for each in told]
    number = np.repeat(np.arange(len(told)), [each.sum() for each in kept])
    lr = np.concatenate([each.lr[rows] for each, rows in zip(told, kept, strict=True)])
    batch = np.concatenate([each.batch[rows] for each, rows in zip(told, kept, strict=True)])
    return NearOptimal(told, number, lr, batch)


def regression(found: NearOptimal, law: PowerLaw, size: str) -> tuple[np.ndarray, np.ndarray]:
    """Design (n, K) and right-hand side (n,) of the law over the pooled rows."""
    settings = [dict(found.cells[i].values) for i in found.cell]
    for row, batch in zip(settings, found.batch_tokens, strict=True):
        row.setdefault("batch_tokens", batch)
    design, offset = law.design(inputs(law, settings, size))
    return design, np.log(getattr(found, law.quantity)) - offset


def row_bootstrap(found: NearOptimal, law: PowerLaw, size: str, replicates: int = 1000, seed: int = 0) -> np.ndarray:
    """Coordinates (replicates, K) of Step Law's own bootstrap, which draws rows; it reports their mean."""
    design, y = regression(found, law, size)
    return least_squares(design, y, row_weights(len(y), replicates, seed))


def by_pooling(
    cells: Sequence[Cell], law: PowerLaw, size: str, replicates: int, seed: int, near: float = NEAR
) -> Solution:
    """Least squares of the pooled rows, its draws by a bootstrap of cells."""
    found = near_optimal(cells, law.quantity, near)
    design, y = regression(found, law, size)
    point = least_squares(design, y, np.ones((1, len(y))))[0]
    settings = [tuple(v for k, v in each.values.items() if k != "batch_tokens") for each in found.cells]
    cluster = np.array([settings.index(settings[number]) for number in found.cell])
    draws = least_squares(design, y, cluster_weights(cluster, replicates, seed))
    residuals = y - design @ point
    means = np.bincount(found.cell, residuals) / np.bincount(found.cell)
    scatter = float(np.sqrt(np.mean(means**2)))
    return Solution(point, widened(draws, point, len(set(cluster))), residuals, scatter, design)
