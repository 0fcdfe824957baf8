"""A ladder that is run: real launches of a tiny one, and the queue's ways with a stand-in for the trainer."""

import json
import os
import signal
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w

from launch import sweep, sweep_queue
from launch.config import dump
from launch.ladder import laid_over
from launch.sweep_store import ending, locked, own, write_config
from runtime.observe.jsonl import read_rows
from tests.corpus import tiny_run, write_corpus

BATCH = 8 * 32
TRAINER = """
import json, os, signal, sys, time, tomllib
from pathlib import Path

config = tomllib.loads(Path(sys.argv[1]).read_text())
name, rate = config["run"]["name"], config["optim"]["lr"]
folder = Path(config["run"]["dir"], name)
with open(Path(config["run"]["dir"], "order"), "a") as order:
    order.write(name + "\\n")
if rate == 0.25:
    sys.exit("the machine is out of memory")
if rate == 0.125:
    print("error: data.sources: there is no such file")
    sys.exit(2)
folder.mkdir(exist_ok=True, parents=True)
(folder / "config.toml").write_text(Path(sys.argv[1]).read_text())


def add(file, *rows):
    with open(folder / file, "a") as log:
        log.write("".join(json.dumps(row) + "\\n" for row in rows))


def stop(*_):
    add("events.jsonl", {"event": "run_end", "outcome": "interrupted"})
    sys.exit(75)


signal.signal(signal.SIGTERM, stop)
branch = config["schedule"]["branch"]
begin = branch.get("at", 0)
end = begin + branch["decay"] if begin else config["schedule"]["horizon"]
if begin:
    assert Path(config["start"]["from"], "manifest.json").exists()
add("events.jsonl", {"event": "run_start"})
for tokens in config["checkpoint"].get("at", []):
    saved = folder / "checkpoints" / f"tokens-{tokens}-segment-0"
    saved.mkdir(parents=True, exist_ok=True)
    (saved / "manifest.json").write_text("{}")
# Last and in one write, as it may be judged, and stopped, at any row.
add(
    "metrics.jsonl",
    *(
        {
            "step": step,
            "tokens": begin + (end - begin) * step // 16,
            "loss": 9 + step if rate == 0.5 else 9 - step / 10,
            "wall_time": step,
        }
        for step in range(1, 17)
    ),
)
while rate == 0.5:
    time.sleep(0.01)
add("events.jsonl", {"event": "run_end", "outcome": "finished"})
"""


def write_ladder(folder: Path, **changes) -> Path:
    """A ladder on a tiny base, whose corpus is there if `write_corpus` has made it."""
    raw = tomllib.loads(dump(tiny_run(folder, run={"name": "base"}, checkpoint={"every": 0})))
    raw["schedule"] = {"kind": "wsd", "horizon": 1, "warmup": 2 * BATCH, "decay": "25%"}
    (folder / "base.toml").write_text(tomli_w.dumps(raw))
    ladder = {
        "name": "tiny",
        "base": "base.toml",
        "tokens": [8 * BATCH, 16 * BATCH],
        "lr": [1e-2],
        "batch": [8],
        "sizes": [{"name": "small", "model": {"num_layers": 1}}],
    }
    path = folder / f"{changes.get('name', 'tiny')}.toml"
    path.write_text(tomli_w.dumps(ladder | changes))
    return path


LONG, SHORT = f"small-{16 * BATCH}-lr0.01-b8-s0", f"small-{8 * BATCH}-lr0.01-b8-s0"


@contextmanager
def told_to_stop_when(path: Path) -> Iterator[None]:
    """Have this process get SIGTERM as soon as a file is there."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            if path.exists():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder with a rate that diverges: told to stop, resumed, and run again when all was done."""
    folder = tmp_path_factory.mktemp("sweep")
    for name in ("train", "heldout"):
        write_corpus(folder / "data" / name, documents=60, seed=len(name))
    path = write_ladder(folder, lr=[1e-2, 1e20])
    with told_to_stop_when(folder / "runs" / "tiny" / "sweep" / f"{LONG}.log"):
        assert sweep.main([str(path)]) == 75
    assert not (folder / "runs" / "tiny" / SHORT).exists()
    assert sweep.main([str(path), "--jobs", "2"]) == 0
    return folder


