"""A run that is told to stop, runs out of time, hangs or diverges says so, and loses nothing."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.assembly import open_trainer
from runtime.checkpoint.unsharded import open_unsharded
from runtime.observe.jsonl import read_rows
from runtime.resilience.exits import DIVERGED, FINISHED, HUNG, INTERRUPTED
from tests.corpus import tiny_run, write_corpus
from tests.end_to_end.runs import BATCH, ROOT, Launch, different_tensors, finish, main, newest, trajectory, write_run
from tests.workers import run_workers


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("interruption"))


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "events.jsonl") if row["event"] == name]


def assert_saved_where_it_stopped(launch: Launch) -> int:
    """The tokens at which a stopped launch stands, after checking that its checkpoint is from there."""
    tokens = read_rows(launch.folder / "metrics.jsonl")[-1]["tokens"]
    assert newest(launch.folder) == f"tokens-{tokens}-segment-0"
    return tokens


# One process.


def test_a_signal_ends_one_process_with_a_code_of_its_own_and_nothing_is_lost(config):
    undisturbed = finish(config, "undisturbed").folder
    chance = random.Random(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        launch = Launch(config, "stopped")
        assert launch.wait_for(lambda: launch.catches(signal.SIGTERM)), launch.output  # noqa: B023
        time.sleep(chance.uniform(0.1, 0.6))  # of the two or three seconds that a start takes
        assert not launch.is_training()
        launch.workers()[0].send_signal(number)
        assert launch.wait() == INTERRUPTED, launch.output
        assert "Traceback" not in launch.output
        assert not launch.folder.exists()

    launch = Launch(config, "stopped")
    assert launch.wait_for(lambda: launch.steps_taken() >= 2), launch.output
    launch.workers()[0].send_signal(signal.SIGTERM)
    assert launch.wait() == INTERRUPTED, launch.output
    assert "SIGTERM: saving and stopping" in launch.output
    stopped_at = assert_saved_where_it_stopped(launch)

    launch = Launch(config, "stopped")
    assert launch.wait_for(lambda: launch.is_training() and launch.is_evaluating()), launch.output
    launch.workers()[0].send_signal(signal.SIGINT)
    assert launch.wait() == INTERRUPTED, launch.output
    assert assert_saved_where_it_stopped(launch) > stopped_at

    finish(config, "stopped")
    assert [event["outcome"] for event in events(launch.folder, "run_end")] == [
        "interrupted",
        "interrupted",
        "finished",
    ]
    assert trajectory(launch.folder) == trajectory(undisturbed)
    assert different_tensors(launch.folder, undisturbed) == []


# Two processes.


def test_a_signal_to_any_process_stops_all_of_them_at_one_step(config):
    launch = Launch(config, "together", processes=2)
    assert launch.wait_for(lambda: launch.steps_taken() >= 2), launch.output
    workers = launch.workers()
    workers[1].send_signal(signal.SIGTERM)
    assert launch.wait() != FINISHED
    assert f"exitcode: {INTERRUPTED}" in launch.output or f"exitcode  : {INTERRUPTED}" in launch.output
    stopped_at = assert_saved_where_it_stopped(launch)

    launch = Launch(config, "together", processes=2)
    assert launch.wait_for(lambda: launch.steps_taken() >= 2), launch.output
    launch.processes()[0].send_signal(signal.SIGTERM)
    assert launch.wait() != FINISHED
    assert assert_saved_where_it_stopped(launch) > stopped_at
    assert [event["outcome"] for event in events(launch.folder, "run_end")] == ["interrupted", "interrupted"]


@pytest.mark.slow
def test_processes_stopped_together_resume_bit_for_bit(config):
    undisturbed = finish(config, "undisturbed-2", 2).folder
    chance = random.Random(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        for in_evaluation in (False, True):
            launch = Launch(config, "stopped-2", processes=2)
            reached = launch.is_evaluating if in_evaluation else lambda: True
            assert launch.wait_for(lambda: launch.steps_taken() >= 2 and reached()), launch.output  # noqa: B023
            chance.choice(launch.workers()).send_signal(number)
            assert launch.wait() != FINISHED
            assert_saved_where_it_stopped(launch)
    finish(config, "stopped-2", 2)
    assert trajectory(launch.folder) == trajectory(undisturbed)
    assert different_tensors(launch.folder, undisturbed) == []


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 2.0, 3.5, 5.0])
def test_a_signal_in_start_up_ends_all_processes(config, seconds):
    launch = Launch(config, f"early-{seconds}", processes=2)
    assert launch.wait_for(lambda: len(launch.workers()) == 2), launch.output
    time.sleep(seconds)
    began = time.monotonic()
    launch.processes()[0].send_signal(signal.SIGTERM)
    assert launch.wait() != FINISHED
    assert time.monotonic() - began < 25
    assert f'File "{ROOT}' not in launch.output  # torchrun has a traceback of its own


def test_a_hung_process_is_named(config):
    launch = Launch(config, "hung", processes=2, overrides=("run.timeout_seconds=12",))
    assert launch.wait_for(lambda: launch.steps_taken() >= 2), launch.output
    launch.workers()[1].suspend()
    assert launch.wait_for(lambda: f"exits with code {HUNG}" in launch.output), launch.output
    launch.wait_for(lambda: not launch.workers()[:1] or len(launch.workers()) < 2)
    launch.kill()
    message = next(line for line in launch.output.splitlines() if line.startswith("hung:"))
    assert "Furthest behind: rank 1 (step" in message and "rank 0 is furthest" in message


# The trainer itself, on workers.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("guarded")
    write_corpus(folder / "data" / "train")
    write_corpus(folder / "data" / "heldout", documents=20, seed=1)
    return folder


def launch_with_bad_samples(rank: int, folder: Path, sections: dict[str, Any], bad: range, bad_rank: int) -> str:
    """One launch of a tiny run in which the loss of a batch with `bad` samples is NaN on one rank."""
    with open_trainer(tiny_run(folder, **sections), "") as trainer:

        def spoil(_module: Any, _inputs: Any, losses: Any) -> Any:
            first = trainer.state.next_position(trainer.config.batch.sequences)
            hit = torch.is_grad_enabled() and rank == bad_rank and first in bad
            return losses._replace(cross_entropy=losses.cross_entropy * torch.nan) if hit else losses

        trainer.decoder.register_forward_hook(spoil)
        return str(trainer.run())


def train(folder: Path, name: str, bad: range = range(0), processes: int = 2, **sections: dict[str, Any]) -> str:
    sections["run"] = {"name": name, **sections.get("run", {})}
    (outcome,) = set(run_workers(launch_with_bad_samples, processes, folder, sections, bad, processes - 1))
    return outcome


TINY = 8 * 32
"""Tokens of a batch of the tiny run, whose samples are 8."""


def test_a_non_finite_step_reaches_no_weights_on_any_rank(folder):
    options = {"optim": {"ema_half_life": "1K"}, "checkpoint": {"every": 1, "keep_last": 20}}
    assert train(folder, "skip", range(32, 40), **options) == "finished"
    run = folder / "runs" / "skip"
    before, after, later = (
        open_unsharded(run / "checkpoints" / f"tokens-{step * TINY}-segment-0")[0] for step in (4, 5, 6)
    )
    kept = [name for name in before if not name.startswith("guard.")]
    assert [name for name in kept if not torch.equal(before[name], after[name])] == []
    assert all(not torch.equal(after[name], later[name]) for name in kept if name.startswith("model."))
    (skipped,) = events(run, "skipped_step")
    assert (skipped["step"], skipped["tokens"], skipped["samples"]) == (5, 5 * TINY, [32, 40])
    rows = read_rows(run / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0] * 4 + [1] * 8
    assert "loss" not in rows[4] and all(torch.isfinite(each).all() for each in later.values())


def test_too_many_skipped_steps_in_a_row_end_with_a_checkpoint(folder):
    assert train(folder, "diverged", range(32, 1000), guard={"max_consecutive": 3}) == "diverged"
    run = folder / "runs" / "diverged"
    assert newest(run) == f"tokens-{7 * TINY}-segment-0"
    tensors, state = open_unsharded(run)
    assert all(torch.isfinite(each).all() for each in tensors.values() if each.is_floating_point())
    assert state["train"]["skipped"] == 3
    assert events(run, "run_end")[-1]["outcome"] == "diverged"


def diverge(rank: int, argv: list[str]) -> tuple[int, str]:
    """The command itself with losses that are never finite."""
    from runtime.model.decoder import Decoder

    forward = Decoder.forward

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        losses = forward(*args, **kwargs)
        return losses._replace(cross_entropy=losses.cross_entropy * torch.nan)

    Decoder.forward = spoiled
    try:
        return main(rank, argv)
    finally:
        Decoder.forward = forward


def test_divergence_has_a_code_and_a_message(config):
    ((code, output),) = run_workers(diverge, 1, [str(config), "run.name=nowhere", "guard.max_consecutive=4"])
    assert code == DIVERGED
    assert "stopping: 4 steps in a row were skipped, up to step 4 (samples 0 to 31)" in output
    assert newest(config.parent / "runs" / "nowhere") == f"tokens-{4 * BATCH}-segment-0"


def test_a_rollback_steps_over_the_samples(folder):
    guard = {"max_consecutive": 2, "on_spike": "rollback"}
    options = {"guard": guard, "checkpoint": {"every": 2 * TINY}}
    assert train(folder, "rollback", range(48, 64), **options) == "finished"
    run = folder / "runs" / "rollback"
    (event,) = events(run, "rollback")
    assert event["samples"] == [48, 64]
    assert event["tokens"] <= 6 * TINY < event["left_at"] == 8 * TINY
    rows = read_rows(run / "metrics.jsonl")
    assert [row["tokens"] for row in rows] == [TINY * step for step in range(1, 13)]
    assert all("loss" in row for row in rows)
    state = open_unsharded(run)[1]["train"]
    assert (state["position"], state["clock"]["sequences"], state["avoided"]) == (14 * 8, 12 * 8, [[48, 64]])


def test_a_rollback_that_cannot_help_stops_the_run(folder):
    guard = {"max_consecutive": 2, "on_spike": "rollback"}
    assert train(folder, "hopeless", range(48, 10_000), guard=guard, processes=1) == "diverged"
    assert 1 <= len(events(folder / "runs" / "hopeless", "rollback")) <= 3


@pytest.mark.parametrize("processes", [1, 2])
def test_a_time_budget_ends_with_a_checkpoint_and_a_later_launch_goes_on(folder, processes):
    name = f"budget-{processes}"
    assert train(folder, name, run={"max_minutes": 1e-6}, processes=processes) == "out_of_time"
    run = folder / "runs" / name
    stopped = read_rows(run / "metrics.jsonl")
    assert 1 <= len(stopped) <= 2
    assert newest(run) == f"tokens-{stopped[-1]['tokens']}-segment-0"
    assert train(folder, name, processes=processes) == "finished"
    assert train(folder, f"no-{name}", processes=processes) == "finished"
    assert trajectory(run) == trajectory(folder / "runs" / f"no-{name}")


def test_a_time_budget_is_no_failure(config):
    ((code, output),) = run_workers(main, 1, [str(config), "run.name=short", "run.max_minutes=1e-6"])
    assert code == FINISHED and "out_of_time" in output


def test_until_stops_before_the_horizon_with_a_checkpoint(folder):
    assert train(folder, "until", run={"until": 5 * TINY}) == "finished"
    assert newest(folder / "runs" / "until") == f"tokens-{5 * TINY}-segment-0"
    assert [row["lr"] for row in read_rows(folder / "runs" / "until" / "metrics.jsonl")][2:] == [1e-2] * 3
