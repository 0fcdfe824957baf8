"""Loss of models that use some of their parameters several times for each token."""

import numpy as np

from scaling.laws.chinchilla import DATA, FLOOR, SIZE
from scaling.laws.law import Inputs, Law, Parameter
from scaling.laws.terms import DATA_EXPONENT, SIZE_EXPONENT, log_loss, unpacked

REUSE = Parameter("phi", -0.5, 1.5, (0.0, 1.0), "r uses of a block are worth r^phi blocks of its size")


def effective_size(phi: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """ln of N_once + r^phi N_rec, and its derivative by phi. N_rec may be 0."""
    ln_r = np.log(x["r"])
    recurrent = np.exp(phi * ln_r) * x["N_rec"]
    total = x["N_once"] + recurrent
    return np.log(total), ln_r * recurrent / total


class Recurrence(Law):
    """Chinchilla with N for the parameters stored where phi = 0, and for those of the unrolled model where phi = 1."""

    name = "recurrence"
    formula = "L = E + A (N_once + r^phi N_rec)^-alpha + B D^-beta"
    source = "arXiv 2604.21106: phi = 0.46 over 116 runs with r from 1 to 8"
    inputs = ("N_once", "N_rec", "r", "D")
    parameters = (FLOOR, SIZE, DATA, SIZE_EXPONENT, DATA_EXPONENT, REUSE)
    coefficients = ("E", "A", "B")
    floor = "E"
    zeros = ("N_rec",)

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        floor, a, b, alpha, beta, phi = unpacked(coordinates)
        size, by_phi = effective_size(phi, x)
        data = np.log(x["D"])
        terms = (
            (a - alpha * size, {"A": 1.0, "alpha": -size, "phi": -alpha * by_phi}),
            (b - beta * data, {"B": 1.0, "beta": -data}),
        )
        return log_loss(self.parameters, floor, terms)
