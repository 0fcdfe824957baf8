"""Batches that grow, by plan or by measured noise, against constant ones: loss by tokens and by steps."""

from experiments.adaptive_batch.plan import SIZES, arms
from experiments.adaptive_batch.report import report
from experiments.contest import DATA

NAME = "adaptive_batch"

__all__ = ["DATA", "NAME", "SIZES", "arms", "report"]
