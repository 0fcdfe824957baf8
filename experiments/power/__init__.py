"""One setting of the Power schedule for all budgets and batches, against a constant rate chosen for each."""

from experiments.contest import DATA
from experiments.power.plan import SIZES, arms
from experiments.power.report import report

NAME = "power"

__all__ = ["DATA", "NAME", "SIZES", "arms", "report"]
