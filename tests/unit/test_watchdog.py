"""The end of a hung run."""

import os
import signal
import subprocess
import sys

import pytest

from runtime.resilience.exits import HUNG
from runtime.resilience.watchdog import Beat, Watchdog, describe
from tests.agent import agent

NOW = 1031.4


def beat(beats, collectives=0, step=7, phase="step", published=NOW):
    return Beat(beats, collectives, step, phase, time=1000.0, published=published)


@pytest.mark.parametrize(
    "known, message",
    [
        ([beat(5), beat(4, step=6), beat(5)], "Furthest behind: rank 1 (step 6, step, for 31 s); rank 0 is furthest"),
        ([beat(5, 9), beat(5, 9), beat(5, 8)], "Furthest behind: rank 2 (step 7, step"),
        ([beat(4, 99), beat(5, 1)], "Furthest behind: rank 0 (step 7"),
        ([beat(3), beat(5), beat(3)], "Furthest behind: rank 0 (step 7, step, for 31 s), rank 2 (step 7"),
        (
            [beat(5, 8), beat(5, 9, published=NOW - 301)],
            "rank 1 (step 7, step, for 31 s, last heard of 301 s ago); rank 0",
        ),
        ([beat(5, 8), beat(5, 9, published=NOW - 299)], "Furthest behind: rank 0 (step 7"),
        ([beat(5), None], "Furthest behind: rank 1 (not heard of)"),
        ([beat(5, phase="evaluation")] * 3, "All 3 ranks are equally far: step 7, evaluation, for 31 s"),
        ([beat(5)], "Furthest behind: rank 0 (step 7, step, for 31 s)"),
        ([beat(1)] * 20 + [beat(2)], "and 12 more"),
    ],
)
def test_the_message_names_who_is_behind(known, message):
    text = describe(known, 600, NOW)
    assert text.startswith("hung: no progress for 600 s.") and message in text and "\n" not in text


def test_only_intervals_without_a_beat_count():
    watchdog = Watchdog(timeout_seconds=10)
    assert [watchdog.is_overdue() for _ in range(11)] == [False] * 9 + [True] * 2
    watchdog.beat(1, "step")
    assert [watchdog.is_overdue() for _ in range(11)] == [False] * 10 + [True]
    for step in range(20):
        watchdog.beat(step, "step")
        assert not watchdog.is_overdue()


def test_a_run_that_ends_in_time_or_by_an_error_of_its_own_is_left_alone():
    with Watchdog(timeout_seconds=1000) as watchdog:
        watchdog.beat(1, "step")
    with pytest.raises(RuntimeError, match="out of memory"), Watchdog(timeout_seconds=1000):
        raise RuntimeError("out of memory")


ALONE = """
import sys, time
from runtime.resilience.watchdog import Watchdog

with Watchdog(float(sys.argv[1])) as watchdog:
    watchdog.beat(41, "evaluation")
    {stuck}
"""


@pytest.mark.parametrize(
    "stuck, timeout",
    [
        ("time.sleep(1000)", 0.5),
        ("raise RuntimeError('[gloo/buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete')", 1000),
        ("raise RuntimeError('NCCL Watchdog caught collective operation timeout: WorkNCCL(SeqNum=2)')", 1000),
    ],
)
def test_a_hung_process_ends_with_a_message_its_stack_and_its_code(stuck, timeout):
    program = [sys.executable, "-c", ALONE.format(stuck=stuck), str(timeout)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == HUNG, done.stderr
    assert f"hung: no progress for {timeout:g} s. Furthest behind: rank 0 (step 41, evaluation" in done.stderr
    assert 'File "<string>"' in done.stderr


TOGETHER = """
import os, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from runtime.resilience.watchdog import Watchdog

behaviour, watchdog_seconds, collective_seconds = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
dist.init_process_group("gloo")
dist.barrier()  # they start seconds apart
group = dist.new_group(timeout=timedelta(seconds=collective_seconds))
guilty = dist.get_rank() == 1
# Whoever ends first closes the other's connections, which ends it with an error instead.
with Watchdog(watchdog_seconds + 2 * guilty) as watchdog:
    for step in range(1, 4):
        watchdog.beat(step, "step")
        dist.all_reduce(torch.ones(1), group=group)
    watchdog.beat(4, "evaluation")
    if guilty and behaviour == "asleep":
        time.sleep(1000)
    if guilty and behaviour == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(1), group=group)
"""


def launch(rank, environment, *arguments):
    environment = os.environ | environment | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", TOGETHER, *map(str, arguments)]
    return subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "behaviour, watchdog_seconds, collective_seconds, codes, place",
    [
        ("asleep", 5, 1000, [HUNG, HUNG], "step 4, evaluation"),
        ("stopped", 5, 1000, [HUNG, -signal.SIGKILL], ""),
        ("asleep", 1000, 3, [HUNG, -signal.SIGKILL], ""),
    ],
)
def test_the_rank_that_stays_away_from_a_collective_is_named(
    behaviour, watchdog_seconds, collective_seconds, codes, place
):
    with agent() as environment:
        processes = [launch(rank, environment, behaviour, watchdog_seconds, collective_seconds) for rank in range(2)]
        try:
            if codes[1] == HUNG:
                said = "".join(each.communicate(timeout=300)[1] for each in processes[::-1])
            else:
                said = processes[0].communicate(timeout=300)[1]
        finally:
            for each in processes:
                each.kill()
                each.wait()
    assert [each.returncode for each in processes] == codes, said
    assert said.count("Furthest behind") == 1, said
    assert f"Furthest behind: rank 1 ({place}" in said, said
    assert "all_reduce" in said
