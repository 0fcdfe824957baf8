"""Exit codes of a launch. 74 to 78 lie outside the shell's and Python's own; a scheduler can tell them apart."""

FINISHED = 0
BAD_INPUT = 2
"""Something the user can put right; the same command would end the same way."""
UNIDENTIFIED = 3
"""What was asked for cannot be told from these runs: an answer, which is written down."""
UNSAVED = 74
"""The last checkpoint could not be written, not at a second try either (EX_IOERR); the one before it stands."""
INTERRUPTED = 75
"""Asked to stop by a signal, with everything saved: the same command resumes (EX_TEMPFAIL of sysexits.h)."""
HUNG = 76
"""A step made no progress; the message names the rank furthest behind."""
DIVERGED = 77
"""Too many steps in a row were skipped; the weights are those from before them."""
REFUSED = 78
"""A growth that was to preserve the model's function did not; the checkpoint is of the model before it."""
