"""`grow` from the command line: what it writes, that training goes on from it, what it refuses, and that it then leaves
nothing behind."""

import errno
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import fsspec
import pytest
import tomli_w
import torch
from torch import Tensor

from growth.dimensions import parameter_shapes
from growth.maps import TensorMap
from growth.operator import Growth, names, operator
from growth.policies import Moments
from launch.config import dump
from launch.convert import main as convert
from launch.grow import main
from launch.main import main as meristem
from runtime.checkpoint import dcp, hugging_face
from runtime.checkpoint.unsharded import UnshardedCheckpoint, open_unsharded
from runtime.config import StartConfig
from runtime.data.loader import Loader
from runtime.model.config import ModelConfig
from runtime.observe.jsonl import read_rows
from runtime.state import TrainState, check_description
from tests.corpus import tiny_run, write_corpus
from tests.end_to_end import runs
from tests.end_to_end.checkpoints import small_weights
from tests.workers import run_workers

BATCH = 8 * 32
AT, END = 6 * BATCH, 12 * BATCH
STACK = ["--operator", "depth.stack", "--factor", "2"]
WIDEN = ["--operator", "width.intermediate", "--factor", "2"]


def write_config(folder: Path, name: str, **sections: dict[str, Any]) -> Path:
    growth = sections.pop("growth", None)
    sections["run"] = {"name": name, **sections.get("run", {})}
    sections["optim"] = {"ema_half_life": "2K", "lr": 1e-2}
    raw = tomllib.loads(dump(tiny_run(folder, **sections)))
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(raw | ({"growth": growth} if growth else {})))
    return path


def train_watched(rank: int, path: Path) -> dict[int, Tensor]:
    """Train a run to its end; the tokens of each batch by its first sample."""
    seen: dict[int, Tensor] = {}
    batch = Loader.batch

    def watched(self: Loader, first: int, *rest: Any) -> Any:
        found = batch(self, first, *rest)
        seen[first] = torch.cat([each.tokens for each in found]).clone()
        return found

    Loader.batch = watched
    try:
        code, printed = runs.main(rank, [str(path)])
    finally:
        Loader.batch = batch
    assert code == 0, printed
    return seen


def train(path: Path) -> dict[int, Tensor]:
    (seen,) = run_workers(train_watched, 1, path)
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grow")
    write_corpus(folder / "data" / "train")
    write_corpus(folder / "data" / "heldout", documents=20, seed=1)
    return folder


@pytest.fixture(scope="module")
def small(folder: Path) -> str:
    """A run that stopped half-way."""
    train(write_config(folder, "small", run={"until": AT}))
    return str(folder / "runs" / "small")


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# What is written.


