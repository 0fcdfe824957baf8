"""Does a law of small runs tell the learning rate, batch and loss of a larger one?"""

from experiments.contest import DATA
from experiments.ladder.plan import SIZES, arms
from experiments.ladder.report import report

NAME = "ladder"

__all__ = ["DATA", "NAME", "SIZES", "arms", "report"]