def test_a_ladder_runs_to_its_end_and_records_what_diverged(real, capsys):
    logs = {path: path.stat().st_mtime_ns for path in real.rglob("*.log")}
    assert sweep.main([str(real / "tiny.toml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in real.rglob("*.log")} == logs, "a run was run again"
    assert "4 runs: 2 finished, 2 diverged" in capsys.readouterr().out
    assert sweep.main([str(real / "tiny.toml"), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    states = {line.split()[0]: line.split()[1] for line in lines[1:5]}
    assert states[LONG] == states[SHORT] == "finished"
    # The branch begins where its parent's weights were large already, and has too few steps to be given up.
    assert [states[name] for name in states if "1e20" in name] == ["diverged", "diverged"]
    known = json.loads((real / "runs" / "tiny" / SHORT / "run.json").read_text())
    assert known["parent"]["run"] == LONG and known["schedule"]["horizon_tokens"] == 8 * BATCH


def test_a_branch_ends_as_a_run_from_the_beginning_would(real):
    """Which is what makes fewer tokens cheap without another answer."""
    path = write_ladder(real, name="separate", tokens=[8 * BATCH], schedule="separate")
    assert sweep.main([str(path)]) == 0
    apart, branch, trunk = (
        read_rows(real / "runs" / name / "metrics.jsonl")
        for name in (f"separate/{SHORT}", f"tiny/{SHORT}", f"tiny/{LONG}")
    )
    shared = [row for row in trunk if row["tokens"] <= 6 * BATCH]
    for key in ("tokens", "loss", "lr", "grad_norm", "flops"):
        assert [row[key] for row in apart] == [row[key] for row in (*shared, *branch)], key
    ends = [read_rows(real / "runs" / name / SHORT / "evaluations.jsonl")[-1] for name in ("separate", "tiny")]
    assert ends[0]["loss"] == ends[1]["loss"] and ends[0]["tokens"] == 8 * BATCH


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sizes": [{"name": "small", "model": {"num_layers": 2}}]}, f"{LONG} differs in model.num_layers (1, now 2)"),
        ({"overrides": {"optim": {"weight_decay": 0.5}}}, f"{LONG} differs in optim.weight_decay (0.1, now 0.5)"),
        ({"overrides": {"schedule": {"decay": "50%"}}}, f"schedule.decay ({4 * BATCH}, now {8 * BATCH})"),
    ],
)
def test_a_ladder_that_contradicts_its_runs_is_refused_by_name(real, capsys, changes, told):
    raw = tomllib.loads((real / "tiny.toml").read_text()) | changes
    path = real / "changed.toml"
    path.write_text(tomli_w.dumps(raw))
    for options in ([], ["--dry-run"]):
        assert sweep.main([str(path), *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: the ladder contradicts runs that exist") and told in error


def test_a_longer_ladder_takes_the_runs_that_are_there(real, capsys):
    """A run that had been the one of most tokens is as good as the branch that is wanted now."""
    path = write_ladder(real, tokens=[8 * BATCH, 16 * BATCH, 32 * BATCH])
    assert sweep.main([str(path), "--list"]) == 0
    assert "3 runs: 1 wanted, 2 finished" in capsys.readouterr().out
    write_ladder(real, lr=[1e-2, 1e20])


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    path = write_ladder(tmp_path)
    assert sweep.main([str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"{LONG}" in printed and f"from {6 * BATCH:,}" in printed and "2 runs, " in printed
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A trainer that takes no time, in the place of launch/pretrain.py."""
    path = tmp_path / "trainer.py"
    path.write_text(TRAINER)
    monkeypatch.setattr(sweep_queue, "PRETRAIN", path)
    monkeypatch.setattr(sweep_queue, "JUDGE_SECONDS", 0.0)
    return tmp_path


def order(folder: Path) -> list[str]:
    path = folder / "runs" / "tiny" / "order"
    return path.read_text().split() if path.exists() else []


def test_a_hopeless_run_is_stopped_and_its_evidence_kept(stand_in, capsys):
    path = write_ladder(stand_in, lr=[0.5, 1e-2])
    assert sweep.main([str(path)]) == 0
    _, runs = sweep.open_ladder(str(path))
    hopeless, branch, *fine = runs
    found = ending(hopeless)
    assert found.state == "stopped early" and found.evidence["rule"] == "initial"
    assert found.evidence["loss"] == 18 and found.evidence["reference"] == 10
    events = read_rows(hopeless.folder / "events.jsonl")
    assert [row["event"] for row in events] == ["run_start", "run_end", "stopped_early"]
    assert (
        f"{hopeless.name}: stopped early, at {16 * BATCH:,} tokens the lowest of the last 8" in capsys.readouterr().out
    )
    # Its branch begins from a checkpoint of before, and is judged on its own.
    assert ending(branch).state == "stopped early" and all(ending(run) is None for run in fine)
    before = order(stand_in)
    assert sweep.main([str(path)]) == 0 and order(stand_in) == before


def test_a_failed_run_is_on_record_and_the_others_go_on(stand_in, capsys):
    path = write_ladder(stand_in, lr=[0.25, 1e-2])
    assert sweep.main([str(path), "--jobs", "3"]) == 1
    _, runs = sweep.open_ladder(str(path))
    assert ending(runs[0]).reason == "code 1: the machine is out of memory"
    assert "4 runs: 1 failed, 1 no parent, 2 finished" not in capsys.readouterr().out
    assert sweep.main([str(path), "--list"]) == 0
    assert "4 runs: 1 failed, 1 no parent, 2 finished" in capsys.readouterr().out
    before = order(stand_in)
    assert before.count(runs[0].name) == 1
    assert sweep.main([str(path)]) == 1 and order(stand_in) == before
    assert sweep.main([str(path), "--retry-failed"]) == 1
    assert order(stand_in) == [*before, runs[0].name]


def test_bad_input_of_a_run_ends_the_sweep_with_its_message(stand_in, capsys):
    path = write_ladder(stand_in, lr=[0.125, 1e-2])
    assert sweep.main([str(path)]) == 2
    told = capsys.readouterr().err
    assert told == f"error: {LONG.replace('0.01', '0.125')}: data.sources: there is no such file\n"
    assert len(order(stand_in)) == 1 and not list(stand_in.rglob("*.json"))


def test_the_runs_come_in_order_and_branches_when_their_parent_has_come_so_far(stand_in):
    path = write_ladder(stand_in, lr=[1e-2, 2e-2])
    assert sweep.main([str(path)]) == 0
    assert order(stand_in) == [LONG, SHORT, LONG.replace("0.01", "0.02"), SHORT.replace("0.01", "0.02")]


def test_a_run_that_has_begun_goes_on_as_it_began_though_the_ladder_is_longer_now(tmp_path):
    _, runs = sweep.open_ladder(str(write_ladder(tmp_path)))
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "config.toml").write_bytes(write_config(runs[0], None).read_bytes())
    amounts = [4 * BATCH, 8 * BATCH, 16 * BATCH, 32 * BATCH]
    longer = write_ladder(tmp_path, tokens=amounts, overrides={"observe": {"log_every": 7}})
    parent, *branches = sweep.open_ladder(str(longer))[1]
    assert [run.parent for run in branches] == [parent.name] * 3 and branches[0].name == LONG
    config = tomllib.loads(write_config(branches[0], parent).read_text())
    assert config["schedule"]["horizon"] == 16 * BATCH and "at" not in config["schedule"].get("branch", {})
    assert not config["start"].get("from") and config["observe"]["log_every"] == 7
    assert config["checkpoint"]["at"] == [6 * BATCH]


def test_a_ladder_is_run_by_one_sweep_at_a_time(stand_in, capsys):
    path = write_ladder(stand_in)
    _, runs = sweep.open_ladder(str(path))
    with locked(runs):
        assert sweep.main([str(path)]) == 2
    assert f"{LONG} is in the hands of another sweep" in capsys.readouterr().err and not order(stand_in)


def test_at_the_end_laws_are_fitted_and_the_next_runs_planned(stand_in, monkeypatch):
    """By the verbs themselves, whose arguments are the ladder's."""
    verb = "import sys, pathlib; pathlib.Path(sys.argv[0]).with_suffix('.args').write_text(repr(sys.argv[1:]))\n"
    (stand_in / "verbs").mkdir()
    (stand_in / "verbs" / "fit.py").write_text(verb + "sys.exit(3)\n")
    (stand_in / "verbs" / "plan.py").write_text(verb)
    monkeypatch.setattr(sweep, "HERE", stand_in / "verbs")
    path = write_ladder(stand_in, then={"fit": ["--law", "x"], "plan": ["--compute", "1e12"]})
    # A law that is not identified is told by the code; what is known is planned with all the same.
    assert sweep.main([str(path)]) == 3
    folder = stand_in / "runs" / "tiny"
    fit, plan = ((stand_in / "verbs" / f"{name}.args").read_text() for name in ("fit", "plan"))
    assert eval(fit) == [str(folder), "--law", "x", "--out", f"{folder}-analysis"]
    assert eval(plan) == ["--laws", f"{folder}-analysis/laws.json", "--compute", "1e12"]


def test_a_ladder_is_an_array_of_tasks(stand_in, capsys):
    pytest.importorskip("submitit")
    path = write_ladder(stand_in, lr=[1e-2, 2e-2])
    assert sweep.main([str(path), "--slurm", "cluster=debug"]) == 0
    assert len(order(stand_in)) == 4 and "4 runs: 4 finished" in capsys.readouterr().out
    assert sweep.main([str(path), "--slurm", "cluster=debug"]) == 0 and len(order(stand_in)) == 4


def test_options_that_cannot_be_are_refused(stand_in, capsys, monkeypatch):
    path = write_ladder(stand_in)
    for options, told in (
        (["--jobs", "0"], "--jobs 0: accepted is 1 and more"),
        (["--processes", "3"], "batch.sequences = 8 is not a multiple of the 3"),
        (["--slurm", "gpu"], "not of the form key=value"),
    ):
        assert sweep.main([str(path), *options]) == 2 and told in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert sweep.main([str(path), "--slurm", "partition=gpu"]) == 2
    assert "--slurm needs submitit, which is not installed" in capsys.readouterr().err and not order(stand_in)


def test_two_runs_at_a_time_have_gpus_of_their_own_where_there_are_as_many(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    assert sweep_queue.devices(0, 1, 1) == {}
    assert [sweep_queue.devices(slot, 2, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["3,5", "6,7"]
    assert [sweep_queue.devices(slot, 3, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["3,5", "6,7", "3,5"]
    assert sweep_queue.devices(0, 2, 5) == {}


def test_a_file_that_a_sweep_keeps_lies_beside_the_runs(tmp_path):
    _, runs = sweep.open_ladder(str(write_ladder(tmp_path)))
    assert own(runs[0], ".log") == tmp_path / "runs" / "tiny" / "sweep" / f"{LONG}.log"


def test_the_quickstart_ladder_reduced(real):
    """Its own file, with one small column of runs on the corpus that is there."""
    raw = tomllib.loads((sweep.HERE.parent / "configs" / "ladder-quickstart.toml").read_text())
    raw |= {"base": str(sweep.HERE.parent / "configs" / raw["base"]), "tokens": ["8K", "16K"], "then": {}}
    raw |= {"sizes": raw["sizes"][:1], "grids": [{"lr": [8e-3], "batch": [8]}]}
    data, tokens = real / "data", {"schedule": {"warmup": "2K"}}
    changes = {
        "run": {"dir": str(real / "runs")},
        "model": {"vocab_size": 61},
        "data": {"sources": [{"path": str(data / "train")}]},
        "evaluation": {"sets": [{"name": "heldout", "path": str(data / "heldout")}], "max_sequences": 8},
    }
    raw["overrides"] = laid_over(laid_over(raw["overrides"], changes), tokens)
    path = real / "quickstart.toml"
    path.write_text(tomli_w.dumps(raw))
    assert sweep.main([str(path)]) == 0
    folders = sorted((real / "runs" / raw["name"]).glob("h32-*"))
    assert [folder.name for folder in folders] == ["h32-16K-lr0.008-b8-s0", "h32-8K-lr0.008-b8-s0"]
    losses = [read_rows(folder / "evaluations.jsonl")[-1] for folder in folders]
    assert [row["tokens"] for row in losses] == [16_384, 8_192] and losses[0]["loss"] < losses[1]["loss"]
