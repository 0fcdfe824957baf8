"""From a law and rows to its parameters, their intervals and verdicts on them."""
