"""A run that is killed at any moment, and started again, goes the way of one that never was."""

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from runtime.observe.jsonl import read_rows
from tests.end_to_end.runs import Launch, different_tensors, finish, trajectory, write_run

PHASES = ("start-up", "training", "evaluation", "save")
MOST_LAUNCHES = 120
TOLERANCE = 2e-5
"""Relative; what regrouped float32 sums may differ by (tests/distributed/test_parity.py)."""


class Undisturbed(NamedTuple):
    folder: Path
    startup_seconds: float


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def undisturbed(config) -> Callable[[int], Undisturbed]:
    """By the number of processes, the run that nobody kills."""
    known: dict[int, Undisturbed] = {}

    def get(processes: int) -> Undisturbed:
        if processes not in known:
            began = time.monotonic()
            launch = Launch(config, f"undisturbed-{processes}", processes)
            launch.wait_for(launch.is_training)
            known[processes] = Undisturbed(launch.folder, time.monotonic() - began)
            assert launch.wait() == 0, launch.output
        return known[processes]

    return get


def kill_at(launch: Launch, aim: str, chance: random.Random, startup_seconds: float) -> str | None:
    """Kill a launch at a random moment of the phase aimed at, and tell which it hit; None if it ended before."""
    began, wait = time.monotonic(), chance.uniform(0, 1.1 * startup_seconds)
    steps = chance.randint(1, 12)
    moments = {
        "start-up": lambda: time.monotonic() - began > wait,
        "training": lambda: launch.steps_taken() >= steps,
        "evaluation": lambda: launch.is_training() and launch.is_evaluating() and not launch.is_saving(),
        "save": lambda: launch.is_training() and launch.is_saving(),
    }
    reached = launch.wait_for(moments[aim])
    time.sleep(chance.uniform(0, {"training": 0.05, "save": 0.1}.get(aim, 0.02)))
    if not reached or not launch.is_running():
        return None
    launch.kill()
    return launch.phase()


def survive(config: Path, whole: Undisturbed, processes: int, wanted: dict[str, int], seed: int) -> Counter[str]:
    """Kill runs until each phase was hit as often as wanted, starting each again by the same command until it
    finishes; the kills by phase. Every run must end as the one that nobody disturbs."""
    chance = random.Random(seed)
    kills: Counter[str] = Counter()
    launches = runs = 0
    missing = list(Counter(wanted).elements())
    while missing:
        runs += 1
        hit: str | None = "nothing yet"
        while hit is not None:
            launches += 1
            assert launches < MOST_LAUNCHES, kills
            launch = Launch(config, f"killed-{processes}-{runs}", processes)
            hit = kill_at(launch, chance.choice(missing), chance, whole.startup_seconds) if missing else None
            kills.update([hit] if hit else [])
            missing = list((Counter(wanted) - kills).elements())
        assert launch.wait() == 0, launch.output
        assert trajectory(launch.folder) == trajectory(whole.folder)
        assert different_tensors(launch.folder, whole.folder) == []
    print(f"{processes} processes, {runs} runs, {launches} launches, {kills.total()} kills: {dict(kills)}")
    return kills


def test_a_killed_run_goes_the_same_way_bit_for_bit(config, undisturbed):
    kills = survive(config, undisturbed(1), 1, {"save": 1, "training": 1, "start-up": 1}, seed=0)
    assert kills.total() >= 3 and kills["save"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_many_times_goes_the_same_way_bit_for_bit(config, undisturbed, processes):
    wanted = {"start-up": 4, "training": 6, "evaluation": 4, "save": 8}
    kills = survive(config, undisturbed(processes), processes, wanted, seed=processes)
    assert kills.total() >= 20 and kills["save"] >= 5 and set(kills) == set(PHASES)


def test_torchrun_restarts_a_run_that_lost_a_worker(config, undisturbed):
    launch = Launch(config, "restarted", processes=2, restarts=2)
    assert launch.wait_for(lambda: launch.steps_taken() >= 6 and launch.has_saved()), launch.output
    launch.workers()[1].kill()
    assert launch.wait() == 0, launch.output
    events = [row["event"] for row in read_rows(launch.folder / "events.jsonl")]
    assert events.count("resume") == 1
    whole = undisturbed(2).folder
    assert trajectory(launch.folder) == trajectory(whole)
    assert different_tensors(launch.folder, whole) == []


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("parallel.tensor=2",)])
def test_a_killed_run_goes_on_with_more_processes(config, undisturbed, overrides):
    name = f"moved-{len(overrides)}"
    launch = Launch(config, name)
    assert launch.wait_for(lambda: launch.steps_taken() >= 10), launch.output
    launch.kill()
    finish(config, name, 2, overrides)
    ours, theirs = (trajectory(folder) for folder in (launch.folder, undisturbed(1).folder))
    assert [row[:3] for row in ours if len(row) > 3] == [row[:3] for row in theirs if len(row) > 3]
    losses = [[row[3] if len(row) > 3 else row[2] for row in rows] for rows in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
