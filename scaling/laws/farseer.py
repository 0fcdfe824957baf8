"""Loss whose exponent and scale in tokens change with the size of the model."""

import math
from collections.abc import Mapping

import numpy as np

from scaling.laws.law import Inputs, Law, Parameter
from scaling.laws.terms import unpacked

SIZE = 1e9
"""Parameters at which the three curves have the values and slopes they are named by."""
LARGEST = 300.0
"""Of |ln| of a curve: far beyond any loss, and its exponential times an input is still a number."""

PUBLISHED = {"s": -0.062465, "q": 0.13, "S": 0.128488, "B": 230.734, "b": -0.1729, "Q": -1.5442, "A": -1.66563,
             "a": 0.0459, "E": 3.13335}  # fmt: skip
"""Of the released fit, in bits per character: L = exp(s N^q + S) + exp(B N^b + Q) D^-exp(A N^a + E)."""
PAPER = {"E": "sqS", "B": "BbQ", "beta": "AaE"}
"""Which of these are c, p and k of which curve."""


def _bent_parameters(name: str, of: str, starts: tuple[float, float], slopes: tuple[float, float], bounds=(1e-6, 1e30)):
    return (
        Parameter(name, *bounds, starts, f"{of}, at 1e9 parameters", logarithmic=True),
        Parameter(f"{name}_slope", -5.0, 5.0, slopes, f"slope of ln {name}(N) in ln N, at 1e9 parameters"),
        Parameter(f"{name}_bend", -1.0, 1.0, (-0.3, 0.3), "how that slope changes: 0 makes it a power of N"),
    )


class Farseer(Law):
    """The paper writes ln of E(N), of B(N) and of beta(N) as c N^p + k each. Here they are written by value, slope
    and bend at 1e9 parameters, ln f + f_slope ((N/1e9)^f_bend - 1) / f_bend, which are the same curves: c, p and k can
    hardly be told apart, these can. `from_published` and `as_published` go between the two.
    """

    name = "farseer"
    formula = (
        "L = E(N) + B(N) D^-beta(N); f(N) = f exp(f_slope ((N/1e9)^f_bend - 1) / f_bend), the paper's exp(c N^p + k)"
    )
    source = "Li et al. 2025, Farseer, arXiv 2506.10972, equation 5"
    inputs = ("N", "D")
    parameters = (
        *_bent_parameters("E", "loss at endless data", (0.1, 3.0), (-0.3, 0.05)),
        *_bent_parameters("B", "scale of the loss that data takes away", (1.0, 1e10), (-2.0, 0.5)),
        *_bent_parameters("beta", "exponent of data", (0.05, 1.2), (-0.3, 0.1), bounds=(0.01, 3.0)),
    )
    coefficients = ("E", "B")
    floor = "E"

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        c, ln_d = unpacked(coordinates), np.log(x["D"])
        sizes, row = np.unique(x["N"], return_inverse=True)  # of which there are few, and a curve is one of N alone
        curves = [_bent(*c[k : k + 3], np.log(sizes / SIZE)) for k in (0, 3, 6)]
        floor, scale, rate = (value[:, row] for value, _ in curves)
        steep = -np.exp(rate) * ln_d
        reducible = scale + steep
        loss = np.logaddexp(floor, reducible)
        of_floor, of_reducible = np.exp(floor - loss), np.exp(reducible - loss)
        slopes = np.empty((len(c[0]), len(c), len(ln_d)))
        for k, (factor, (_, by)) in enumerate(zip((of_floor, of_reducible, of_reducible * steep), curves, strict=True)):
            slopes[:, 3 * k] = factor
            for place, each in enumerate(by, 3 * k + 1):
                np.multiply(factor, each[:, row], out=slopes[:, place])
        return loss, slopes.swapaxes(1, 2)


def _bent(log_value: np.ndarray, slope: np.ndarray, bend: np.ndarray, ln_n: np.ndarray):
    """ln of the curve, (S, n), and its derivative by slope and bend; that by ln of its value is 1."""
    z = bend * ln_n
    near = np.abs(z) < 1e-4
    safe = np.where(near, 1.0, z)
    # (e^z - 1)/z and its derivative by z, by their series where they are 0/0.
    ratio = np.where(near, 1.0 + z / 2.0 + z**2 / 6.0, np.expm1(safe) / safe)
    by_z = np.where(near, 0.5 + z / 3.0, (np.exp(safe) - ratio) / safe)
    return np.clip(log_value + slope * ln_n * ratio, -LARGEST, LARGEST), (ln_n * ratio, slope * ln_n**2 * by_z)


def from_published(constants: Mapping[str, float]) -> dict[str, float]:
    """The parameters here of s, q, S, B, b, Q, A, a and E in the paper's form, whose exponents are not 0."""
    values = {}
    for name, letters in PAPER.items():
        c, p, k = (constants[letter] for letter in letters)
        values |= {name: math.exp(c * SIZE**p + k), f"{name}_slope": c * p * SIZE**p, f"{name}_bend": p}
    return values


def as_published(values: Mapping[str, float]) -> dict[str, float]:
    """The inverse of `from_published`; a bend of 0 has none, and ValueError says so."""
    constants = {}
    for name, (factor, power, shift) in PAPER.items():
        slope, p = values[f"{name}_slope"], values[f"{name}_bend"]
        if p == 0:
            raise ValueError(f"{name}_bend = 0 is a power of N, which the paper's c N^p + k only approaches")
        constants |= {factor: slope / p / SIZE**p, power: p, shift: math.log(values[name]) - slope / p}
    return constants
