"""Loss of models that are trained on more or fewer tokens for each parameter than is optimal."""

import numpy as np

from scaling.laws.chinchilla import FLOOR
from scaling.laws.law import Inputs, Law, Parameter
from scaling.laws.terms import log_loss, unpacked


class OverTraining(Law):
    """Equal ratios M are parallel lines in ln C: over-training costs a factor, and the exponent stays.

    With C = 6 N D it says the same as Chinchilla with alpha = beta = 2 eta, A = a / 6^eta and B = b / 6^eta. It is
    another law where C counts attention, head or recomputation as they are.
    """

    name = "over_training"
    formula = "L = E + (a (D/N)^eta + b (D/N)^-eta) C^-eta"
    source = "Gadre et al. 2024, arXiv 2403.08540, equation 4"
    inputs = ("N", "D", "C")
    parameters = (
        FLOOR,
        Parameter("a", 1e-3, 1e15, (10.0, 1e5), "scale of the loss for too small a model", logarithmic=True),
        Parameter("b", 1e-3, 1e15, (10.0, 1e5), "scale of the loss for too few tokens", logarithmic=True),
        Parameter("eta", 0.005, 1.0, (0.05, 0.4), "exponent of compute and of the ratio"),
    )
    coefficients = ("E", "a", "b")
    floor = "E"

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        floor, a, b, eta = unpacked(coordinates)
        ratio, compute = np.log(x["D"] / x["N"]), np.log(x["C"])
        terms = (
            (a + eta * (ratio - compute), {"a": 1.0, "eta": ratio - compute}),
            (b - eta * (ratio + compute), {"b": 1.0, "eta": -ratio - compute}),
        )
        return log_loss(self.parameters, floor, terms)
