"""Streams, recurrence and repeated data in one law, of which the laws of each are special cases."""

import numpy as np

from scaling.laws import parscale, recurrence
from scaling.laws.chinchilla import DATA, FLOOR, SIZE
from scaling.laws.data_constrained import REPEATED_DATA, saturating
from scaling.laws.law import Inputs, Law
from scaling.laws.terms import DATA_EXPONENT, SIZE_EXPONENT, log_loss, unpacked


class Joint(Law):
    """What `scaling.laws.nesting` lists as its special cases are had by fixing k, phi or R_D.

    D_eff = U + U R_D (1 - e^(-(D/U - 1) / R_D)) of U unique tokens among D.
    """

    name = "joint"
    formula = "L = E + A ((N_once + r^phi N_rec) (1 + k ln P))^-alpha + B D_eff^-beta"
    source = "product of the laws of recurrence (arXiv 2604.21106), ParScale (2505.10475) and repetition (2305.16264)"
    inputs = ("N_once", "N_rec", "r", "P", "D", "U")
    parameters = (
        FLOOR,
        SIZE,
        DATA,
        SIZE_EXPONENT,
        DATA_EXPONENT,
        recurrence.REUSE,
        parscale.GAIN,
        REPEATED_DATA,
    )
    coefficients = ("E", "A", "B")
    floor = "E"
    zeros = ("N_rec",)

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        floor, a, b, alpha, beta, phi, gain, ln_rd = unpacked(coordinates)
        looped, by_phi = recurrence.effective_size(phi, x)
        streamed, by_gain = parscale.effective_size(gain, np.ones_like(x["P"]), x["P"])
        size = looped + streamed
        unique = np.log(np.minimum(x["U"], x["D"]))
        worth, by_rd, _ = saturating(np.log(x["D"]) - unique, ln_rd)
        data = unique + worth
        terms = (
            (a - alpha * size, {"A": 1.0, "alpha": -size, "phi": -alpha * by_phi, "k": -alpha * by_gain}),
            (b - beta * data, {"B": 1.0, "beta": -data, "R_D": -beta * by_rd}),
        )
        return log_loss(self.parameters, floor, terms)
