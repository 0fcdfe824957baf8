"""The laws by name."""

from scaling.laws.chinchilla import Chinchilla, ChinchillaTied
from scaling.laws.critical_batch import CRITICAL_BATCH_DATA, CriticalBatchOfLoss
from scaling.laws.data_constrained import DataConstrained
from scaling.laws.farseer import Farseer
from scaling.laws.growth_timing import GrowthTiming
from scaling.laws.joint import Joint
from scaling.laws.kaplan import Kaplan
from scaling.laws.kaplan_lr import KaplanLr
from scaling.laws.law import Law
from scaling.laws.one_input import DataOnly, SizeOnly
from scaling.laws.over_training import OverTraining
from scaling.laws.parscale import ParScale, ParScaleTokens
from scaling.laws.powers import (
    BATCH_FIXED_LR,
    CURVED_LR,
    DEEPSEEK_BATCH,
    DEEPSEEK_LR,
    GENERAL_BATCH,
    STABLE_LR,
    STEP_LAW_BATCH,
    STEP_LAW_LR,
    parse,
)
from scaling.laws.recurrence import Recurrence
from scaling.laws.reuse import Reuse, ReuseSizes
from scaling.laws.timescale import TIMESCALE

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        STEP_LAW_LR,
        STEP_LAW_BATCH,
        DEEPSEEK_LR,
        DEEPSEEK_BATCH,
        GENERAL_BATCH,
        BATCH_FIXED_LR,
        CURVED_LR,
        STABLE_LR,
        CRITICAL_BATCH_DATA,
        CriticalBatchOfLoss(),
        TIMESCALE,
        KaplanLr(),
        Chinchilla(),
        ChinchillaTied(),
        Kaplan(),
        SizeOnly(),
        DataOnly(),
        OverTraining(),
        DataConstrained(),
        Farseer(),
        ParScale(),
        ParScaleTokens(),
        Recurrence(),
        Reuse(),
        ReuseSizes(),
        Joint(),
        GrowthTiming(),
    )
}


def find(name: str) -> Law:
    """The law of this name, or the product of powers that it spells ("lr = m * tokens^-a"); ValueError for others."""
    if "=" in name:
        return parse(name)
    if name not in LAWS:
        raise ValueError(f"law {name!r} is not known; accepted: {', '.join(sorted(LAWS))}, or 'lr = ...'")
    return LAWS[name]
