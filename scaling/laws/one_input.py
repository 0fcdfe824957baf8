"""The loss as a floor and one power, where the other of size and data is equal in all runs.

What the equal one costs is a part of the floor, which is then no irreducible loss.
"""

import numpy as np

from scaling.laws.chinchilla import DATA, SIZE
from scaling.laws.law import Inputs, Law, Parameter
from scaling.laws.terms import DATA_EXPONENT, SIZE_EXPONENT, log_loss, unpacked


class OneInput(Law):
    """L = E + factor x^-exponent, of the one input."""

    floor = "E"

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        floor, factor, exponent = unpacked(coordinates)
        log = np.log(x[self.inputs[0]])
        _, of_factor, of_exponent = (each.name for each in self.parameters)
        return log_loss(self.parameters, floor, [(factor - exponent * log, {of_factor: 1.0, of_exponent: -log})])


def _floor(what: str) -> Parameter:
    return Parameter("E", 0.0, 50.0, (0.1, 3.0), f"irreducible loss, and what the {what} of these runs cost")


SOURCE = "Henighan et al. 2020, arXiv 2010.14701, eq. 1.1; arXiv 2203.15556, eq. 10, without one of its terms"


class SizeOnly(OneInput):
    name = "size_only"
    formula = "L = E + A N^-alpha"
    source = SOURCE
    inputs = ("N",)
    alike = ("D",)
    coefficients = ("E", "A")
    parameters = (_floor("tokens"), SIZE, SIZE_EXPONENT)


class DataOnly(OneInput):
    name = "data_only"
    formula = "L = E + B D^-beta"
    source = SOURCE
    inputs = ("D",)
    alike = ("N",)
    coefficients = ("E", "B")
    parameters = (_floor("parameters"), DATA, DATA_EXPONENT)
