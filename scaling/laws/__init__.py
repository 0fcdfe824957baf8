"""The laws by name."""

from scaling.laws.chinchilla import Chinchilla, ChinchillaTied
from scaling.laws.kaplan import Kaplan
from scaling.laws.law import Law

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Chinchilla(),
        ChinchillaTied(),
        Kaplan(),
    )
}


def find(name: str) -> Law:
    """The law of this name; ValueError naming those there are."""
    if name not in LAWS:
        raise ValueError(f"law {name!r} is not known; accepted: {', '.join(sorted(LAWS))}")
    return LAWS[name]
