"""The laws by name."""

from scaling.laws.chinchilla import Chinchilla, ChinchillaTied
from scaling.laws.data_constrained import DataConstrained
from scaling.laws.farseer import Farseer
from scaling.laws.growth_timing import GrowthTiming
from scaling.laws.joint import Joint
from scaling.laws.kaplan import Kaplan
from scaling.laws.law import Law
from scaling.laws.over_training import OverTraining
from scaling.laws.parscale import ParScale, ParScaleTokens
from scaling.laws.recurrence import Recurrence
from scaling.laws.reuse import Reuse, ReuseSizes

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Chinchilla(),
        ChinchillaTied(),
        Kaplan(),
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
    """The law of this name; ValueError naming those there are."""
    if name not in LAWS:
        raise ValueError(f"law {name!r} is not known; accepted: {', '.join(sorted(LAWS))}")
    return LAWS[name]
