"""Memory that is freed and taken again."""

import subprocess
import sys

import pytest

ROUNDS, BLOCKS, MIB = 8, 6, 16
PROGRAM = f"""
import ctypes, resource, sys
from runtime.host_memory import keep_freed_memory

if not hasattr(ctypes.CDLL(None), "mallopt"):
    sys.exit("another C library: " + str(keep_freed_memory()))
if sys.argv[1] == "kept":
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    blocks = [bytearray({MIB} * 2**20) for _ in range({BLOCKS})]
    for block in blocks:
        block[:] = bytes(1) * len(block)
    del blocks, block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that the system hands out while blocks are taken, written and freed, again and again."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True)
    if done.stderr.startswith("another C library"):
        assert done.stderr.strip().endswith("False")
        pytest.skip("glibc's alone has mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_blocks_that_a_step_frees_are_there_for_the_next_one():
    assert faults("kept") < faults("left") / (ROUNDS / 2)
