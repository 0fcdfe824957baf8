"""The loss as an irreducible part and a power of size and of data each."""

import numpy as np

from scaling.laws.law import Inputs, Law, Parameter

FLOOR = Parameter("E", 0.0, 50.0, (0.1, 3.0), "loss that neither size nor data removes")
SIZE = Parameter("A", 1e-6, 1e30, (1.0, 1e10), "what a lack of parameters costs at N = 1", logarithmic=True)
DATA = Parameter("B", 1e-6, 1e30, (1.0, 1e10), "what a lack of tokens costs at D = 1", logarithmic=True)


class Chinchilla(Law):
    name = "chinchilla"
    formula = "L = E + A N^-alpha + B D^-beta"
    source = "Hoffmann et al. 2022, arXiv 2203.15556, eq. 10 (approach 3)"
    inputs = ("N", "D")
    parameters = (
        FLOOR,
        SIZE,
        DATA,
        Parameter("alpha", 0.0, 3.0, (0.05, 1.2), "exponent of size"),
        Parameter("beta", 0.0, 3.0, (0.05, 1.2), "exponent of data"),
    )
    coefficients = ("E", "A", "B")
    floor = "E"

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        floor, size, data, alpha, beta = coordinates.T[..., None]
        log_size, log_data = np.log(x["N"]), np.log(x["D"])
        of_size, of_data = np.exp(size - alpha * log_size), np.exp(data - beta * log_data)
        loss = floor + of_size + of_data
        slopes = np.empty((len(coordinates), 5, len(log_size)))
        slopes[:, 0] = 1 / loss
        slopes[:, 1], slopes[:, 2] = of_size * slopes[:, 0], of_data * slopes[:, 0]
        slopes[:, 3], slopes[:, 4] = -log_size * slopes[:, 1], -log_data * slopes[:, 2]
        return np.log(loss), slopes.swapaxes(1, 2)


class ChinchillaTied(Law):
    name = "chinchilla_tied"
    formula = "L = E + A N^-alpha + B D^-alpha"
    source = "Hoffmann et al. 2022, arXiv 2203.15556, eq. 10 with beta = alpha"
    inputs = ("N", "D")
    parameters = (FLOOR, SIZE, DATA, Parameter("alpha", 0.0, 3.0, (0.05, 1.2), "exponent of size and of data"))
    coefficients = ("E", "A", "B")
    floor = "E"

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        values, slopes = Chinchilla().evaluate(coordinates[:, [0, 1, 2, 3, 3]], x)
        return values, np.concatenate([slopes[..., :3], slopes[..., 3:].sum(axis=-1, keepdims=True)], axis=-1)
