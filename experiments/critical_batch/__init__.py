"""The measured noise scale against the critical batch that short branches with larger batches find."""

from experiments.contest import DATA
from experiments.critical_batch.plan import SIZES, arms
from experiments.critical_batch.report import report

NAME = "critical_batch"

__all__ = ["DATA", "NAME", "SIZES", "arms", "report"]
