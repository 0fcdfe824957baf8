"""Loss of models that run each token through several streams with the same parameters."""

import numpy as np

from scaling.laws.chinchilla import DATA, FLOOR, SIZE
from scaling.laws.law import Inputs, Law, Parameter
from scaling.laws.terms import DATA_EXPONENT, SIZE_EXPONENT, log_loss, unpacked

GAIN = Parameter("k", 0.0, 10.0, (0.05, 1.0), "P streams are worth 1 + k ln P times the parameters")


def effective_size(gain: np.ndarray, size: np.ndarray, streams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln of N (1 + k ln P), and its derivative by k."""
    ln_p = np.log(streams)
    worth = 1.0 + gain * ln_p
    return np.log(size) + np.log(worth), ln_p / worth


class ParScale(Law):
    """At one number of tokens. N is non-embedding, with the parameters that the streams add."""

    name = "parscale"
    formula = "L = E + (A / (N (1 + k ln P)))^alpha"
    source = "Chen et al. 2025, ParScale, arXiv 2505.10475, equation 4"
    inputs = ("N", "P")
    parameters = (
        FLOOR,
        Parameter("A", 1.0, 1e15, (1e5, 1e10), "parameters at which size costs 1 of loss", logarithmic=True),
        SIZE_EXPONENT,
        GAIN,
    )
    floor = "E"

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        floor, a, alpha, gain = unpacked(coordinates)
        size, by_gain = effective_size(gain, x["N"], x["P"])
        terms = ((alpha * (a - size), {"A": alpha, "alpha": a - size, "k": -alpha * by_gain}),)
        return log_loss(self.parameters, floor, terms)


class ParScaleTokens(Law):
    """ParScale over sizes and tokens: Chinchilla where k = 0 or P = 1."""

    name = "parscale_tokens"
    formula = "L = E + A (N (1 + k ln P))^-alpha + B D^-beta"
    source = "Chen et al. 2025, ParScale, arXiv 2505.10475, equation 4, with the data term of Hoffmann et al. 2022"
    inputs = ("N", "D", "P")
    parameters = (FLOOR, SIZE, DATA, SIZE_EXPONENT, DATA_EXPONENT, GAIN)
    coefficients = ("E", "A", "B")
    floor = "E"

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        floor, a, b, alpha, beta, gain = unpacked(coordinates)
        size, by_gain = effective_size(gain, x["N"], x["P"])
        data = np.log(x["D"])
        terms = (
            (a - alpha * size, {"A": 1.0, "alpha": -size, "k": -alpha * by_gain}),
            (b - beta * data, {"B": 1.0, "beta": -data}),
        )
        return log_loss(self.parameters, floor, terms)
