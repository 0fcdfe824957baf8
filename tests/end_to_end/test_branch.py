"""Branches and averages of one stable run: its parent stays as it is, and what becomes of its checkpoints."""

import hashlib
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
import torch

from launch import branch, grow, merge
from launch.branching import Anneal, open_parent
from launch.branching import branched as branched_by
from launch.chain import refuse_other_texts
from launch.config import compose, dump
from launch.convert import main as convert
from runtime.checkpoint import formats
from runtime.checkpoint.averaging import averaged_tensors
from runtime.checkpoint.unsharded import UnshardedCheckpoint, open_unsharded
from runtime.observe.jsonl import read_rows
from runtime.startup import BadInput
from runtime.state import check_description
from runtime.timetable import build_timetable
from tests.corpus import tiny_run, write_corpus
from tests.end_to_end import runs
from tests.end_to_end.runs import different_tensors, trajectory
from tests.end_to_end.test_malformed import Case, assert_refused, tree
from tests.workers import run_workers

BATCH = 8 * 32
AT, GROWN, HORIZON = 12 * BATCH, 4 * BATCH, 24 * BATCH
GROWTH = {
    "at": GROWN,
    "operator": "depth.stack",
    "options": {"factor": 2},
    "schedule": {"kind": "rewarm", "tokens": 3 * BATCH, "start": 0.1, "peak": 1.3},
}
STABLE = f"tokens-{AT}-segment-1"
QUARTER = f"stable-at-{AT}-decay-25pct-1-sqrt"


def launch(*commands: list[str]) -> list[str]:
    """What launches print, one after the other in one process, of which none may fail."""
    (answers,) = run_workers(launches, 1, list(commands))
    return answers


