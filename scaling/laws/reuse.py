"""Loss of models that go on from a trained one: grown, continued or warm-started."""

import numpy as np

from scaling.laws.chinchilla import DATA, FLOOR, SIZE
from scaling.laws.law import Inputs, Law, Parameter
from scaling.laws.terms import DATA_EXPONENT, SIZE_EXPONENT, log_loss, unpacked

PUBLISHED_SCALE = 1.0
"""D0, in tokens, with which the law is the paper's power of D1 itself: use it where every run has a parent."""

_REUSE = (
    Parameter("a1", -2.0, 10.0, (0.0, 1.0), "exponent of the parent's tokens"),
    Parameter("a3", -0.2, 0.5, (0.0, 0.1), "loss of the data exponent for each factor e of the parent's tokens"),
    Parameter("D0", PUBLISHED_SCALE, 1e13, (1e7, 1e10), "parent's tokens from which on they count", logarithmic=True),
)


def _data(b, beta, a1, a3, ln_d0, x: Inputs):
    """The term of data, B (1 + D1/D0)^-a1 D^-(beta - a3 ln(1 + D1/D0)), and its derivatives. D1 may be 0."""
    d0 = np.exp(ln_d0)
    head_start = np.log1p(x["D1"] / d0)
    ln_d = np.log(x["D"])
    by_head_start = a3 * ln_d - a1
    log = b - beta * ln_d + by_head_start * head_start
    by_d0 = -by_head_start * x["D1"] / (d0 + x["D1"])
    return log, {"B": 1.0, "beta": -ln_d, "a1": -head_start, "a3": head_start * ln_d, "D0": by_d0}


class Reuse(Law):
    """At one size of the model, after D1 tokens of its ancestors and D of its own: the more the parent was trained, the
    less further tokens bring.

    The paper's law, A D1^-a1 D^(-a2 + a3 ln D1) + E, has no value for D1 = 0. With 1 + D1/D0 for D1 it has one, that of
    training from the beginning, and it is the paper's law where D1 is much larger than D0. Where no run is from the
    beginning D0 cannot be told, and has to be fixed.
    """

    name = "reuse"
    formula = "L = E + B (1 + D1/D0)^-a1 D^-(beta - a3 ln(1 + D1/D0))"
    source = "arXiv 2510.06548, with D1 + D0 in place of D1"
    inputs = ("D", "D1")
    parameters = (FLOOR, DATA, DATA_EXPONENT, *_REUSE)
    coefficients = ("E", "B")
    floor = "E"
    zeros = ("D1",)

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        floor, *data = unpacked(coordinates)
        return log_loss(self.parameters, floor, [_data(*data, x)])


class ReuseSizes(Law):
    """The same over sizes: Chinchilla where D1 = 0."""

    name = "reuse_sizes"
    formula = "L = E + A N^-alpha + B (1 + D1/D0)^-a1 D^-(beta - a3 ln(1 + D1/D0))"
    source = "arXiv 2510.06548, with D1 + D0 in place of D1 and the size term of Hoffmann et al. 2022"
    inputs = ("N", "D", "D1")
    parameters = (FLOOR, SIZE, DATA, SIZE_EXPONENT, DATA_EXPONENT, *_REUSE)
    coefficients = ("E", "A", "B")
    floor = "E"
    zeros = ("D1",)

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        floor, a, b, alpha, beta, *reuse = unpacked(coordinates)
        ln_n = np.log(x["N"])
        terms = (
            (a - alpha * ln_n, {"A": 1.0, "alpha": -ln_n}),
            _data(b, beta, *reuse, x),
        )
        return log_loss(self.parameters, floor, terms)
