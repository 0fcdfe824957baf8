"""Runs whose batch follows what they measure."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from runtime.assembly import open_trainer
from runtime.checkpoint.unsharded import open_unsharded
from runtime.observe.jsonl import Row, read_rows
from tests.corpus import tiny_run, write_corpus
from tests.distributed.test_trainer import BATCH, EXACT, column, launch, poisoned_launch
from tests.workers import run_workers

STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    write_corpus(folder / "data" / "train")
    write_corpus(folder / "data" / "heldout", documents=20, seed=1)
    return folder


def train(
    folder: Path,
    name: str,
    processes: int,
    batch: dict[str, Any],
    others: Mapping[str, Any] = MappingProxyType({}),
    work: Callable[[int, Path, dict[str, dict[str, Any]]], str] = launch,
    **run: Any,
) -> tuple[list[Row], list[Row]]:
    """A run's rows, and its events that tell of the batch."""
    sections = {
        "run": {"name": name, **run},
        "batch": {"micro_sequences": 2, **batch},
        "schedule": {"kind": "constant", "horizon": STEPS * BATCH, "warmup": 0},
        "checkpoint": {"every": 4 * BATCH, "keep_last": 9},
        **others,
    }
    assert run_workers(work, processes, folder, sections) == ["finished"] * processes
    rows = [read_rows(folder / "runs" / name / f"{table}.jsonl") for table in ("metrics", "events")]
    return rows[0], [row for row in rows[1] if row["event"].startswith("batch_")]


