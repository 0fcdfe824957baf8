"""Which runs may be fitted together."""

import numpy as np
import pandas as pd
import pytest

from scaling.gates import select
from scaling.table import RunTable, tidy


def table(rows=12, **columns):
    base = {"run": [f"r{k}" for k in range(rows)], "status": ["finished"] * rows, "loss": np.linspace(3, 2, rows),
            "tokens": np.geomspace(1e9, 1e11, rows)}  # fmt: skip
    return RunTable(tidy(pd.DataFrame(base | columns)))


def codes(verdicts):
    return {each.code: each for each in verdicts}


def test_finished_runs_of_one_kind_are_all_kept():
    kept, verdicts = select(table())
    assert kept.all() and {each.level for each in verdicts} == {"ok"}


@pytest.mark.parametrize("status", ["diverged", "killed", "running"])
def test_runs_that_did_not_finish_are_left_out_and_counted(status):
    kept, verdicts = select(table(status=["finished"] * 9 + [status] * 3))
    assert kept.tolist() == [True] * 9 + [False] * 3
    assert codes(verdicts)[status].message.startswith("3 ")


@pytest.mark.parametrize(
    ("loss", "code"), [(np.nan, "no-loss"), (np.inf, "no-loss"), (0.0, "non-positive"), (-1.0, "non-positive")]
)
def test_a_loss_that_is_no_cross_entropy_is_left_out(loss, code):
    kept, verdicts = select(table(loss=[2.0] * 10 + [loss, 2.0]))
    assert kept.sum() == 11 and not kept[10] and code in codes(verdicts)


@pytest.mark.parametrize("name", ["tokens", "total", "non_embedding", "active"])
@pytest.mark.parametrize("value", [np.inf, 0.0, -1e9])
def test_tokens_and_sizes_that_cannot_be_are_left_out_and_unknown_ones_are_not(name, value):
    kept, verdicts = select(table(**{name: [1e9] * 10 + [value, np.nan]}))
    assert kept.tolist() == [True] * 10 + [False, True]
    assert codes(verdicts)["no-amount"].message.startswith(f"1 runs left out: {name}")


def test_one_of_a_run_s_copies_is_kept():
    kept, verdicts = select(table(labels=[None] * 11 + ["2 launches; duplicate of /runs/a"]))
    assert kept.sum() == 11 and "duplicate" in codes(verdicts)


@pytest.mark.parametrize("column", ["tokenizer", "data", "loss_kind"])
def test_runs_that_differ_are_pooled_only_when_asked(column):
    mixed = table(**{column: ["a"] * 4 + ["b"] * 7 + [None]})
    kept, verdicts = select(mixed)
    assert kept.tolist() == [False] * 4 + [True] * 7 + [False]
    said = codes(verdicts)["pool"].message
    assert column in said and "5 runs" in said and "np." not in said
    kept, verdicts = select(mixed, pool=(column,))
    assert kept.all() and "mixed" in codes(verdicts)


def test_a_kind_of_loss_can_be_asked_for():
    mixed = table(loss_kind=["held-out a"] * 3 + ["training, smoothed"] * 9)
    assert select(mixed, loss_kind="held-out a")[0].tolist() == [True] * 3 + [False] * 9
    with pytest.raises(ValueError, match=r"held-out b.*accepted: 'held-out a', 'training, smoothed'"):
        select(mixed, loss_kind="held-out b")


def test_what_runs_may_differ_in_is_named():
    with pytest.raises(ValueError, match=r"'seed'.*tokenizer, data, loss_kind"):
        select(table(), pool=("seed",))


def test_runs_cut_in_mid_decay_warn():
    _, verdicts = select(table(lr=[1e-3] * 12, final_lr=[1e-5] * 10 + [9e-4] * 2, schedule=["cosine"] * 12))
    assert codes(verdicts)["mid-decay"].message.startswith("2 ")
    _, verdicts = select(table(lr=[1e-3] * 12, final_lr=[1e-3] * 12, schedule=["constant"] * 12))
    assert "mid-decay" not in codes(verdicts)


@pytest.mark.parametrize(
    ("factor", "more", "warns"),
    [
        (1.0, {}, False), (3.0, {}, False), (20.0, {}, True), (0.05, {}, True), (20.0, {"active": 2e9}, False),
        (20.0, {"recurrences": 16}, False), (20.0, {"parent_tokens": 1e12}, False),
        (np.where(np.arange(12) < 4, 20.0, 1.0), {}, False),
    ],
)  # fmt: skip
def test_flops_that_are_far_from_6_n_d_in_most_runs_warn(factor, more, warns):
    tokens = np.geomspace(1e9, 1e11, 12)
    _, verdicts = select(table(total=[1e8] * 12, flops=6e8 * tokens * factor, **more))
    assert ("compute" in codes(verdicts)) == warns


def test_labels_of_kept_runs_are_counted():
    _, verdicts = select(table(labels=["2 launches"] * 3 + ["2 launches; 5 steps skipped"] + [None] * 8))
    assert "4 x 2 launches, 1 x 5 steps skipped" in codes(verdicts)["labels"].message
    assert codes(verdicts)["labels"].level == "ok", "a note"
    unlike = ["ends above its first loss, 6.35", "ends above its first loss, 5"]
    _, verdicts = select(table(labels=unlike + [None] * 10))
    assert "2 x ends above its first loss" in codes(verdicts)["labels"].message


@pytest.mark.parametrize(("rows", "level"), [(1, "failure"), (5, "warning")])
def test_too_few_runs_are_said(rows, level):
    assert codes(select(table(rows))[1])["few"].level == level


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"^the table: no run has a loss; name its column with columns loss=NAME \(laws of lr.*without\)$"),
        ({"source": ["a.csv", "b.csv"]}, r"^a.csv, b.csv: no run has a loss"),
        ({"quality": 1.0, "min_loss": 2.0, "fit_nll": 2.0}, r"loss=NAME; it has: min_loss, fit_nll \(laws"),
        ({"quality": 1.0, "note": "text"}, r"loss=NAME; it has: quality \(laws"),
    ],
)
def test_a_table_without_a_loss_is_refused_with_what_may_be_one(columns, message):
    with pytest.raises(ValueError, match=message):
        select(RunTable(tidy(pd.DataFrame({"tokens": [1.0, 2.0], **columns}))))


@pytest.mark.parametrize(("condition", "said"), [("loss", True), ("seed", False)])
def test_runs_that_only_an_unread_column_tells_apart_are_told(condition, said):
    losses = np.repeat([3.0, 2.8, 2.6, 2.4, 2.2, 2.0], 2) * np.tile([1.0, 1.5 if said else 1.01], 6)
    odd = table(total=np.repeat(1e8, 12), tokens=np.repeat(np.geomspace(1e9, 1e11, 6), 2), loss=losses,
                condition=[f"{condition} {k % 2}" for k in range(12)])  # fmt: skip
    found = codes(select(odd)[1])
    assert ("unexplained" in found) == said
    assert not said or "'condition' tell them apart" in found["unexplained"].message


@pytest.mark.parametrize(("status", "hint"), [("killed", True), ("diverged", False)])
def test_the_column_that_tells_a_status_is_named(status, hint):
    runs = table(status=["finished"] * 9 + [status] * 3)
    runs = RunTable(runs.frame, {"status": "State"})
    assert ("'State'" in codes(select(runs)[1])[status].message) == hint
