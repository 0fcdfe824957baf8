"""The loss without an irreducible part, with size and data in one bracket."""

import numpy as np

from scaling.laws.law import Inputs, Law, Parameter


class Kaplan(Law):
    name = "kaplan"
    formula = "L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D"
    source = "Kaplan et al. 2020, arXiv 2001.08361, eq. 1.5"
    inputs = ("N", "D")
    parameters = (
        Parameter("N_c", 1e-6, 1e40, (1e9, 1e18), "size at which endless data gives a loss of 1", logarithmic=True),
        Parameter("D_c", 1e-6, 1e40, (1e9, 1e18), "data at which endless size gives a loss of 1", logarithmic=True),
        Parameter("alpha_N", 1e-3, 3.0, (0.03, 0.5), "exponent of size"),
        Parameter("alpha_D", 1e-3, 3.0, (0.03, 0.5), "exponent of data"),
    )

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        size, data, alpha_size, alpha_data = coordinates.T[..., None]
        lack_of_size, lack_of_data = size - np.log(x["N"]), data - np.log(x["D"])
        of_size = alpha_size / alpha_data * lack_of_size
        bracket = np.logaddexp(of_size, lack_of_data)
        share = np.exp(of_size - bracket)
        slopes = np.empty((len(coordinates), 4, share.shape[1]))
        slopes[:, 0], slopes[:, 1] = alpha_size * share, alpha_data * (1 - share)
        slopes[:, 2], slopes[:, 3] = share * lack_of_size, bracket - share * of_size
        return alpha_data * bracket, slopes.swapaxes(1, 2)
