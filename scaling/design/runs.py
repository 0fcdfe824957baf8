"""What a design reads of a table: settings, losses and costs of runs, grouped into cells of equal N and D."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from scaling.cells import SAME, grouped, levels
from scaling.cells import cells_of as parted
from scaling.columns import DIVERGED, FINISHED, RUNNING
from scaling.table import RunTable

NEAR = float(np.log1p(SAME))
"""Of ln N and ln D: runs of one cell end at slightly different tokens, as their batches do not divide the horizon
alike."""
FLOPS = 6.0
"""For each parameter and token, where the table does not know better (Kaplan et al. 2020, table 1)."""


@dataclass(frozen=True)
class Runs:
    """Columns of runs, each (rows,)."""

    N: np.ndarray
    D: np.ndarray
    lr: np.ndarray
    batch_tokens: np.ndarray
    loss: np.ndarray
    """NaN where unknown, diverged or not yet run."""
    diverged: np.ndarray
    pending: np.ndarray
    """Still running."""
    flops: np.ndarray

    def __len__(self) -> int:
        return len(self.N)

    def where(self, kept: np.ndarray) -> "Runs":
        """These rows: (rows,) of bool, or indices."""
        return Runs(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))

    def joined(self, other: "Runs") -> "Runs":
        """These and then the other's."""
        return Runs(*(np.r_[getattr(self, name), getattr(other, name)] for name in self.__dataclass_fields__))

    @property
    def measured(self) -> np.ndarray:
        """(rows,) of bool: those that have a loss to learn from."""
        return np.isfinite(self.loss)


def read(table: RunTable | pd.DataFrame, size: str) -> Runs:
    """The runs of a table, with N meaning the column `size`.

    N and D are those of a run's cell. Rows without positive N, D, lr and batch are left out; so is the loss of a run
    that did not finish. Where `flops` is missing it follows from `flops_per_token`, or else from 6 N D. ValueError for
    a missing column, or no row.
    """
    frame = table.frame if isinstance(table, RunTable) else table
    needed = (size, "tokens", "lr", "batch_tokens")
    missing = [name for name in needed if name not in frame]
    if missing:
        raise ValueError(f"columns {', '.join(missing)} are missing; a design needs {', '.join(needed)} and loss")

    def numbers(name: str) -> np.ndarray:
        if name not in frame:
            return np.full(len(frame), np.nan)
        return pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=float, na_value=np.nan)

    settings = {name: numbers(name) for name in needed}
    with np.errstate(invalid="ignore"):
        known = np.all([np.isfinite(each) & (each > 0) for each in settings.values()], axis=0)
    if not known.any():
        raise ValueError(f"no row has positive {', '.join(needed)}")
    status = frame["status"].to_numpy(dtype=object) if "status" in frame else np.full(len(frame), FINISHED, object)
    status = np.where(pd.isna(status), FINISHED, status)
    loss = numbers("loss")
    loss = np.where((status == FINISHED) & np.isfinite(loss) & (loss > 0), loss, np.nan)
    N, D = settings[size], settings["tokens"]
    flops = numbers("flops")
    for other in (numbers("flops_per_token") * D, FLOPS * N * D):
        flops = np.where(np.isfinite(flops) & (flops > 0), flops, other)
    runs = Runs(N, D, settings["lr"], settings["batch_tokens"], loss, status == DIVERGED, status == RUNNING, flops)
    runs = runs.where(known)
    N, D, cell = cells_of(runs.N, runs.D)
    return replace(runs, N=N[cell], D=D[cell])


def of_one_training(table: RunTable, size: str) -> np.ndarray:
    """Which runs a belief may learn from together, (rows,) of bool: of equal N and D those of the training that most of
    them have. `scaling.cells` keeps runs apart that differ in weight decay or schedule, and a belief has one bowl."""
    if not all(map(table.has, (size, "tokens"))):
        return np.ones(len(table), dtype=bool)
    kept = np.zeros(len(table), dtype=bool)
    found = sorted(parted(table, size), key=len, reverse=True)
    taken: set[tuple[int, int]] = set()
    N, D = levels(table.numbers(size)), levels(table.numbers("tokens"))
    for rows in found:
        place = int(N[rows[0]]), int(D[rows[0]])
        if place not in taken:
            taken.add(place)
            kept[rows] = True
    return kept


def cells_of(N: np.ndarray, D: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells of equal N and D: their least N and D, (m,) each, and each row's cell, (rows,)."""
    if not len(N):
        return np.empty(0), np.empty(0), np.empty(0, dtype=int)
    cell = grouped([levels(N), levels(D)])
    order = np.argsort(cell, kind="stable")
    first = np.flatnonzero(np.diff(cell[order], prepend=-1))
    return np.minimum.reduceat(N[order], first), np.minimum.reduceat(D[order], first), cell


def position(N: np.ndarray, D: np.ndarray, among: Iterable[tuple[float, float]]) -> np.ndarray:
    """The index of each (N, D) in a list of cells, -1 where it is not there, (n,)."""
    known = np.log(np.array(list(among), dtype=float).reshape(-1, 2))
    if not len(known):
        return np.full(len(N), -1)
    apart = np.abs(np.log(np.stack([N, D], axis=-1))[:, None] - known[None]).max(axis=-1)
    return np.where((apart <= NEAR).any(axis=1), apart.argmin(axis=1), -1)
