"""Tails of a stable run at equal tokens, branches from several points of it, and averages in place of a tail."""

from experiments.contest import DATA
from experiments.tails.plan import SIZES, arms
from experiments.tails.report import report

NAME = "tails"

__all__ = ["DATA", "NAME", "SIZES", "arms", "report"]
