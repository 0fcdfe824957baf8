"""What a law is: a formula for the logarithm of a quantity, its parameters with their bounds, and where it is from.

A law is evaluated for many parameter vectors at once, so that starts of a fit and bootstrap replicates cost one pass.
Parameters are fitted in coordinates: the logarithm of those that are `logarithmic`, the others as they are.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Quantity = Literal["loss", "lr", "max_lr", "batch_tokens", "critical_batch", "timescale", "growth_tokens"]
Inputs = Mapping[str, np.ndarray]
"""Of each row, by symbol: N, D, and what else a law names; all positive, each of shape (rows,)."""

SYMBOLS = {
    "D": "tokens",
    "B": "batch_tokens",
    "C": "flops",
    "M": "flops_per_token",
    "U": "unique_tokens",
    "P": "streams",
    "r": "recurrences",
    "N_once": "once",
    "N_rec": "recurrent",
    "D1": "parent_tokens",
}
"""The columns of a run table behind the symbols of formulas. N is the size column that a fit was asked for: total,
non_embedding or active. A symbol that is not here is itself the name of a column."""


@dataclass(frozen=True)
class Parameter:
    """One number of a law. Bounds and starts are of the number itself, not of its logarithm."""

    name: str
    lower: float
    upper: float
    starts: tuple[float, float]
    """Between which starting values are drawn: of a logarithmic parameter evenly in its logarithm."""
    meaning: str = ""
    logarithmic: bool = False

    def coordinate(self, value: np.ndarray | float) -> np.ndarray:
        return np.log(value) if self.logarithmic else np.asarray(value, dtype=float)

    def value(self, coordinate: np.ndarray | float) -> np.ndarray:
        return np.exp(coordinate) if self.logarithmic else np.asarray(coordinate, dtype=float)


class Law(ABC):
    """A new law is one small file with a subclass of this, listed in `scaling/laws/__init__.py`."""

    name: str
    quantity: Quantity = "loss"
    formula: str
    """As a reader would write it, in the symbols of `inputs` and the names of `parameters`."""
    source: str
    """Paper and equation."""
    inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    coefficients: tuple[str, ...] = ()
    """Parameters in which the quantity itself is linear, with no other term: least squares gives them for the rest."""
    floor: str = ""
    """The parameter that is the irreducible loss, if there is one."""
    zeros: tuple[str, ...] = ()
    """Inputs that may be 0."""
    alike: tuple[str, ...] = ()
    """What is no input, but has to be equal in all runs that the law is fitted to or told of."""

    @abstractmethod
    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """ln of the quantity and its derivative by the coordinates.

        `coordinates` (S, K), inputs (n,); returns (S, n) and (S, n, K).
        """

    def log_value(self, coordinates: np.ndarray, x: Inputs) -> np.ndarray:
        """ln of the quantity, (S, n)."""
        return self.evaluate(coordinates, x)[0]

    def coordinates(self, values: Mapping[str, float]) -> np.ndarray:
        """The parameter vector (K,) of values by name."""
        return np.array([float(each.coordinate(values[each.name])) for each in self.parameters])

    def values(self, coordinates: Sequence[float]) -> dict[str, float]:
        """The inverse of `coordinates`."""
        return {p.name: float(p.value(c)) for p, c in zip(self.parameters, coordinates, strict=True)}

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds of the coordinates, (K,) each."""
        low = np.array([float(each.coordinate(each.lower)) for each in self.parameters])
        high = np.array([float(each.coordinate(each.upper)) for each in self.parameters])
        return low, high