def test_a_grown_checkpoint_stands_on_its_own(small: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "out"
    assert main([small, str(out), *STACK, "--moments", "keep", *WIDEN]) == 0
    assert left(tmp_path) == ["out"] and left(out) == ["checkpoints"]
    old, new = (UnshardedCheckpoint(each) for each in (small, out))
    check_description(new.state)
    model = ModelConfig(**new.state["model"])
    assert (model.num_layers, model.intermediate_size) == (4, 128)
    assert new.state["config"]["model"] == new.state["model"]
    assert {name: tuple(new.shape(f"model.{name}")) for name in new.state["roles"]} == parameter_shapes(model)
    assert not any(name.startswith("guard.") for name in new) and any(name.startswith("ema.") for name in new)
    for key in ("generators", "tokenizer", "format"):
        assert new.state[key] == old.state[key]

    before, after = (TrainState.from_json(each.state["train"]) for each in (old, new))
    assert (after.clock, after.position, after.flops) == (before.clock, before.position, before.flops)
    assert after.mixture == before.mixture and after.segment == before.segment + 1
    event, ancestor = after.events[-1], after.lineage[-1]
    assert event["event"] == "growth" and event["tokens"] == AT
    assert [each["operator"] for each in event["operators"]] == ["depth.stack", "width.intermediate"]
    assert event["operators"][0]["options"] == {"factor": 2} and event["moments"] == "keep"
    assert len(ancestor["hash"]) == 32 and (ancestor["tokens"], ancestor["flops"]) == (AT, before.flops)
    assert ancestor["checkpoint"].startswith(small) and ancestor["run"] == "small"
    assert event["after"]["counts"]["total"] == sum(new[f"model.{name}"].numel() for name in new.state["roles"])

    preset = capsys.readouterr().out.split("\n\n", 2)[2]
    sections = tomllib.loads(preset)
    assert ModelConfig(**sections["model"]) == model
    assert StartConfig(**sections["start"]) == StartConfig(from_=str(out), carry="all")


def test_the_optimizer_follows_its_policy(small: str, tmp_path: Path):
    policies = "*.q_proj.*=keep,*.k_proj.*=scaled,*.v_proj.*=reset_new,*=reset"
    assert main([small, str(tmp_path / "out"), *STACK, "--moments", policies]) == 0
    old, new = (open_unsharded(each, "optimizer.")[0] for each in (small, tmp_path / "out"))
    for block, kept in ((0, ("q_proj", "k_proj", "v_proj")), (2, ("q_proj", "k_proj"))):
        for linear in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = f"optimizer.blocks.{{}}.attention.{linear}.weight.exp_avg"
            expected = old[name.format(block % 2)] if linear in kept else torch.zeros(())
            assert torch.equal(new[name.format(block)], expected.expand_as(new[name.format(block)])), (block, linear)
    assert new["optimizer.blocks.1.attention.q_proj.weight.step"] == AT / BATCH
    assert new["optimizer.blocks.1.attention.o_proj.weight.step"] == 0


def test_several_processes_write_the_same(small: str, tmp_path: Path):
    arguments = [*STACK, "--operator", "noise", "--alpha", "0.1", "--moments", "reset_new"]
    assert main([small, str(tmp_path / "one"), *arguments]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command = [*torchrun, "-m", "launch.grow", small, str(tmp_path / "three"), *arguments]
    done = subprocess.run(
        command, cwd=runs.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count("growth: depth.stack") == 1, done.stderr
    assert runs.different_tensors(tmp_path / "one", tmp_path / "three") == []
    assert left(tmp_path) == ["one", "three"]
    states = [UnshardedCheckpoint(tmp_path / each).state for each in ("one", "three")]
    for state in states:
        state["train"]["events"][-1].pop("time")
    assert states[0] == states[1]


def test_the_new_place_may_be_a_url(small: str):
    assert main([small, "memory://grown", *STACK]) == 0
    assert UnshardedCheckpoint("memory://grown").state["model"]["num_layers"] == 4
    assert main([small, "memory://grown", *STACK]) == 2
    fsspec.filesystem("memory").rm("/grown", recursive=True)


# Training goes on.


def test_training_goes_on_with_the_samples_to_come(folder: Path, small: str):
    ungrown = train(write_config(folder, "ungrown"))
    out = folder / "wider"
    assert main([small, str(out), *WIDEN, "--schedule", "rewarm,scope=new,peak=1.2,tokens=512"]) == 0
    later = {"model": {"intermediate_size": 128}, "start": {"from": str(out)}}
    grown = train(write_config(folder, "grown", **later))
    assert list(grown) == [8 * batch for batch in range(6, 12)]
    assert all(torch.equal(grown[first], ungrown[first]) for first in grown)
    rows = [read_rows(folder / "runs" / name / "metrics.jsonl") for name in ("ungrown", "grown")]
    whole, rest = rows
    assert [row["tokens"] for row in rest] == [row["tokens"] for row in whole[6:]]
    assert [row["lr"] for row in rest] == [row["lr"] for row in whole[6:]]
    assert rest[0]["loss"] == pytest.approx(whole[6]["loss"], rel=1e-5), "widening by copies preserves"
    state = UnshardedCheckpoint(folder / "runs" / "grown").state["train"]
    assert [entry["carry"] for entry in state["lineage"]] == ["growth", "all"]
    assert state["births"][1]["rewarm"] == {"start": 0.0, "peak": 1.2, "tokens": 512}


def test_between_runs_is_like_within_one(folder: Path, small: str):
    """A run that grows on its way, and one from a checkpoint of that moment grown by itself, end in the same bits."""
    steps = {"operator": "depth.random", "options": {"count": 1}, "then": [{"operator": "width.intermediate"}]}
    steps["then"][0]["options"] = {"factor": 2.0}
    policies = {"moments": "reset_new", "schedule": {"kind": "rewarm", "scope": "new", "tokens": 512}}
    train(write_config(folder, "within", growth=[{"at": AT, **steps, **policies}]))
    out = folder / "between"
    chosen = ["--operator", "depth.random", "--count", "1", "--operator", "width.intermediate", "--factor", "2"]
    chosen += ["--moments", "reset_new", "--schedule", "rewarm,scope=new,tokens=512"]
    assert main([small, str(out), *chosen]) == 0
    later = {"model": {"num_layers": 3, "intermediate_size": 128}, "start": {"from": str(out)}}
    train(write_config(folder, "after", **later))
    assert runs.different_tensors(folder / "runs" / "within", folder / "runs" / "after") == ["segment"]


def test_other_sequences_go_on_in_the_text(folder: Path, small: str):
    out = folder / "longer"
    longer = ["--operator", "context", "--seq-len", "64", "--rope-theta", "20000"]
    assert main([small, str(out), *longer]) == 0
    state = UnshardedCheckpoint(out).state
    assert state["config"]["data"]["seq_len"] == 64
    assert state["train"]["clock"]["tokens"] == AT and state["train"]["position"] == 0
    sections = {"model": {"rope_theta": 20000.0}, "data": {"seq_len": 64}, "batch": {"sequences": 4}}
    data = {"seq_len": 64, "sources": [{"path": str(folder / "data" / "train")}]}
    seen = train(write_config(folder, "long", **sections | {"data": data}, start={"from": str(out)}))
    assert list(seen) == [4 * batch for batch in range(6)]


def test_an_import_grows_too(folder: Path, tmp_path: Path):
    (tmp_path / "hf").mkdir()
    weights = small_weights(vocab_size=61)
    hugging_face.write(weights, tmp_path / "hf")
    assert convert([str(tmp_path / "hf"), str(tmp_path / "imported"), "--to", "meristem"]) == 0
    out = tmp_path / "grown"
    assert main([str(tmp_path / "imported"), str(out), "--operator", "depth.interleave"]) == 0
    tensors, state = open_unsharded(out)
    assert all(name.startswith("model.") for name in tensors) and state["imported"]["seq_len"] == 64
    first = weights.tensors["blocks.0.attention.q_proj.weight"]
    assert torch.equal(tensors["model.blocks.1.attention.q_proj.weight"], first)
    model = {key: value for key, value in state["model"].items() if value is not None}
    start = {"from": str(out), "carry": "weights"}
    train(write_config(folder, "from-import", model=model, start=start, run={"until": 2 * BATCH}))


# What is shown.


def test_a_dry_run_shows_and_writes_nothing(small: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([small, str(tmp_path / "out"), *STACK, "--dry-run", "--world-size", "2"]) == 0
    shown = capsys.readouterr().out
    assert left(tmp_path) == []
    assert re.search(r"unrolled depth +2 +4 +x 2\n", shown) and re.search(r"MiB of a device.* +[\d.]+ +[\d.]+ ", shown)
    assert "not the logits" in shown and "moments: reset" in shown and "0 of 39 parameters have entries" in shown


def test_all_operators_are_listed_with_their_options(capsys: pytest.CaptureFixture):
    assert meristem(["grow", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}\n" in shown for name in names())
    assert "--factor (2)" in shown and "arXiv 2405.15319" in shown


def test_the_ledger_adds_up(small: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([small, str(tmp_path / "out"), *STACK]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "out"), "--ledger"]) == 0
    header, segment, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "tokens", "FLOPs"]
    flops = UnshardedCheckpoint(small).state["train"]["flops"]
    assert segment.split() == ["small", f"{AT:,}", f"{flops:.4g}", "growth:", "depth.stack"]
    assert total.split() == ["total", f"{AT:,}", f"{flops:.4g}"]


# What is refused.


@operator(preserves="the logits, it claims", moments=Moments.KEEP, source="nowhere")
def liar(model: ModelConfig, *, harm: float = 0.01) -> Growth:
    """Scale the first block's output, and say that nothing happened."""
    maps = {name: TensorMap.identity(name, shape) for name, shape in parameter_shapes(model).items()}
    name = "blocks.0.attention.o_proj.weight"
    maps[name] = TensorMap(maps[name].shape, (maps[name].terms[0].scaled(1 + harm),))
    return Growth(model, maps, preserves=True)


LIAR = ["--operator", f"{__name__}:liar"]


def test_what_does_not_preserve_though_it_should_is_not_written(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert main([small, str(tmp_path / "out"), *LIAR]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "was to preserve the logits, but they differ by" in message
    assert left(tmp_path) == []
    assert main([small, str(tmp_path / "out"), *LIAR, "--harm", "0"]) == 0
    assert main([small, str(tmp_path / "unseen"), *LIAR, "--verify", "none"]) == 0


def test_a_full_disk_leaves_nothing(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dcp._CheckedStream, "write", full)
    assert main([small, str(tmp_path / "out"), *STACK]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: cannot write") and "No space left" in message and message.count("\n") == 1
    assert left(tmp_path) == []


REFUSALS = {
    "no checkpoint": ([], "give a checkpoint"),
    "no operator": (["{small}", "{out}"], "give an --operator"),
    "no new place": (["{small}", *STACK], "give the name of the new folder"),
    "nothing there": (["{out}", "{out}2", *STACK], "there is no complete checkpoint at"),
    "something there": (["{small}", "{small}", *STACK], "exists; give the name of a new folder"),
    "an unknown operator": (["{small}", "{out}", "--operator", "depth.stak"], "operator 'depth.stak' is not known"),
    "an operator without a name": (["{small}", "{out}", "--operator"], "--operator needs a value"),
    "an unknown option": (
        ["{small}", "{out}", *STACK, "--size", "3"],
        "unknown argument --size; depth.stack has --factor",
    ),
    "an option without a value": (
        ["{small}", "{out}", "--operator", "depth.stack", "--factor"],
        "--factor needs a value",
    ),
    "an option that is no number": (
        ["{small}", "{out}", "--operator", "depth.stack", "--factor", "two"],
        "operator depth.stack: option factor: ",
    ),
    "layers that are not there": (
        ["{small}", "{out}", "--operator", "depth.stack", "--layers", "0,7"],
        "layers [0, 7] are not blocks of a model that has 0 to 1",
    ),
    "an impossible model": (
        ["{small}", "{out}", "--operator", "width.hidden", "--size", "16"],
        "operator width.hidden: ",
    ),
    "another policy": (["{small}", "{out}", *STACK, "--moments", "copy"], "--moments: "),
    "a policy for some": (["{small}", "{out}", *STACK, "--moments", "norm*=keep"], "no pattern matches parameter"),
    "another rate": (["{small}", "{out}", *STACK, "--rates", "double"], "--rates: "),
    "another schedule": (["{small}", "{out}", *STACK, "--schedule", "restart"], "--schedule: kind: "),
    "a schedule's other key": (["{small}", "{out}", *STACK, "--schedule", "rewarm,length=3"], "--schedule: length: "),
    "no pair": (["{small}", "{out}", *STACK, "--schedule", "rewarm,3"], "'3' is not of the form key=value"),
    "a remap past the end": (
        ["{small}", "{out}", *STACK, "--schedule", "remap,to=1M"],
        "--schedule: to = 1,000,000 is not before the end",
    ),
    "a wrong seed": (["{small}", "{out}", *STACK, "--seed", "-1"], "--seed -1 is not between 0 and"),
    "no processes": (["{small}", "{out}", *STACK, "--dry-run", "--world-size", "0"], "--world-size 0 is not 1 or more"),
    "processes of a growth": (["{small}", "{out}", *STACK, "--world-size", "2"], "--world-size belongs to --dry-run"),
    "an impossible mesh": (
        ["{small}", *STACK, "--dry-run", "--world-size", "3"],
        "--world-size 3: batch.sequences = 8",
    ),
}


@pytest.mark.parametrize(("arguments", "told"), REFUSALS.values(), ids=REFUSALS)
def test_bad_input_gets_one_line_and_leaves_nothing(
    arguments: list[str], told: str, small: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert main([each.format(small=small, out=tmp_path / "out") for each in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and told in message and message.count("\n") == 1
    assert left(tmp_path) == []


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_named(file: str, small: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    copy = tmp_path / "source"
    source = sorted(Path(small, "checkpoints").iterdir())[-1]
    fsspec.filesystem("file").copy(str(source), str(copy / source.name), recursive=True)
    data = bytearray((copy / source.name / file).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / source.name / file).write_bytes(data)
    assert main([str(copy / source.name), str(tmp_path / "out"), *STACK]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and file in message and left(tmp_path) == ["source"]
