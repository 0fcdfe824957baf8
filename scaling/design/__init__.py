"""The next runs that reduce the regret of a decision most: a belief about bowls, and a design of runs under it."""
