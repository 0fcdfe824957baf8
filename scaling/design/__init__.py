"""The next runs that reduce the regret of a decision most: a belief about bowls, and a design of runs under it."""

from scaling.design.belief import belief
from scaling.design.posterior import Belief
from scaling.design.proposals import Proposal, next_runs
from scaling.design.runs import of_one_training

__all__ = ["Belief", "Proposal", "belief", "next_runs", "of_one_training"]
