"""A second stage of other text: re-warming, how far, and how much of the old text to replay."""

from experiments.contest import DATA
from experiments.rewarming.plan import SIZES, arms
from experiments.rewarming.report import report
from experiments.rewarming.text import prepare

NAME = "rewarming"

__all__ = ["DATA", "NAME", "SIZES", "arms", "prepare", "report"]
