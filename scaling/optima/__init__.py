"""The best learning rate and batch: from grids of runs to bowls, to laws, to a decision with its regret."""

from scaling.optima.bowls import find_bowls
from scaling.optima.cells import Cell, cells
from scaling.optima.decision import decide
from scaling.optima.fitting import fit_optima
from scaling.optima.regret import regret, regrets
from scaling.optima.stability import fit_stability

__all__ = ["Cell", "cells", "decide", "find_bowls", "fit_optima", "fit_stability", "regret", "regrets"]