CONTROL = {"largest": 32, "every": 4 * BATCH}
KINDS = {
    "noise_scale": {"noise_scale": {"multiple": 50.0}},
    "norm_test": {"norm_test": {"eta": 0.1}, "coupling": {"lr": "sqrt", "beta2": "half_life"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_measured_batch_grows_within_its_bounds_and_is_resumed_bit_for_bit(folder, kind):
    batch = {"kind": kind, "control": CONTROL, **KINDS[kind]}
    rows, events = train(folder, kind, 2, batch)
    changes = [event for event in events if event["event"] == "batch_change"]
    sizes = [8, *(event["sequences"] for event in changes)]
    assert sizes == [8, 16, 32], "whole multiples up to the largest"
    assert [event["before"] for event in changes] == sizes[:-1]
    places = [event["tokens"] for event in changes]
    assert set(column(rows, "batch_tokens")) == {32 * size for size in sizes}
    for event in events:
        low, _ = event["target"]
        grows = low is not None and low >= 2 * event["before"] and event["before"] < 32
        assert grows == (event["sequences"] == 2 * event["before"]) and event["noise"] > 0
    name = f"{kind}-in-parts"
    for until in (places[0], places[1] + BATCH, STEPS * BATCH):
        resumed, told = train(folder, name, 2, batch, until=until)
    assert [column(resumed, key) for key in EXACT] == [column(rows, key) for key in EXACT]
    last = {event["tokens"]: event for event in told}
    assert [last[event["tokens"]]["interval"] for event in events] == [event["interval"] for event in events]


def test_decisions_are_asked_for_on_the_clock_whatever_is_logged(folder):
    batch = {"kind": "noise_scale", "control": CONTROL, **KINDS["noise_scale"]}
    _, events = train(folder, "noise_scale", 2, batch)
    rare, told = train(folder, "rarely-logged", 2, batch, {"observe": {"log_every": 5, "tensorboard": False}})
    assert len(rare) < 10 and [event["interval"] for event in told] == [event["interval"] for event in events]
    assert [event["tokens"] for event in told] == [event["tokens"] for event in events]


def test_branches_leave_no_trace_but_their_cost(folder):
    """A run that tries twice the batch and never takes it goes the way of one that never tries."""
    others = {
        "optim": {"ema_half_life": "1K"},
        "guard": {"sigma": 3.0, "window": 4},
        "observe": {"log_every": 1, "tensorboard": False, "health_every": 4 * BATCH},
    }
    plain, _ = train(folder, "plain", 1, {}, others)
    probe = {"tokens": 3 * BATCH, "tolerance": 0.0}
    batch = {"kind": "branch_probe", "branch_probe": probe, "control": {"largest": 16, "every": 8 * BATCH}}
    tried, events = train(folder, "tried", 1, batch, others)
    assert [event["event"] for event in events] == ["batch_kept"] * 2
    assert all(set(event["losses"]) == {"1", "2"} for event in events)
    assert all(event["losses"]["2"] > event["losses"]["1"] for event in events), "fewer steps learn less here"
    kept = [key for key in EXACT if key != "flops"]
    assert [column(tried, key) for key in kept] == [column(plain, key) for key in kept]
    ours, theirs = (open_unsharded(folder / "runs" / name)[0] for name in ("tried", "plain"))
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    health = [read_rows(folder / "runs" / name / "health.jsonl") for name in ("tried", "plain")]
    assert [column(rows, "tokens") for rows in health] == [[4 * BATCH * each for each in range(1, 7)]] * 2
    spent = tried[-1]["flops"] - plain[-1]["flops"]
    assert spent == sum(event["probing_flops"] for event in events) > 0


def test_a_branch_that_does_as_well_is_taken(folder):
    probe = {"tokens": 4 * BATCH, "tolerance": 9.0, "multiples": [2, 4]}
    control = {"largest": 32, "every": 8 * BATCH, "most": 4}
    rows, events = train(folder, "taken", 2, {"kind": "branch_probe", "branch_probe": probe, "control": control})
    assert [(event["tokens"], event["sequences"]) for event in events] == [(8 * BATCH, 32)], "then none is allowed"
    assert column(rows, "batch_tokens")[7:9] == [BATCH, 4 * BATCH]


def launch_with_larger_batches_poisoned(rank: int, folder: Path, sections: dict[str, dict[str, Any]]) -> str:
    """A launch in which every step of a branch of larger batches is skipped."""
    with open_trainer(tiny_run(folder, **sections), "") as trainer:
        judge = trainer.guard.judge

        def poisoned(loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
            sequences = trainer.timetable.at(trainer.state.clock.tokens).sequences
            return judge(loss * math.nan if sequences > 8 else loss, grad_norm)

        trainer.guard.judge = poisoned
        return str(trainer.run())


def test_a_branch_whose_steps_were_skipped_is_not_taken(folder):
    """Weights that did not move are within any tolerance."""
    probe = {"tokens": 4 * BATCH, "tolerance": 9.0}
    batch = {"kind": "branch_probe", "branch_probe": probe, "control": {"largest": 16, "every": 8 * BATCH}}
    _, events = train(folder, "skipping", 1, batch, work=launch_with_larger_batches_poisoned)
    assert [event["event"] for event in events] == ["batch_kept"] * 2
    assert [set(event["losses"]) for event in events] == [{"1"}] * 2, "the other has no loss"


def test_without_a_checkpoint_to_come_back_to_nothing_is_tried(folder):
    """The second save, at the decision, and its repetition fail."""
    probe = {"kind": "branch_probe", "branch_probe": {"tokens": 4 * BATCH, "tolerance": 9.0}}
    sections = {
        "run": {"name": "unsaved"},
        "batch": {**probe, "control": {"largest": 16, "every": 8 * BATCH}},
        "checkpoint": {"every": 4 * BATCH},
    }
    assert run_workers(poisoned_launch, 1, folder, sections, [], [2, 3, 4]) == ["finished"]
    rows = read_rows(folder / "runs" / "unsaved" / "metrics.jsonl")
    assert column(rows, "tokens") == [BATCH * step for step in range(1, 13)]
    (event,) = [row for row in read_rows(folder / "runs" / "unsaved" / "events.jsonl") if row["event"] == "batch_kept"]
    assert event["losses"] == {} and event["probing_flops"] == 0
