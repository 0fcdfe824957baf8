"""From a law and rows to its parameters, their intervals and verdicts on them."""

from scaling.fitting.fit import fit
from scaling.fitting.objective import Huber, HuberLikelihood, HuberOfNoise, LeastAbsolute, LeastSquares, Objective

__all__ = ["Huber", "HuberLikelihood", "HuberOfNoise", "LeastAbsolute", "LeastSquares", "Objective", "fit"]
