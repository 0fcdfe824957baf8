"""The learning rate as a straight line in the logarithm of size."""

import numpy as np

from scaling.laws.law import Inputs, Law, Parameter


class KaplanLr(Law):
    """Falls to zero at N = exp(c / d), beyond which it has no value: ln lr is NaN there."""

    name = "kaplan_lr"
    quantity = "lr"
    formula = "lr = c - d ln N"
    source = "Kaplan et al. 2020, arXiv 2001.08361, appendix D.6"
    inputs = ("N",)
    parameters = (
        Parameter("c", 1e-6, 1.0, (1e-4, 1e-1), "rate at N = 1", logarithmic=True),
        Parameter("d", 1e-8, 1.0, (1e-6, 1e-2), "what a factor of e in size takes away", logarithmic=True),
    )

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        first, slope = np.exp(coordinates.T[..., None])
        of_size = slope * np.log(x["N"])
        rate = first - of_size
        with np.errstate(invalid="ignore", divide="ignore"):
            value = np.log(np.where(rate > 0, rate, np.nan))
            return value, np.stack([first / rate, -of_size / rate], axis=-1)
