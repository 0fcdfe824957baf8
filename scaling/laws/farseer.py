"""Loss whose exponent and scale in tokens change with the size of the model."""

from collections.abc import Mapping

import numpy as np

from scaling.laws.law import Inputs, Law, Parameter
from scaling.laws.terms import unpacked

SIZE = 1e9
"""Parameters at which the three curves have the values and slopes that they are named by."""

PUBLISHED = {"s": -0.062465, "q": 0.13, "S": 0.128488, "B": 230.734, "b": -0.1729, "Q": -1.5442, "A": -1.66563,
             "a": 0.0459, "E": 3.13335}  # fmt: skip
"""Of the released fit, in bits per character: L = exp(s N^q + S) + exp(B N^b + Q) D^-exp(A N^a + E)."""


def _curve(name: str, of: str, level: tuple[float, float], slope: tuple[float, float]) -> tuple[Parameter, ...]:
    return (
        Parameter(name, -20.0, 60.0, level, f"{of}, at 1e9 parameters"),
        Parameter(f"{name}_slope", -10.0, 10.0, slope, "its slope in ln N, at 1e9 parameters"),
        Parameter(f"{name}_bend", -2.0, 2.0, (-0.3, 0.3), "how fast the slope changes: 0 is a power of N"),
    )


class Farseer(Law):
    """The three functions of N, each of which the paper writes as c N^p + k, are written by their value, slope and bend
    at 1e9 parameters: value + slope ((N/1e9)^bend - 1) / bend, which is the same curve. c, p and k hardly are to be
    told apart; these are. `from_published` and `as_published` go between the two.
    """

    name = "farseer"
    formula = (
        "L = exp(floor(N)) + exp(scale(N)) D^-exp(rate(N)); "
        "each f(N) = f + f_slope ((N/1e9)^f_bend - 1) / f_bend, the paper's c N^p + k"
    )
    source = "Li et al. 2025, Farseer, arXiv 2506.10972, equation 5"
    inputs = ("N", "D")
    parameters = (
        *_curve("floor", "ln of the loss at endless data", (-2.0, 1.0), (-0.3, 0.0)),
        *_curve("scale", "ln of the scale in tokens", (1.0, 12.0), (-2.0, 0.5)),
        *_curve("rate", "ln of the exponent of tokens", (-2.0, -0.3), (-0.3, 0.1)),
    )

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        c = unpacked(coordinates)
        ln_n, ln_d = np.log(x["N"] / SIZE), np.log(x["D"])
        floor, scale, rate = (_bent(*c[start : start + 3], ln_n) for start in (0, 3, 6))
        steep = -np.exp(rate[0]) * ln_d
        reducible = scale[0] + steep
        loss = np.logaddexp(floor[0], reducible)
        of_floor, of_reducible = np.exp(floor[0] - loss), np.exp(reducible - loss)
        slopes = [
            *(of_floor * each for each in floor[1]),
            *(of_reducible * each for each in scale[1]),
            *(of_reducible * steep * each for each in rate[1]),
        ]
        return loss, np.stack(slopes, axis=-1)


def _bent(value: np.ndarray, slope: np.ndarray, bend: np.ndarray, ln_n: np.ndarray):
    """The curve, (S, n), and its derivative by value, slope and bend."""
    z = bend * ln_n
    near = np.abs(z) < 1e-4
    safe = np.where(near, 1.0, z)
    # (e^z - 1)/z and its derivative by z, by their series where they are 0/0.
    ratio = np.where(near, 1.0 + z / 2.0 + z**2 / 6.0, np.expm1(safe) / safe)
    by_z = np.where(near, 0.5 + z / 3.0, (np.exp(safe) - ratio) / safe)
    return value + slope * ln_n * ratio, (1.0, ln_n * ratio, slope * ln_n**2 * by_z)


def from_published(constants: Mapping[str, float]) -> dict[str, float]:
    """The parameters here of s, q, S, B, b, Q, A, a and E in the paper's form, whose exponents are not 0."""
    values = {}
    for name, (factor, power, shift) in {"floor": "sqS", "scale": "BbQ", "rate": "AaE"}.items():
        c, p, k = constants[factor], constants[power], constants[shift]
        values |= {name: c * SIZE**p + k, f"{name}_slope": c * p * SIZE**p, f"{name}_bend": p}
    return values


def as_published(values: Mapping[str, float]) -> dict[str, float]:
    """The inverse of `from_published`; a bend of 0 has none, and ValueError says so."""
    constants = {}
    for name, (factor, power, shift) in {"floor": "sqS", "scale": "BbQ", "rate": "AaE"}.items():
        value, slope, p = values[name], values[f"{name}_slope"], values[f"{name}_bend"]
        if p == 0:
            raise ValueError(f"{name}_bend = 0 is a power of N, which the paper's c N^p + k only approaches")
        constants |= {factor: slope / p / SIZE**p, power: p, shift: value - slope / p}
    return constants
