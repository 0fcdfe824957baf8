"""Loss of models that see the same tokens several times."""

import numpy as np

from scaling.laws.chinchilla import DATA, FLOOR, SIZE
from scaling.laws.law import Inputs, Law, Parameter
from scaling.laws.terms import DATA_EXPONENT, SIZE_EXPONENT, log_loss, unpacked

ENDLESS = 1e9
"""Repetitions that are worth as much as new tokens: with R_D and R_N at this value the law is Chinchilla's."""

REPEATED_DATA = Parameter(
    "R_D", 0.1, ENDLESS, (2.0, 50.0), "repetitions after which more are worth little", logarithmic=True
)
EXCESS_SIZE = Parameter(
    "R_N", 0.1, ENDLESS, (1.0, 50.0), "times the size for the unique tokens after which more is worth little", True
)


class DataConstrained(Law):
    """Each repetition is worth less than the one before, and so is a model too large for its unique tokens.

    D' = U + U R_D (1 - e^(-R / R_D)) with R = D/U - 1 repetitions of U unique tokens; N' likewise with N/U_N - 1, where
    U_N is the lesser of N and the size that is compute-optimal for U tokens under the law's own A, B, alpha and beta.
    """

    name = "data_constrained"
    formula = "L = E + A N'^-alpha + B D'^-beta; D' = U + U R_D (1 - exp(-(D/U - 1) / R_D)), N' likewise with R_N"
    source = "Muennighoff et al. 2023, arXiv 2305.16264, equations 5 to 7"
    inputs = ("N", "D", "U")
    parameters = (FLOOR, SIZE, DATA, SIZE_EXPONENT, DATA_EXPONENT, REPEATED_DATA, EXCESS_SIZE)
    floor = "E"

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        floor, a, b, alpha, beta, ln_rd, ln_rn = unpacked(coordinates)
        ln_n = np.log(x["N"])
        unique = np.log(np.minimum(x["U"], x["D"]))
        worth, by_rd, _ = saturating(np.log(x["D"]) - unique, ln_rd)
        data = unique + worth

        # The size at which more parameters and more tokens bring as much for their compute, at U tokens.
        optimal = (np.log(alpha) + a - np.log(beta) - b + beta * unique) / alpha
        excessive = optimal < ln_n
        base = np.where(excessive, optimal, ln_n)
        worth, by_rn, by_excess = saturating(ln_n - base, ln_rn)
        size = base + worth
        by_base = np.where(excessive, 1.0 - by_excess, 0.0)
        by_size = {
            "A": 1.0 - by_base,
            "B": by_base,
            "alpha": -size - by_base * (1.0 / alpha - optimal),
            "beta": -by_base * (unique - 1.0 / beta),
            "R_N": -alpha * by_rn,
        }
        terms = (
            (a - alpha * size, by_size),
            (b - beta * data, {"B": 1.0, "beta": -data, "R_D": -beta * by_rd}),
        )
        return log_loss(self.parameters, floor, terms)


def saturating(ln_ratio: np.ndarray, ln_limit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ln(1 + L (1 - e^(-R/L))) of the ratio 1 + R and the limit L, and its derivative by ln L and by ln(1 + R)."""
    limit = np.exp(ln_limit)
    repeated = np.expm1(np.minimum(ln_ratio, 300.0))  # beyond it only hopeless starting values lead
    z = repeated / limit
    worth = 1.0 - limit * np.expm1(-z)
    by_limit = limit * (-np.expm1(-z) - z * np.exp(-z)) / worth
    return np.log(worth), by_limit, (1.0 + repeated) * np.exp(-z) / worth
