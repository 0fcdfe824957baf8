"""Synthetic ladders of runs whose best learning rate and batch are known."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scaling.table import RunTable, tidy

LR = {"c": 1.8, "a": -0.7, "b": 0.3}
BATCH = {"c": 0.6, "b": 0.57}
CURVATURE = np.array([[0.012, -0.004], [-0.004, 0.018]])
"""Of ln loss over ln lr and ln batch, as measured on Step Law's grid."""
STEP = np.log(2) / 2


@dataclass(frozen=True)
class Ladder:
    table: RunTable
    lr: np.ndarray
    """The best of each cell, (cells,)."""
    batch: np.ndarray


def best_lr(n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray | float:
    return LR["c"] * n ** LR["a"] * d ** LR["b"]


def best_batch(d: np.ndarray | float) -> np.ndarray | float:
    return BATCH["c"] * d ** BATCH["b"]


def ladder(
    seed: int,
    *,
    sizes: Sequence[float] = (6e7, 1.2e8, 2.5e8, 5e8, 1e9),
    tokens: Sequence[float] = (2e9, 8e9, 3e10, 1e11),
    scatter: float = 0.08,
    noise: float = 1e-3,
    outliers: float = 0.03,
    edges: int = 3,
    skew: float = 0.0,
    levels: tuple[int, int] = (8, 7),
) -> Ladder:
    """Cells of sizes x tokens, a grid of lr x batch around each; of `edges` cells it ends short of the best rate.

    `scatter` is of the cells' optima around the laws, `noise` of ln loss, `outliers` the share of runs that are 1 to
    5 % worse than their bowl.
    """
    generator = np.random.default_rng(seed)
    n, d = (each.ravel() for each in np.meshgrid(sizes, tokens))
    truth = np.column_stack([np.log(best_lr(n, d)), np.log(best_batch(d))])
    truth = truth + scatter * generator.standard_normal(truth.shape)
    short = generator.choice(len(n), edges, replace=False)
    rows = []
    for cell, optimum in enumerate(truth):
        centre = np.round(optimum / STEP) * STEP  # grids are of common levels, not around the unknown optimum
        axes = [centre[i] + STEP * (np.arange(count) - (count - 1) // 2) for i, count in enumerate(levels)]
        if cell in short:
            axes[0] = axes[0] - STEP * (levels[0] // 2 + 2)
        lr, batch = (each.ravel() for each in np.meshgrid(*axes))
        off = np.column_stack([lr, batch]) - optimum
        level = 1.7 + 400 / n[cell] ** 0.34 + 410 / d[cell] ** 0.28
        loss = np.log(level) + np.einsum("bi,ij,bj->b", off, CURVATURE, off) / 2 + skew * off[:, 0] ** 3
        loss = loss + noise * generator.standard_normal(len(loss))
        loss = loss + (generator.random(len(loss)) < outliers) * generator.uniform(0.01, 0.05, len(loss))
        rows.append(
            pd.DataFrame(
                {"non_embedding": n[cell], "tokens": d[cell], "lr": np.exp(lr), "batch_tokens": np.exp(batch)}
            ).assign(loss=np.exp(loss))
        )
    return Ladder(RunTable(tidy(pd.concat(rows, ignore_index=True))), np.exp(truth[:, 0]), np.exp(truth[:, 1]))
