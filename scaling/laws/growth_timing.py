"""When to grow a model: tokens of the small one after which stacking it gives the lowest loss."""

import numpy as np

from scaling.laws.law import Inputs, Law, Parameter
from scaling.laws.terms import unpacked

PUBLISHED = {"a": 0.88, "b": 163.27, "c": -5.74}
"""For stacks of factor 4, fitted on targets of 0.41, 1.1 and 3B parameters and 0.8e20 to 1.2e21 FLOPs."""


class GrowthTiming(Law):
    """N is the size of the grown model and C the compute of the whole training."""

    name = "growth_timing"
    quantity = "growth_tokens"
    formula = "log10 d = a log10 N + b / log10 C + c"
    source = "Du et al. 2024, G_stack, arXiv 2405.15319, section on growth timing"
    inputs = ("N", "C")
    parameters = (
        Parameter("a", -5.0, 5.0, (0.0, 2.0), "exponent of size"),
        Parameter("b", -5e3, 5e3, (-300.0, 300.0), "of 1 / log10 C"),
        Parameter("c", -300.0, 300.0, (-20.0, 20.0), "level"),
    )

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        a, b, c = unpacked(coordinates)
        columns = (np.log(x["N"]), np.log(10.0) ** 2 / np.log(x["C"]), np.full_like(x["N"], np.log(10.0), dtype=float))
        log = a * columns[0] + b * columns[1] + c * columns[2]
        return log, np.broadcast_to(np.stack(columns, axis=-1), (*log.shape, 3)).copy()