def launches(rank: int, commands: list[list[str]]) -> list[str]:
    printed = []
    for command in commands:
        code, output = runs.main(rank, command)
        assert code == 0, output
        printed.append(output)
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has grown and re-warmed and decayed at its end, with a checkpoint every second step."""
    folder = tmp_path_factory.mktemp("branch")
    write_corpus(folder / "data" / "train")
    write_corpus(folder / "data" / "heldout", documents=20, seed=1)
    made = tiny_run(
        folder,
        run={"name": "stable"},
        schedule={"horizon": HORIZON, "warmup": 2 * BATCH, "decay": "25%"},
        optim={"lr": 1e-2, "ema_half_life": "2K"},
        checkpoint={"every": 2 * BATCH, "keep_last": 40},
    )
    path = folder / "stable.toml"
    path.write_text(tomli_w.dumps(tomllib.loads(dump(made)) | {"growth": [GROWTH]}))
    launch([str(path)])
    return folder


@pytest.fixture(scope="module")
def checkpoints(folder: Path) -> Path:
    return folder / "runs" / "stable" / "checkpoints"


def contents(folder: Path) -> dict[str, str]:
    """The times and the contents of all files of a folder."""
    times = {path: str(each) for path, each in tree(folder).items()}
    files = (path for path in folder.rglob("*") if path.is_file())
    return times | {f"{path} holds": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def branched(folder: Path, checkpoints: Path) -> str:
    """A branch, another that was stopped in the midst of it, and that one resumed."""
    before = contents(folder / "runs" / "stable")
    options = ["--branch", str(checkpoints / STABLE), "--decay", "25%"]
    dry, printed, *_ = launch(
        [*options, "--dry-run"],
        options,
        [*options, "--name", "stopped", f"run.until={14 * BATCH}"],
        [*options, "--name", "stopped"],
        # The file that the branch has left is the same branch.
        [str(folder / "runs" / QUARTER / "config.toml")],
    )
    assert f"{4 * BATCH:,}  a branch, after {AT:,}" in dry and "nothing is written" in dry
    assert contents(folder / "runs" / "stable") == before
    return printed


def test_a_branch_goes_on_where_its_parent_stood_and_anneals_it(folder: Path, checkpoints: Path, branched: str):
    parent = open_parent(str(checkpoints / STABLE))
    config = compose(folder / "runs" / QUARTER / "config.toml")
    expected = build_timetable(config, parent.events).schedule
    mine, theirs = (read_rows(folder / "runs" / name / "metrics.jsonl") for name in (QUARTER, "stable"))
    assert [row["tokens"] for row in mine] == [AT + step * BATCH for step in range(1, 5)]
    assert [row["lr"] for row in mine] == [expected(AT + step * BATCH, BATCH) for step in range(4)]
    (same,) = [row for row in theirs if row["tokens"] == AT + BATCH]
    # The rate of the re-warm's peak, the same samples and the same weights: all to the float.
    assert same["lr"] == mine[0]["lr"] == pytest.approx(1.3e-2)
    assert [mine[0][key] for key in runs.EXACT] == [same[key] for key in runs.EXACT]
    assert mine[-1]["lr"] == pytest.approx(1.3e-2 * (1 - 0.75**0.5))
    assert f"branch of {checkpoints / STABLE} at {AT:,} tokens: 1-sqrt over {4 * BATCH:,} tokens" in branched
    assert f"resume         python launch/pretrain.py {folder / 'runs' / QUARTER / 'config.toml'}" in branched


def test_a_branch_keeps_what_it_is_of(folder: Path, checkpoints: Path, branched: str):
    known = json.loads((folder / "runs" / QUARTER / "run.json").read_text())
    stored = UnshardedCheckpoint(checkpoints / STABLE)
    assert known["parent"]["hash"] == stored.hash and known["parent"]["run"] == "stable"
    assert known["parent"]["tokens"] == AT == known["schedule"]["branch_tokens"]
    assert known["schedule"]["horizon_tokens"] == AT + 4 * BATCH and known["schedule"]["decay_tokens"] == 4 * BATCH
    assert known["schedule"]["tail"] == "1-sqrt" and known["schedule"]["final_lr"] == 0
    config = compose(folder / "runs" / QUARTER / "config.toml")
    assert config.model.model_dump(mode="json") == stored.state["model"] and not config.growth
    assert (config.schedule.horizon, config.schedule.decay) == (HORIZON, HORIZON // 4)
    assert config.checkpoint.every == config.evaluation.every == -(-4 * BATCH // 10)


def test_a_branch_of_before_a_growth_does_not_grow(checkpoints: Path):
    parent = open_parent(str(checkpoints / f"tokens-{2 * BATCH}-segment-0"))
    config = branched_by(parent, Anneal("50%"), None)
    assert config.model.num_layers == 2 and not config.growth and config.end == 4 * BATCH


def test_a_stopped_branch_resumes_bit_for_bit(folder: Path, branched: str):
    ours, theirs = (folder / "runs" / name for name in (QUARTER, "stopped"))
    assert trajectory(ours) == trajectory(theirs) and not different_tensors(ours, theirs)
    outcomes = [row.get("outcome") for row in read_rows(theirs / "events.jsonl") if row["event"] == "run_end"]
    assert outcomes == ["finished", "finished"]
    resumed = [row["tokens"] for row in read_rows(theirs / "events.jsonl") if row["event"] == "resume"]
    assert resumed == [14 * BATCH]


def test_a_branch_that_cannot_be_is_refused(folder: Path, checkpoints: Path, branched: str, tmp_path: Path):
    stable, quarter = str(checkpoints / STABLE), ["--decay", "25%"]
    assert convert([str(folder / "runs" / "stable"), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    assert convert([str(tmp_path / "hf"), str(tmp_path / "imported"), "--to", "meristem"]) == 0
    refused = {
        "no length": (["--branch", stable], ["--decay 10%"]),
        "a length that is none": (["--branch", stable, "--decay", "100%"], ["--decay '100%'"]),
        "an unknown tail": (["--branch", stable, *quarter, "--tail", "steep"], ["steep", "mirror-cosine"]),
        "a tail without its end": (["--branch", stable, *quarter, "--tail", "exponential"], ["final above 0"]),
        "an end that is none": (["--branch", stable, *quarter, "--final", "1.5"], ["final = 1.5"]),
        "a decayed one": (["--branch", str(checkpoints.parent), *quarter], ["its own decay", STABLE]),
        "one in a re-warm": (
            ["--branch", str(checkpoints / f"tokens-{6 * BATCH}-segment-1"), *quarter],
            ["warmed up"],
        ),
        "an imported one": (["--branch", str(tmp_path / "imported"), *quarter], ["imported", "no run"]),
        "none": (["--branch", str(folder / "data"), *quarter], ["no complete checkpoint"]),
        "a configuration": ([str(folder / "stable.toml"), "--branch", stable, *quarter], ["leave out"]),
        "another schedule": (["--branch", stable, *quarter, "schedule.kind=power"], ["schedule.kind=power"]),
        "another start": (["--branch", stable, *quarter, "start.carry=weights"], ["start.carry=weights"]),
        "another rate": (["--branch", stable, *quarter, "optim.lr=3"], ["would jump", "optim.lr"]),
        "another model": (["--branch", stable, *quarter, "--name", "m", "model.num_layers=2"], [STABLE]),
        "an unknown key": (["--branch", stable, *quarter, "optim.lrr=3"], ["optim.lrr", "did you mean lr"]),
        "its parent's name": (["--branch", stable, *quarter, "--name", "stable"], ["parent's name"]),
        "a name that is none": (["--branch", stable, *quarter, "--name", "a b"], ["run.name"]),
        "another decay of that name": (
            ["--branch", stable, "--decay", "50%", "--name", "stopped"],
            ["schedule.branch"],
        ),
        "a length without a branch": ([str(folder / "stable.toml"), *quarter], ["--decay belongs to --branch"]),
        "nothing": ([], ["--branch CHECKPOINT"]),
    }
    assert_refused([Case(command, named, folder) for command, named in refused.values()])


def test_an_end_before_what_a_growth_has_remapped_to_is_refused(folder: Path, checkpoints: Path, tmp_path: Path):
    out, stack = tmp_path / "remapped", ["--operator", "depth.stack", "--factor", "2"]
    assert grow.main([str(checkpoints / STABLE), str(out), *stack, "--schedule", f"remap,to={20 * BATCH}"]) == 0
    command = [str(folder / "stable.toml"), "run.name=early", "growth=[]", "model.num_layers=8", f"start.from={out}"]
    told = [f"the growth at {AT:,} tokens", f"to = {20 * BATCH:,} is impossible"]
    assert_refused([Case([*command, f"schedule.horizon={16 * BATCH}"], told, folder)])


def test_those_that_may_be_branched_instead_are_named(checkpoints: Path):
    """None of the warm-up, of the growth's re-warm, or of the decay."""
    with pytest.raises(ValueError, match="its own decay began at") as refusal:
        open_parent(str(checkpoints.parent))
    named = re.findall(r"tokens-(\d+)", str(refusal.value).partition("branch from")[2])
    assert [int(tokens) // BATCH for tokens in named] == [2, 8, 10, 12, 14, 16, 18]


def test_a_start_within_a_branch_is_refused(folder: Path, checkpoints: Path, tmp_path: Path):
    command = [str(folder / "stable.toml"), "run.name=late", "growth=[]", "model.num_layers=4"]
    start = [f"start.from={checkpoints / STABLE}", f"schedule.branch.at={AT - 1}", f"schedule.branch.decay={HORIZON}"]
    assert_refused([Case([*command, *start], ["schedule.branch.at", "would jump"], folder)])


@pytest.mark.parametrize(
    ("step", "options", "expected"),
    [
        # At the branch point itself: the tail times a re-warm that takes as long as it.
        (0, ["--schedule", f"rewarm,tokens={4 * BATCH}"], [0.25, 0.25, 0.75 * (1 - 0.5**0.5), 1 - 0.75**0.5]),
        (2, [], [1 - 0.5**0.5, 1 - 0.75**0.5]),
    ],
    ids=["at the branch point", "in the tail"],
)
def test_a_branch_that_was_grown_goes_on_by_its_own_tail(folder, branched, tmp_path, step, options, expected):
    source = folder / "runs" / QUARTER / "checkpoints" / f"tokens-{AT + step * BATCH}-segment-0"
    out, name = tmp_path / "grown", f"grown-after-{step}"
    assert grow.main([str(source), str(out), "--operator", "depth.stack", "--factor", "2", *options]) == 0
    start = [f"run.name={name}", "model.num_layers=8", f"start.from={out}"]
    launch([str(folder / "runs" / QUARTER / "config.toml"), *start])
    rows = read_rows(folder / "runs" / name / "metrics.jsonl")
    assert [row["tokens"] for row in rows] == [AT + number * BATCH for number in range(step + 1, 5)]
    assert [row["lr"] for row in rows] == pytest.approx([1.3e-2 * share for share in expected])


def compared(rank: int, texts: list[str]) -> str:
    try:
        refuse_other_texts(texts[rank])
    except BadInput as error:
        return str(error)
    return "alike"


def test_processes_that_found_another_newest_checkpoint_are_refused_together():
    assert run_workers(compared, 2, ["at = 1", "at = 1"]) == ["alike"] * 2
    ours, theirs = run_workers(compared, 2, ["at = 1", "at = 2"])
    assert ours == theirs and "ranks 0 and 1 read different configurations" in ours


# Fans.


def test_a_fan_is_planned_and_writes_nothing(folder: Path, checkpoints: Path, branched: str, capsys):
    before = tree(folder)
    sources = [str(checkpoints / f"tokens-{steps * BATCH}-segment-1") for steps in (10, 12)]
    assert branch.main([*sources, "--decay", "25%", "1K", "--tail", "linear", "1-sqrt"]) == 0
    printed = capsys.readouterr().out
    names = [line.split()[0] for line in printed.splitlines() if line.startswith("stable-at")]
    assert len(names) == len(set(names)) == 8 and tree(folder) == before
    (finished,) = [line for line in printed.splitlines() if line.startswith(QUARTER)]
    assert finished.split()[1:4] == [f"{AT:,}", "4", f"{16 * BATCH:,}"] and finished.endswith("finished")
    commands = [line for line in printed.splitlines() if line.startswith("python launch/pretrain.py --branch")]
    assert len(commands) == 8 and commands[-1].endswith(f"--branch {sources[1]} --decay 1K --tail 1-sqrt")


def test_a_fan_over_a_run_that_is_another_is_refused(folder: Path, checkpoints: Path, branched: str, capsys):
    before, command = tree(folder), [str(checkpoints / STABLE), "optim.grad_clip=0.5", "--decay", "25%"]
    refused = {
        "another run": (command, "config.toml differs from the branch that is asked for in optim"),
        "a length that is none": ([*command[:1], "--decay", "25%", "0%"], "--decay '0%'"),
        "one twice": ([*command[:1], "--decay", "20%", "20%"], "is given twice"),
        "no processes": ([*command[:1], "--decay", "20%", "--run", "--processes", "0"], "--processes 0"),
        "a name": ([*command[:1], "run.name=x", "--decay", "20%"], "run.name=x"),
        "no checkpoint": (["optim.grad_clip=0.5", "--decay", "20%"], "give one checkpoint"),
        "a decayed one": ([str(checkpoints.parent), "--decay", "20%"], "its own decay"),
    }
    for kind, (arguments, message) in refused.items():
        assert branch.main(arguments) == 2, kind
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error, (kind, error)
    assert tree(folder) == before


def test_a_fan_trains_what_is_not_finished(folder: Path, checkpoints: Path, branched: str, capsys):
    events = (folder / "runs" / QUARTER / "events.jsonl").read_bytes()
    command = [str(checkpoints / STABLE), "--decay", "25%", "--tail", "1-sqrt", "linear", "--run"]
    assert branch.main(command) == 0
    printed = capsys.readouterr().out
    assert (folder / "runs" / QUARTER / "events.jsonl").read_bytes() == events
    linear = QUARTER.replace("1-sqrt", "linear")
    rates = [row["lr"] for row in read_rows(folder / "runs" / linear / "metrics.jsonl")]
    assert rates == pytest.approx([1.3e-2 * share for share in (1, 0.75, 0.5, 0.25)])
    for name in (QUARTER, linear):
        last = read_rows(folder / "runs" / name / "evaluations.jsonl")
        loss = next(row["loss"] for row in reversed(last) if row["set"] == "heldout")
        assert f"{name}  {loss:.4f} on heldout" in printed


PASSED_ON = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
os.kill(os.getppid(), signal.SIGTERM)
signal.pause()
"""


def test_a_signal_is_passed_on_and_the_exit_code_handed_back(folder: Path, checkpoints: Path, capsys):
    assert branch.attend([sys.executable, "-c", PASSED_ON]) == 75
    config = open_parent(str(checkpoints / STABLE)).config
    fan = [
        branch.Branch(config.model_copy(update={"run": config.run.model_copy(update={"name": "new"})}), [], (1, 1))
    ] * 2
    assert branch.run(fan, [sys.executable, "-c", "import sys; sys.exit(77)"]) == 77
    assert "new ended with 77" in capsys.readouterr().err


# Averages.


def merged(out: Path, sources: list[Path], *options: str) -> UnshardedCheckpoint:
    assert merge.main([*map(str, sources), str(out), *options]) == 0
    return UnshardedCheckpoint(out)


@pytest.fixture(scope="module")
def three(checkpoints: Path) -> list[Path]:
    return [checkpoints / f"tokens-{steps * BATCH}-segment-1" for steps in (8, 10, 12)]


def test_an_average_is_the_mean_and_trains_on(folder: Path, three: list[Path], tmp_path: Path, capsys):
    out = tmp_path / "mean"
    found = merged(out, three[::-1], "--evaluate")
    printed = capsys.readouterr().out
    parts = [open_unsharded(each, "model.")[0] for each in three]
    assert set(found) == set(parts[0])
    for name, tensor in found.items():
        expected = torch.stack([each[name].double() for each in parts]).mean(0).float()
        torch.testing.assert_close(tensor, expected, rtol=2e-7, atol=0)

    check_description(found.state)
    assert found.state["config"]["run"]["name"] == "stable" and found.state["generators"] == []
    ancestor = found.state["train"]["lineage"][-1]
    assert (ancestor["carry"], ancestor["weights"], ancestor["tokens"]) == ("merge", "uniform", AT)
    assert [each["tokens"] for each in ancestor["merged"]] == [8 * BATCH, 10 * BATCH, AT]
    assert [each["hash"] for each in ancestor["merged"]] == [UnshardedCheckpoint(each).hash for each in three]
    assert [each["weight"] for each in ancestor["merged"]] == [1 / 3] * 3

    rows = read_rows(folder / "runs" / "stable" / "evaluations.jsonl")
    (known,) = [row["loss"] for row in rows if row["tokens"] == AT and row["set"] == "heldout"]
    assert f"newest  heldout: loss {known:.4f}" in printed and "merged  heldout: loss" in printed

    assert formats.read(out).config.num_layers == 4
    assert convert([str(out), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    command = [str(folder / "stable.toml"), "growth=[]", "model.num_layers=4", f"start.from={out}"]
    launch([*command, "run.name=on", f"run.until={2 * BATCH}", "start.carry=weights"])
    identity = json.loads((folder / "runs" / "on" / "run.json").read_text())
    assert identity["parent"]["hash"] == found.hash and identity["parent"]["carry"] == "weights"
    assert_refused(
        [
            Case([*command, "run.name=all", f"schedule.horizon={HORIZON}"], ["start.carry", "no optimizer"], folder),
            Case(["--branch", str(out), "--decay", "25%"], ["no optimizer"], folder),
        ]
    )


WEIGHTS = {
    "tail:1-sqrt": [3**-0.5, (2 / 3) ** 0.5 - 3**-0.5, 1 - (2 / 3) ** 0.5],
    "lawa:2": [0.5, 0.5],
    f"ema:{2 * BATCH}": [0.25, 0.25, 0.5],
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_averages_of_other_weights(three: list[Path], tmp_path: Path, weights: str):
    found, expected = merged(tmp_path / "out", three, "--weights", weights), WEIGHTS[weights]
    ancestor = found.state["train"]["lineage"][-1]
    assert [each["weight"] for each in ancestor["merged"]] == pytest.approx(expected)
    name = "model.blocks.3.attention.q_proj.weight"
    parts = [UnshardedCheckpoint(each)[name].double() for each in three[-len(expected) :]]
    mean = sum(weight * each for weight, each in zip(expected, parts, strict=True)).float()
    torch.testing.assert_close(found[name], mean)


def test_every_rank_and_thread_has_a_part_of_each_tensor(three: list[Path]):
    readers = [UnshardedCheckpoint(each).reader for each in three]
    names = [name for name in readers[0].tensors if name.startswith("model.")]
    whole = averaged_tensors(readers, [0.2, 0.3, 0.5], names)
    shared = [averaged_tensors(readers, [0.2, 0.3, 0.5], names, rank, 3) for rank in range(3)]
    for name in names:
        divided = [part for each in shared for part in each[name]]
        ours, theirs = (torch.cat([part.tensor() for part in parts]) for parts in (whole[name], divided))
        assert torch.equal(ours, theirs) and ours.shape == readers[0].tensors[name].size


def test_a_whole_run_is_its_last_segment(checkpoints: Path, tmp_path: Path, capsys):
    found = merged(tmp_path / "out", [checkpoints.parent], "--weights", "lawa:5")
    ancestor = found.state["train"]["lineage"][-1]
    assert [each["tokens"] for each in ancestor["merged"]] == [steps * BATCH for steps in (16, 18, 20, 22, 24)]
    noted = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert [f"tokens-{steps * BATCH}-segment-1" in line for steps, line in zip((20, 22, 24), noted, strict=True)]


def test_an_average_that_cannot_be_is_refused(
    folder: Path, three: list[Path], checkpoints: Path, branched: str, tmp_path: Path, capsys
):
    damaged = tmp_path / "damaged" / STABLE
    damaged.parent.mkdir()
    damaged.mkdir()
    for path in (checkpoints / STABLE).iterdir():
        content = path.read_bytes()
        (damaged / path.name).write_bytes(content[:-1] if path.suffix == ".distcp" else content)
    first, *_, last = map(str, three)
    other = str(folder / "runs" / QUARTER / "checkpoints" / f"tokens-{16 * BATCH}-segment-0")
    refused = {
        "one alone": ([last], "only checkpoint"),
        "none": ([], "give the checkpoints"),
        "one twice": ([last, last], "have both seen"),
        "another run": ([last, other], "run.name is"),
        "another segment": ([str(checkpoints / f"tokens-{2 * BATCH}-segment-0"), last], "segment is 0 and not 1"),
        "no checkpoint": ([first, str(folder / "data")], "no complete checkpoint"),
        "a damaged one": ([first, str(damaged)], ".distcp"),
        "unknown weights": ([first, last, "--weights", "best"], "accepted are uniform, lawa:K"),
        "an unknown tail": ([first, last, "--weights", "tail:steep"], "steep"),
        "a tail without its end": ([first, last, "--weights", "tail:exponential"], "final above 0"),
        "an end without a tail": ([first, last, "--final", "0.1"], "--final 0.1 belongs to"),
        "too large a window": ([first, last, "--weights", "lawa:3"], "lawa:3 of 2 checkpoints"),
        "too small a window": ([first, last, "--weights", "lawa:1"], "2 and more"),
        "no half-life": ([first, last, "--weights", "ema:x"], "'x' is not a token count"),
    }
    before = tree(folder), tree(tmp_path)
    for kind, (arguments, message) in refused.items():
        options = arguments.index("--weights") if "--weights" in arguments else len(arguments)
        options = min(options, arguments.index("--final") if "--final" in arguments else options)
        out = str(tmp_path / "out")
        assert merge.main([*arguments[:options], out, *arguments[options:]]) == 2, kind
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error, (kind, error)
    assert (tree(folder), tree(tmp_path)) == before
    assert merge.main([first, last, str(folder)]) == 2 and "exists" in capsys.readouterr().err
