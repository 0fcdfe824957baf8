"""A run that is killed at any moment, and started again, goes the way of one that never was."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.end_to_end.runs import Launch, different_tensors, finish, trajectory, write_run

PHASES = ("start-up", "training", "evaluation", "save")
MOST_LAUNCHES = 120


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("kill"))


def kill_at(launch: Launch, aim: str, chance: random.Random, startup_seconds: float) -> str | None:
    """Kill a launch at a random moment of the phase aimed at, and tell which it hit; None if it ended before."""
    if aim == "start-up":
        began, delay = time.monotonic(), chance.uniform(0, 1.1 * startup_seconds)
        reached = launch.wait_for(lambda: time.monotonic() - began > delay)
    elif aim == "save":
        reached = launch.wait_for(lambda: launch.is_training() and launch.is_saving())
        time.sleep(chance.uniform(0, 0.1))
    elif aim == "evaluation":
        reached = launch.wait_for(lambda: launch.is_training() and launch.is_evaluating())
        time.sleep(chance.uniform(0, 0.05))
    else:
        steps = chance.randint(1, 12)
        reached = launch.wait_for(lambda: launch.steps_taken() >= steps)
        time.sleep(chance.uniform(0, 0.05))
    if not reached or not launch.is_running():
        return None
    launch.kill()
    return launch.phase()


def survive(config: Path, processes: int, wanted: dict[str, int], seed: int) -> Counter[str]:
    """Kill runs until each phase was hit as often as wanted, restarting each by the same command until it finishes;
    the kills by phase. Every run must end as the one that nobody disturbs."""
    chance = random.Random(seed)
    whole = f"whole-{processes}"
    undisturbed = Launch(config, whole, processes)
    began = time.monotonic()
    undisturbed.wait_for(undisturbed.is_training)
    startup_seconds = time.monotonic() - began
    assert undisturbed.wait() == 0, undisturbed.output
    expected = trajectory(undisturbed.folder)

    kills: Counter[str] = Counter()
    launches = run = 0
    while missing := [phase for phase in PHASES for _ in range(wanted.get(phase, 0) - kills[phase])]:
        run += 1
        name = f"killed-{processes}-{run}"
        ended = False
        while not ended:
            launches += 1
            assert launches < MOST_LAUNCHES, kills
            launch = Launch(config, name, processes)
            hit = kill_at(launch, chance.choice(missing), chance, startup_seconds) if missing else None
            kills.update([hit] if hit else [])
            missing = [phase for phase in PHASES for _ in range(wanted.get(phase, 0) - kills[phase])]
            if hit is None:
                assert launch.wait() == 0, launch.output
                ended = True
        assert trajectory(launch.folder) == expected
        assert different_tensors(launch.folder, undisturbed.folder) == []
    print(f"{processes} processes, {launches} launches, {run} runs, {kills.total()} kills: {dict(kills)}")
    return kills


def test_a_killed_run_goes_the_same_way_bit_for_bit(config):
    kills = survive(config, 1, {"save": 1, "evaluation": 1, "training": 1}, seed=0)
    assert kills.total() >= 3 and kills["save"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_many_times_goes_the_same_way_bit_for_bit(config, processes):
    kills = survive(config, processes, {"start-up": 3, "training": 4, "evaluation": 2, "save": 6}, seed=processes)
    assert kills.total() >= 15 and kills["save"] >= 6
