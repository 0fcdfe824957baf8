"""What an analysis comes to: plain numbers and texts, for the terminal, the report, laws.json and the planner."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from scaling.laws import find
from scaling.laws.law import Inputs
from scaling.table import RunTable

Level = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Verdict:
    """One judgement: of the table, of a fit, or of a proposal. A failure of a fit means that it is not identified."""

    level: Level
    code: str
    """Short and stable, such as "edge" or "condition"."""
    message: str
    """A sentence with the numbers it rests on."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; an end is infinite where the data gives none."""

    value: float
    low: float
    high: float
    error: float = float("nan")
    """Standard error."""


@dataclass(frozen=True)
class Fit:
    """One law, fitted to rows of a table (loss) or to optima (lr, batch_tokens)."""

    law: str
    size: str
    """The column that N means: total, non_embedding or active."""
    coordinates: np.ndarray
    """(K,) as of `Law.coordinates`."""
    draws: np.ndarray
    """(B, K), of the cluster bootstrap."""
    parameters: Mapping[str, Estimate]
    noise: float
    """Robust standard deviation of the residuals in ln of the quantity."""
    rows: int
    clusters: int
    """Runs or cells that were drawn as a whole."""
    spans: Mapping[str, tuple[float, float]]
    """Smallest and largest of each input, and of C."""
    verdicts: tuple[Verdict, ...] = ()
    fixed: Mapping[str, float] = field(default_factory=dict)
    """Parameters that were not fitted."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else is reported, as JSON: estimator, starts and the share that found the best basin, condition number,
    other estimators' values, profile intervals, seed of the bootstrap."""

    @property
    def identified(self) -> bool:
        return not any(each.level == "failure" for each in self.verdicts)

    @property
    def quantity(self) -> str:
        return find(self.law).quantity

    def predict(self, x: Inputs) -> np.ndarray:
        """The quantity itself at inputs by symbol, (n,)."""
        return np.exp(find(self.law).log_value(self.coordinates[None], x)[0])

    def predictions(self, x: Inputs) -> np.ndarray:
        """The same for each bootstrap draw, (B, n)."""
        return np.exp(find(self.law).log_value(self.draws, x))


@dataclass(frozen=True)
class Bowl:
    """The loss of one cell (equal N, D and all else) over ln lr and ln B, and where it is lowest."""

    cell: Mapping[str, float]
    """N, D and what else is equal in it, by column."""
    runs: int
    lr: Estimate | None
    batch_tokens: Estimate | None
    loss: float
    """At the vertex, or the lowest of the runs where there is none."""
    curvature: tuple[float, ...] = ()
    """Of ln loss: d2/dlnlr2, d2/dlnlr dlnB, d2/dlnB2; empty where no convex bowl was found."""
    window: float = float("nan")
    """Excess loss within which runs were used."""
    censored: Mapping[str, Literal["below", "above"]] = field(default_factory=dict)
    """Of lr and batch_tokens: the optimum lies at or beyond the edge of the grid, on this side."""
    best: Mapping[str, float] = field(default_factory=dict)
    """lr, batch_tokens and loss of the best run."""
    note: str = ""


@dataclass(frozen=True)
class Plateau:
    """The range of one setting that costs less than `cost` (a share of the loss) with the other at its best."""

    low: float
    high: float
    cost: float = 1e-3


@dataclass(frozen=True)
class Decision:
    """A proposal at a target, with the intervals of what is decided."""

    target: Mapping[str, float]
    """What was asked for: some of N, D, C."""
    proposal: Mapping[str, Estimate]
    """N, D, lr, batch_tokens, loss: those that the fits can tell."""
    plateau: Mapping[str, Plateau]
    regret: float
    """Expected excess of the loss over the best, as a share of it, for not knowing the optimum; NaN if unknown."""
    extrapolation: float
    """Compute of the target over the largest compute of the rows."""
    verdicts: tuple[Verdict, ...] = ()
    excess: float = 0.0
    """Of the loss, as a share, for a batch or a rate that is held off its optimum: part of the proposed loss."""


@dataclass(frozen=True)
class HeldOut:
    """One law's predictions of rows that it was not fitted to."""

    law: str
    size: str
    split: str
    """How rows were held out, such as "largest compute" or "N = 1.07e9"."""
    trained: int
    tested: int
    error: float
    """Mean of |predicted / measured - 1|."""
    error_se: float
    bias: float
    """Mean of predicted / measured - 1."""
    coverage: float
    """Share of measurements within their 95 % prediction intervals; NaN for a baseline."""
    measured: tuple[float, ...] = ()
    """Of each held-out row, for a plot."""
    predicted: tuple[float, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """All that a report says."""

    table: RunTable
    used: np.ndarray
    """(rows,) of bool: the rows that were fitted."""
    gates: tuple[Verdict, ...]
    """Of the table: what was left out, pooled, or looks wrong."""
    fits: tuple[Fit, ...]
    """Loss laws first, the chosen one at their head; then lr and batch_tokens."""
    held_out: tuple[HeldOut, ...] = ()
    bowls: tuple[Bowl, ...] = ()
    decisions: tuple[Decision, ...] = ()
    frontier: Mapping[str, Any] = field(default_factory=dict)
    """Approaches 1 and 2: exponents of N and D in C, and the points they rest on, as JSON."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Command, versions, time, fingerprints, options."""
    fitted: tuple[int, ...] = ()
    """The rows that loss laws were fitted to, by number, where these are fewer than the used ones: the best run of each
    cell of a grid of lr and batch."""

    def best(self, quantity: str) -> Fit | None:
        """The first fit of a quantity, which is the chosen one."""
        return next((each for each in self.fits if each.quantity == quantity), None)
