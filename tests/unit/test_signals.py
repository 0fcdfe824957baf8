"""Signals, and the agreement of ranks on them."""

import signal
import subprocess
import sys

import pytest
import torch.distributed as dist

from runtime.resilience.exits import INTERRUPTED
from runtime.resilience.signals import Agreed, Interruption
from tests.workers import run_workers

both_signals = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@both_signals
def test_one_process_knows_of_a_signal_at_once_and_does_not_die_of_it(number):
    with Interruption() as interruption:
        assert not interruption.poll()
        interruption.exit_if_asked()
        signal.raise_signal(number)
        assert [interruption.poll() for _ in range(2)] == [Agreed(interrupted=True, out_of_time=False)] * 2


def test_start_up_ends_with_the_code_of_an_interruption():
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit) as raised:
            interruption.exit_if_asked()
    assert raised.value.code == INTERRUPTED


def test_what_a_rank_says_of_its_time_is_no_signal():
    with Interruption() as interruption:
        assert interruption.poll(out_of_time=True) == Agreed(interrupted=False, out_of_time=True)
        assert not interruption.poll()


def test_an_agreement_is_true_if_anything_is():
    assert not Agreed(False, False)
    assert Agreed(True, False) and Agreed(False, True)


@both_signals
def test_the_handlers_of_before_come_back(number):
    before = signal.getsignal(number)
    with Interruption():
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


BLOCKED = """
import sys
from datetime import timedelta
import torch.distributed as dist
from runtime.resilience.signals import Interruption

with Interruption():
    print("ready", file=sys.stderr, flush=True)
    dist.TCPStore("127.0.0.1", 0, world_size=2, is_master=True, timeout=timedelta(hours=1))
"""


def test_a_second_ctrl_c_ends_a_process_that_waits_outside_of_python():
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert "SIGINT" in process.stderr.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.communicate()


def polls(rank, signalled, late, steps):
    """Every poll's answer on this rank. At step 2 `signalled` gets a signal, at step 4 `late` is out of time."""
    answers = []
    with Interruption() as interruption:
        for step in range(steps):
            if step == 2 and rank == signalled:
                signal.raise_signal(signal.SIGTERM)
            answers.append(interruption.poll(out_of_time=step == 4 and rank == late))
    return answers


@pytest.mark.parametrize("world_size, signalled, late", [(2, 1, 0), (3, 0, 2), (3, None, 1)])
def test_all_ranks_learn_the_same_at_the_same_poll(world_size, signalled, late):
    answers = run_workers(polls, world_size, signalled, late, 7)
    assert all(each == answers[0] for each in answers)
    assert [each.out_of_time for each in answers[0]] == [False] * 5 + [True, False]
    heard = 3 if signalled is not None else 7
    assert [each.interrupted for each in answers[0]] == [False] * heard + [True] * (7 - heard)


def poll_before_the_others(rank):
    """Rank 1 begins its second poll only once rank 0 has come back from its own."""
    store = dist.distributed_c10d._get_default_store()
    with Interruption() as interruption:
        interruption.poll()
        if rank == 1:
            store.wait(["rank 0 is back"])
        interruption.poll()
        store.set("rank 0 is back", "yes") if rank == 0 else None
        return interruption.poll()


def test_a_poll_does_not_wait_for_the_poll_of_the_others():
    assert run_workers(poll_before_the_others, 2, timeout=120.0) == [Agreed(False, False)] * 2


def start_up(rank, signalled):
    with Interruption() as interruption:
        interruption.exit_if_asked()
        if rank == signalled:
            signal.raise_signal(signal.SIGINT)
        try:
            interruption.exit_if_asked()
        except SystemExit as left:
            return left.code
    return None


@pytest.mark.parametrize("signalled, code", [(1, INTERRUPTED), (None, None)])
def test_all_ranks_leave_start_up_together(signalled, code):
    assert run_workers(start_up, 2, signalled) == [code] * 2
