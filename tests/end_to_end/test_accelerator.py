"""A whole run on an accelerator without data: no part of it mixes devices, or needs more of a GPU than torch's own."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from launch.config import dump
from runtime.observe.jsonl import read_rows
from tests.corpus import tiny_run, write_corpus

ROOT = Path(__file__).parents[2]
BATCH = 8 * 32
REWARM = 'schedule={kind="rewarm",scope="new",tokens=512}'
WIDTH = f'{{operator="width.hidden",at="25%",options={{factor=2}},verify="none",{REWARM}}}'
EXPERTS = '{operator="experts.upcycle",at="50%",options={count=4},verify="none"}'
"""A verification would compare what has no values."""


def launch(config: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "tests.phantom_launch", str(config), "parallel.precision=bf16", *overrides]
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("optim", "growth"), [("adamw", f"[{WIDTH},{EXPERTS}]"), ("muon", '[{operator="depth.stack",at="50%"}]')]
)
def test_a_run_trains_grows_saves_and_resumes(tmp_path, optim, growth):
    for name in ("train", "heldout"):
        write_corpus(tmp_path / "data" / name, 40, seed=len(name))
    config = tmp_path / "config.toml"
    config.write_text(
        dump(
            tiny_run(
                tmp_path,
                batch={"micro_sequences": 4},
                schedule={"horizon": 8 * BATCH},
                evaluation={"micro_sequences": 32},
                optim={"name": optim, "ema_half_life": 1000},
                observe={"health_every": 2 * BATCH},
                guard={"max_consecutive": 1000},
            )
        )
    )
    launch(config, f"growth={growth}", f"run.until={6 * BATCH}")
    launch(config, f"growth={growth}")
    folder = tmp_path / "runs" / "tiny"
    events = read_rows(folder / "events.jsonl")
    kinds = Counter(row["event"] for row in events)
    assert kinds["growth"] == growth.count("operator") and kinds["resume"] == 1
    outcomes = {row["outcome"] for row in events if row["event"] == "checkpoint"}
    assert "saved" in outcomes and outcomes <= {"saved", "removed"}
    assert {row["set"] for row in read_rows(folder / "evaluations.jsonl")} == {"heldout", "heldout-ema"}
    assert read_rows(folder / "metrics.jsonl")[-1]["tokens"] == 8 * BATCH
