"""compare.py on run directories: what it prints and writes, and what it refuses."""

import json
from pathlib import Path

import pytest

from launch import compare


def write_run(folder: Path, pace: float = 1.0, end: int = 40, sets: tuple[str, ...] = ("heldout",)) -> Path:
    """A run whose loss is 2 + 2 / (pace x thousands of tokens), at 100 FLOPs and 1 ms a token."""
    folder.mkdir(parents=True)
    losses = [(1000 * k, 2 + 2 / (pace * k)) for k in range(1, end + 1)]
    rows = [
        {"step": k, "tokens": tokens, "loss": loss, "flops": 100 * tokens, "wall_time": tokens / 1000}
        for k, (tokens, loss) in enumerate(losses)
    ]
    held_out = [
        {"tokens": tokens, "segment": 0, "set": name, "loss": loss} for tokens, loss in losses[::2] for name in sets
    ]
    for name, each in (("metrics", rows), ("evaluations", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    (folder / "run.json").write_text(json.dumps({"name": folder.name}))
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, pace in {"base": 1.0, "twice": 2.0, "seed-0": 1.9, "seed-1": 2.0, "seed-2": 2.1}.items():
        write_run(tmp_path / "runs" / name, pace)
    write_run(tmp_path / "runs" / "short", 1.0, end=5)
    return tmp_path


def test_a_run_twice_as_fast_costs_half(runs, capsys):
    assert compare.main(["runs/base", "twice", "--levels", "2.2", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    # It comes to 2.2 at 10,000 tokens, between two evaluations.
    assert lines[1][:2] == ["2.2000", "base"] and lines[1][3] == lines[1][5] == lines[1][8] == "1.000"
    assert [float(lines[1][k]) for k in (2, 4, 6)] == pytest.approx([1e4, 1e6, 10.0], rel=0.05)
    assert lines[2][0] == "twice" and lines[2][2] == lines[2][4] == lines[2][-1]
    assert float(lines[2][2]) == pytest.approx(0.5, rel=0.05)
    assert "loss: held-out set heldout, the lowest so far" in printed
    known = json.loads((runs / "out" / "compare.json").read_text())
    assert known["baseline"] == "base" and known["measure"] == "heldout"
    assert [row["group"] for row in known["rows"]] == ["base", "twice"]
    assert known["rows"][1]["ratios"]["flops"]["value"] == pytest.approx(0.5, rel=0.05)
    assert (runs / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_shown_as_they_are(runs, capsys):
    assert compare.main(["base", "seeds [red]:seed-0,seed-1", "--levels", "2.2"]) == 0
    assert "seeds [red]" in capsys.readouterr().out


def test_seeds_are_one_entry_with_an_interval(runs, capsys):
    assert compare.main(["base:base,short", "fast:seed-0,seed-1,seed-2", "runs/seed-*"]) == 0
    printed = capsys.readouterr().out
    (named, matched) = (
        [line for line in printed.splitlines() if f" {name} " in line] for name in ("fast", "runs/seed-*")
    )
    assert len(named) == len(matched) == 5
    assert all(" to " in line for line in named[:4])


def test_what_was_not_reached_is_a_bound(runs, capsys):
    assert compare.main(["base", "short", "--levels", "2.2", "2.5", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert "> 5000" in printed and "short: 0 of 1 runs came down to 2.2000; > is a lower bound" in printed
    rows = json.loads((runs / "out" / "compare.json").read_text())["rows"]
    bounds = {(row["level"], row["group"]): row["costs"]["tokens"]["bound"] for row in rows}
    assert bounds == {
        (2.5, "base"): "exact",
        (2.5, "short"): "exact",
        (2.2, "base"): "exact",
        (2.2, "short"): "at least",
    }
    assert next(row for row in rows if (row["level"], row["group"]) == (2.2, "short"))["costs"]["tokens"]["low"] is None


def test_without_a_set_in_common_the_training_loss_is_taken(runs, capsys):
    write_run(runs / "other", 1.5, sets=("elsewhere",))
    assert compare.main(["base", "other"]) == 0
    assert "loss: running median of the training loss" in capsys.readouterr().out


REFUSED = {
    "one run": (["base"], "give two runs or more"),
    "no run": (["base", "none"], "'none' is no folder of a run, and there is none of that name in runs/"),
    "no match": (["base", "runs/x-*"], "'runs/x-*' matches no run's folder"),
    "one twice in a group": (["base", "x:twice,twice"], "has runs/twice twice"),
    "two of a name": (["x:base", "x:twice"], "there are two of x; give each a name of its own"),
    "a set that is not there": (
        ["base", "twice", "--set", "books"],
        "'books' is no set that all runs were evaluated on",
    ),
    "a folder without a run": (["base", "runs"], "runs has no logged step in a metrics.jsonl"),
    "a level that is none": (["base", "twice", "--levels", "nan"], "accepted are losses in nats"),
    "a file as a folder": (["base", "twice", "--out", "runs/base/run.json"], "--out runs/base/run.json: "),
}


@pytest.mark.parametrize(("arguments", "told"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line(runs, capsys, arguments, told):
    assert compare.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and told in error
