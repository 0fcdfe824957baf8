"""Run directories as rows of a table."""

import fcntl
import json
import os
import time

import numpy as np
import pytest

from scaling.readers import read
from scaling.readers.rows import read_tail
from tests.run_folders import BATCH, FINISHED, evaluation, event, metrics, run_json, segment, write

END = 2000 * BATCH


def row(table, k=0):
    return table.frame.iloc[k]


def age(folder, seconds=7200):
    then = time.time() - seconds
    os.utime(folder / "metrics.jsonl", (then, then))


def test_a_run_directory_is_one_row_with_its_columns(tmp_path):
    table = read([write(tmp_path / "a", evaluations=[evaluation(END // 2, 2.9), evaluation(END, 2.6)])])
    found = row(table)
    assert len(table) == 1
    expected = {
        "run": "a", "status": "finished", "seed": 0, "total": 83_232, "non_embedding": 50_464, "active": 83_232,
        "hidden_size": 32, "num_layers": 4, "tokens": END, "unique_tokens": END, "seq_len": 128, "batch_tokens": BATCH,
        "batch_sequences": 8, "steps": 2000, "lr": 0.004, "final_lr": 0.0, "schedule": "wsd",
        "warmup_tokens": 100 * BATCH, "weight_decay": 0.1, "optimizer": "adamw", "beta1": 0.9, "beta2": 0.95,
        "flops_per_token": 595_968, "flops": END * 595_968, "streams": 1, "recurrences": 1, "precision": "fp32",
        "tokenizer": "bpe", "loss": 2.6, "loss_kind": "held-out heldout",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["labels"] is None and np.isnan(found["loss_error"])


def test_runs_are_found_at_any_depth_and_once(tmp_path):
    for name in ("x/y/a", "x/b", "c"):
        write(tmp_path / name)
    (tmp_path / "x" / "b" / "tensorboard").mkdir()
    (tmp_path / "x" / "b" / "tensorboard" / "events.out.tfevents.1").write_bytes(b"")
    table = read([tmp_path, tmp_path / "c", tmp_path / "x" / "b" / "metrics.jsonl"])
    assert sorted(table.frame["run"]) == ["a", "b", "c"]


def test_without_an_evaluation_at_the_end_the_training_loss_is_smoothed(tmp_path):
    found = row(read([write(tmp_path / "a", evaluations=[evaluation(END // 2, 2.9)])]))
    assert found["loss_kind"] == "training, smoothed"
    assert abs(found["loss"] - 2.5) < 3 * found["loss_error"] < 0.1
    assert found["loss"] != metrics(1, 2000)[-1]["loss"]


def test_of_several_sets_the_first_is_taken_or_the_one_asked_for(tmp_path):
    sets = [evaluation(END, 3.1, "code-ema"), evaluation(END, 3.2, "code"), evaluation(END, 2.7)]
    folder = write(tmp_path / "a", evaluations=sets)
    table = read([folder])
    assert row(table)["loss"] == 2.7 and "heldout, the first of heldout, code, code-ema" in row(table)["labels"]
    assert any("heldout, code, code-ema" in note for note in table.notes)
    assert row(read([folder], columns={"loss": "code-ema"}))["loss"] == 3.1
    assert row(read([folder], columns={"loss": "train"}))["loss_kind"] == "training, smoothed"
    with pytest.raises(ValueError, match=r"'wiki'.*accepted: heldout, code, code-ema, train"):
        read([folder], columns={"loss": "wiki"})


def test_rewritten_steps_count_as_they_were_written_last(tmp_path):
    rows = [*metrics(1, 1990, loss=9.0), *metrics(1001, 2000)]
    events = [event("run_start"), event("resume", 1000 * BATCH), FINISHED[-1]]
    found = row(read([write(tmp_path / "a", rows, events=events)]))
    assert abs(found["loss"] - 2.5) < 0.05
    assert "2 launches" in found["labels"] and "990 rows written again" in found["labels"]


def test_what_an_abandoned_launch_wrote_past_the_resume_is_not_the_end(tmp_path):
    rows = [*metrics(1, 2000, loss=9.0), *metrics(1001, 1500)]
    events = [event("run_start"), event("resume", 1000 * BATCH), event("run_end", 1500 * BATCH, outcome="interrupted")]
    found = row(read([write(tmp_path / "a", rows, events=events, evaluations=[evaluation(END, 1.0)])]))
    assert found["tokens"] == 1500 * BATCH and found["status"] == "killed" and found["loss"] < 3
    assert "stopped: interrupted" in found["labels"]


@pytest.mark.parametrize("rows", [[*metrics(1, 1500), *metrics(900, 1100), *metrics(1050, 2000)], metrics(1, 1999)])
def test_the_end_of_a_log_is_read_as_the_whole_would_be(tmp_path, rows):
    folder = write(tmp_path / "a", rows)
    tail = read_tail(folder / "metrics.jsonl")
    last = {}
    for each in rows:
        last = {step: row for step, row in last.items() if step < each["step"]} | {each["step"]: each}
    assert tail.rows == list(last.values())[-len(tail.rows) :]
    assert 100 <= len(tail.rows) <= len(last)


def test_an_unfinished_last_line_and_broken_lines_are_labelled(tmp_path):
    folder = write(tmp_path / "a", tail='{"step": 2001, "tok')
    text = (folder / "metrics.jsonl").read_text().split("\n")
    text[1989] = '{"step": 19'
    (folder / "metrics.jsonl").write_text("\n".join(text))
    found = row(read([folder]))
    assert "metrics.jsonl: last line cut short" in found["labels"]
    assert "metrics.jsonl: line 1990 is not a JSON object" in found["labels"]
    assert found["steps"] == 2000


@pytest.mark.parametrize(
    ("events", "status"),
    [
        (FINISHED, "finished"),
        ([event("run_start"), event("run_end", END, outcome="diverged")], "diverged"),
        ([event("run_start"), event("run_end", END, outcome="out_of_time")], "killed"),
        ([event("run_start"), event("run_end", 9, outcome="interrupted"), event("resume"), FINISHED[-1]], "finished"),
        ([*FINISHED, event("resume", END)], "killed"),
        ([event("run_start")], "killed"),
    ],
)
def test_the_last_launch_tells_the_status(tmp_path, events, status):
    folder = write(tmp_path / "a", events=events)
    age(folder)
    assert row(read([folder]))["status"] == status


@pytest.mark.parametrize(("rule", "status"), [("initial", "diverged"), ("unigram", "killed"), ("margin", "killed")])
def test_a_run_that_a_sweep_stopped_is_told_by_its_rule(tmp_path, rule, status):
    reason = "at 9 tokens the lowest of the last 8 logged losses, 7.0000, is above 6.0000"
    end = event("run_end", 900 * BATCH, outcome="interrupted")
    stop = {"event": "stopped_early", "reason": reason, "rule": rule, "tokens": 900 * BATCH}
    folder = write(tmp_path / "a", metrics(1, 895), events=[event("run_start"), end, stop])
    found = row(read([folder]))
    assert found["status"] == status and found["tokens"] == 900 * BATCH
    assert f"stopped early: {reason}" in found["labels"].split("; ")
    again = [event("run_start"), end, stop, event("resume", 900 * BATCH), FINISHED[-1]]
    assert row(read([write(tmp_path / "b", events=again)]))["status"] == "finished"


def test_a_run_without_an_end_is_running_while_it_writes_or_holds_its_lock(tmp_path):
    folder = write(tmp_path / "a", events=[event("run_start")])
    os.utime(folder / "metrics.jsonl", (time.time() + 60,) * 2)
    assert row(read([folder]))["status"] == "running"
    age(folder)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert row(read([folder]))["status"] == "running"
    assert row(read([folder]))["status"] == "killed"


def test_a_loss_that_ends_in_no_number_is_a_divergence(tmp_path):
    rows = metrics(1, 500)
    del rows[-1]["loss"]  # as the writer leaves out what JSON has no word for
    folder = write(tmp_path / "a", rows, events=[event("run_start")])
    found = row(read([folder]))
    assert found["status"] == "diverged" and np.isnan(found["loss"])


def test_seeds_share_a_data_mixture_and_weights_do_not(tmp_path):
    other = run_json("c")
    other["data"]["sources"].append({"path": "x", "fingerprint": "code", "tokens": 10**9, "weight": 3.0})
    write(tmp_path / "a")
    write(tmp_path / "b", identity=run_json("b", seed=1, data=run_json()["data"] | {"fingerprint": "another order"}))
    write(tmp_path / "c", identity=other)
    data = read([tmp_path]).frame.set_index("run")["data"]
    assert data["a"] == data["b"] != data["c"]


def test_a_small_corpus_is_seen_several_times(tmp_path):
    identity = run_json("a")
    identity["data"]["sources"] = [
        {"path": "x", "fingerprint": "x", "tokens": 1000, "weight": 1.0},
        {"path": "y", "fingerprint": "y", "tokens": 10**9, "weight": 3.0},
    ]
    assert row(read([write(tmp_path / "a", identity=identity)]))["unique_tokens"] == 1000 + 0.75 * END


def test_a_copy_of_a_run_is_labelled_and_the_longer_one_is_not(tmp_path):
    write(tmp_path / "copy", metrics(1, 1000), identity=run_json("a"), events=[event("run_start")])
    write(tmp_path / "run", identity=run_json("a"))
    labels = dict(zip(*(read([tmp_path]).frame[name] for name in ("source", "labels")), strict=True))
    assert labels[str(tmp_path / "run")] is None
    assert f"duplicate of {tmp_path / 'run'}" in labels[str(tmp_path / "copy")]


def test_a_grown_run_has_the_counts_of_its_last_segment(tmp_path):
    identity = run_json("a", segments=[segment(), segment(1, 1000 * BATCH, 100_000)])
    found = row(read([write(tmp_path / "a", identity=identity)]))
    assert found["non_embedding"] == 100_000 and "grew at 1.024e+06 tokens" in found["labels"]


LEFT = 500 * BATCH
OTHER = run_json()["data"] | {"sources": [{"path": "y", "fingerprint": "code", "tokens": 10**9, "weight": 1.0}]}


def child(parent, carry="all", name="b", left=LEFT, **changes):
    origin = {"run": parent, "checkpoint": f"moved/{parent}/x", "tokens": left, "carry": carry, "flops": 1}
    return run_json(name, parent=origin, **changes)


@pytest.mark.parametrize(
    ("carry", "changes", "tokens", "parent_tokens"),
    [
        ("all", {}, END, None),
        ("weights", {}, LEFT + END, None),
        ("all", {"segments": [segment(0, LEFT, num_layers=8)]}, END - LEFT, LEFT),
        ("weights", {"segments": [segment(num_layers=8)]}, END, LEFT),
        ("all", {"data": OTHER}, END - LEFT, LEFT),
        ("weights", {"data": OTHER}, END, LEFT),
    ],
    ids=["branch", "new clock", "grown", "converted", "second stage", "second stage, new clock"],
)
def test_tokens_are_a_runs_own_where_its_parent_is_another_run(tmp_path, carry, changes, tokens, parent_tokens):
    write(tmp_path / "a")
    folder = write(tmp_path / "b", identity=child("a", carry, **changes), evaluations=[evaluation(END, 2.6)])
    found = row(read([folder]))
    assert (found["parent"], found["tokens"], found["loss"]) == ("a", tokens, 2.6)
    assert found.get("parent_tokens", float("nan")) == pytest.approx(parent_tokens or float("nan"), nan_ok=True)
    assert "unknown" not in (found["labels"] or "")
    assert ("other" in (found["labels"] or "")) == (parent_tokens is not None)


@pytest.mark.parametrize(("identity", "said"), [({}, True), ({"identity": child("a")}, False)], ids=["alone", "branch"])
def test_a_run_that_ends_above_its_first_loss_is_labelled(tmp_path, identity, said):
    write(tmp_path / "a")
    found = row(read([write(tmp_path / "b", evaluations=[evaluation(END, 12.0)], **identity)]))
    assert ("ends above its first loss" in (found["labels"] or "")) == said


def test_a_branch_of_a_grown_run_has_its_parents_beginning(tmp_path):
    grown = {"segments": [segment(0, LEFT, num_layers=8)]}
    write(tmp_path / "a")
    write(tmp_path / "b", identity=child("a", **grown))
    found = row(read([write(tmp_path / "c", identity=child("b", name="c", left=3 * LEFT, **grown))]))
    assert (found["tokens"], found["parent_tokens"]) == (END - LEFT, LEFT)
    again = child("b", name="d", left=3 * LEFT, segments=[segment(0, 3 * LEFT, num_layers=16)])
    found = row(read([write(tmp_path / "d", identity=again)]))
    assert (found["tokens"], found["parent_tokens"]) == (END - 3 * LEFT, 3 * LEFT)


def test_a_branch_from_before_its_parents_growth_has_the_model_of_then(tmp_path):
    write(tmp_path / "a", identity=run_json("a", segments=[segment(), segment(1, 2 * LEFT, num_layers=8)]))
    small = row(read([write(tmp_path / "b", identity=child("a", left=2 * LEFT))]))
    assert small["tokens"] == END and "parent_tokens" not in small.dropna()
    large = child("a", name="c", left=3 * LEFT, segments=[segment(0, 3 * LEFT, num_layers=8)])
    assert "parent_tokens" not in row(read([write(tmp_path / "c", identity=large)])).dropna()


@pytest.mark.parametrize(
    ("carry", "tokens", "parent_tokens", "said"),
    [("all", END, None, "taken for the same run"), ("weights", END, LEFT, "taken for another run")],
)
def test_a_parent_that_is_gone_is_told(tmp_path, carry, tokens, parent_tokens, said):
    found = row(read([write(tmp_path / "b", identity=child("a", carry))]))
    assert found["tokens"] == tokens and said in found["labels"]
    assert found.get("parent_tokens", float("nan")) == pytest.approx(parent_tokens or float("nan"), nan_ok=True)
    branch = run_json()["schedule"] | {"branch_tokens": LEFT}
    alone = row(read([write(tmp_path / "c", identity=child("a", name="c", schedule=branch))]))
    assert alone["labels"] is None and alone["tokens"] == END


def test_runs_that_name_each_other_come_to_an_end(tmp_path):
    for name, other in ("ab", "ba"):
        write(tmp_path / name, identity=child(other, name=name))
    assert read([tmp_path]).frame["tokens"].tolist() == [END, END]


@pytest.mark.parametrize(
    ("plan", "loops", "ends", "tied", "recurrences"),
    [("cycle", 2, 1, 2, 2), ("middle_cycle", 2, 1, 1, 2), ([0, 0, 1, 1], 1, 1, 2, 2)],
)
def test_a_tied_model_has_parameters_used_once_and_repeatedly(tmp_path, plan, loops, ends, tied, recurrences):
    block = 4 * 32 * 32 + 3 * 32 * 88 + 2 * 32
    tying = {"plan": plan, "loops": loops, "ends": ends}
    identity = run_json("a", segments=[segment(non_embedding=4 * block + 32, tying=tying)])
    found = row(read([write(tmp_path / "a", identity=identity)]))
    assert (found["recurrences"], found["recurrent"]) == (recurrences, tied * block)
    assert found["once"] + found["recurrent"] == found["non_embedding"]


def test_streams_are_those_of_the_model(tmp_path):
    identity = run_json("a", segments=[segment(streams={"count": 4})])
    assert row(read([write(tmp_path / "a", identity=identity)]))["streams"] == 4


def test_markup_in_a_name_stays_text(tmp_path):
    name = "<script>alert(1)</script>"
    assert row(read([write(tmp_path / "a", identity=run_json(name))]))["run"] == name


@pytest.mark.parametrize("rows", [[], metrics(1, 1)])
def test_an_empty_run_and_one_point_are_rows_without_a_loss(tmp_path, rows):
    found = row(read([write(tmp_path / "a", rows, events=[event("run_start")])]))
    assert np.isnan(found["loss"]) and found["labels"]


def test_a_log_alone_is_a_run(tmp_path):
    found = row(read([write(tmp_path / "a", identity=False, events=())]))
    assert (found["run"], found["lr"], found["tokens"]) == ("a", 0.004, END)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_run_json_is_named(tmp_path, text):
    folder = write(tmp_path / "a")
    (folder / "run.json").write_text(text)
    with pytest.raises(ValueError, match=str(folder / "run.json")):
        read([folder])


@pytest.mark.parametrize("changes", [{"segments": "x"}, {"data": {"sources": [{"weight": "a"}]}}, {"optimizer": 3}])
def test_a_run_json_of_another_shape_is_named(tmp_path, changes):
    with pytest.raises(ValueError, match=str(tmp_path / "a")):
        read([write(tmp_path / "a", identity=run_json("a", **changes))])


def test_a_place_with_nothing_to_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="neither run directories"):
        read([tmp_path])
    with pytest.raises(ValueError, match="no such file"):
        read([tmp_path / "x"])


def test_the_fingerprint_follows_the_content(tmp_path):
    folder = write(tmp_path / "a")
    first = read([folder]).fingerprint
    assert read([folder]).fingerprint == first
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics(2001, 2001)[0]) + "\n")
    assert read([folder]).fingerprint != first


def test_the_final_rate_of_a_finished_run_is_the_schedules_whatever_its_batch(tmp_path):
    """That of the last step differs with the batch, and would part the cells of a grid of lr and batch."""
    unfinished = write(tmp_path / "a", events=FINISHED[:1])
    age(unfinished)
    table = read([unfinished, write(tmp_path / "b")])
    assert [row(table, k)["status"] for k in (0, 1)] == ["killed", "finished"]
    assert [row(table, k)["final_lr"] for k in (0, 1)] == [1e-4, 0.0]
