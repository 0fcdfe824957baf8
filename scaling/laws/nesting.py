"""Which laws are special cases of which: by fixed values of the larger law's parameters, or by tied ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from scaling.laws.data_constrained import ENDLESS

IDLE: dict[str, dict[str, float]] = {
    "r": {"phi": 0.0},
    "P": {"k": 0.0},
    "U": {"R_D": ENDLESS, "R_N": ENDLESS},
    "D1": {"a1": 0.0, "a3": 0.0, "D0": 1e9},
}
"""By input: the values of parameters with which a law does not depend on it. Where the input does not vary in a table
(or, of U, no token is seen twice) these parameters cannot be told and are fixed so."""


@dataclass(frozen=True)
class Nesting:
    smaller: str
    larger: str
    fixed: Mapping[str, float] = field(default_factory=dict)
    """Values of the larger law's parameters with which it is the smaller one."""
    lift: Callable[[dict[str, float]], dict[str, float]] = dict
    """From the smaller law's values to those of the same name, or tied to them, in the larger one."""

    def values(self, smaller: Mapping[str, float]) -> dict[str, float]:
        """The larger law's values that say what these of the smaller one say."""
        return self.lift(dict(smaller)) | dict(self.fixed)


def _tied(values: dict[str, float]) -> dict[str, float]:
    return values | {"beta": values["alpha"]}


def _in_compute(values: dict[str, float]) -> dict[str, float]:
    """Gadre's form with C = 6 N D as a sum of powers of N and D."""
    eta = values["eta"]
    return {"E": values["E"], "A": values["a"] * 6**-eta, "B": values["b"] * 6**-eta, "alpha": 2 * eta}


NESTINGS = (
    Nesting("chinchilla_tied", "chinchilla", lift=_tied),
    Nesting("over_training", "chinchilla_tied", lift=_in_compute),
    Nesting("chinchilla", "data_constrained", IDLE["U"]),
    Nesting("chinchilla", "parscale_tokens", IDLE["P"]),
    Nesting("chinchilla", "recurrence", IDLE["r"]),
    Nesting("chinchilla", "reuse_sizes", IDLE["D1"]),
    Nesting("chinchilla", "joint", {"phi": 0.0, "k": 0.0, "R_D": ENDLESS}),
    Nesting("parscale_tokens", "joint", {"phi": 0.0, "R_D": ENDLESS}),
    Nesting("recurrence", "joint", {"k": 0.0, "R_D": ENDLESS}),
)
"""N of the smaller law is N_once + N_rec of the larger one. over_training is chinchilla_tied if C is 6 N D."""


def nesting(smaller: str, larger: str) -> Nesting | None:
    """How the smaller law is a case of the larger one, directly; None if it is not."""
    return next((each for each in NESTINGS if (each.smaller, each.larger) == (smaller, larger)), None)


def same_as(law: str, fixed: Mapping[str, float]) -> str | None:
    """The law that this one becomes with these parameters fixed, where that is one of its own name."""
    found = (each for each in NESTINGS if each.larger == law and fixed and dict(each.fixed) == dict(fixed))
    return next((each.smaller for each in found), None)
