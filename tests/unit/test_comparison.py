"""Costs to equal loss against curves whose costs are known; what was not reached is a bound."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.comparison import Curve, common_levels, compare, cost_to, pool, ratio
from scaling.cost_curves import TRAINING, common_measure, curve, last_writes, read_lineage, running_median


def power(name: str, scale: float, end: float = 1e6, points: int = 60) -> Curve:
    """A loss 2 + (scale x 1e3 / tokens)^0.5, at 6 FLOPs and 1 ms a token."""
    tokens = np.geomspace(1e3, end, points)
    loss = 2 + (1e3 * scale / tokens) ** 0.5
    return Curve(name, loss, {"tokens": tokens, "flops": 6 * tokens, "seconds": tokens * 1e-3})


def points(*pairs: tuple[float, float]) -> Curve:
    cost, loss = (np.array(each, dtype=float) for each in zip(*pairs, strict=True))
    return Curve("points", loss, {"tokens": cost, "flops": cost, "seconds": cost * np.nan})


def test_a_run_that_needs_twice_as_much_is_told_to():
    rows = compare({"fast": [power("fast", 1.0)], "slow": [power("slow", 2.0)]})
    assert len(rows) == 10 and rows[0].level > rows[-1].level
    for row in rows:
        expected = 1.0 if row.group == "fast" else 2.0
        assert row.ratios["flops"].value == pytest.approx(expected, rel=2e-3)
        assert row.ratios["tokens"].value == pytest.approx(row.ratios["seconds"].value)
        assert row.costs["tokens"].value == pytest.approx(1e3 * expected / (row.level - 2) ** 2, rel=5e-3)
        assert {each.bound for each in (*row.costs.values(), *row.ratios.values())} == {"exact"}


@pytest.mark.parametrize(
    ("level", "value", "bound"),
    [
        (5.0, 10.0, "at most"),
        (4.0, 10.0, "exact"),
        (3.0, 100.0, "exact"),
        (3.5, 10**1.5, "exact"),
        (2.5, (200 * 1000) ** 0.5, "exact"),
        (2.0, 1000.0, "exact"),
        (1.9, 1e4, "at least"),
    ],
)
def test_a_cost_is_read_where_the_lowest_loss_so_far_comes_down_to_the_level(level, value, bound):
    wandering = points((10, 4), (100, 3), (200, 3.8), (1000, 2), (1e4, 2.6))
    found = cost_to(wandering, level, "tokens")
    assert (found.value, found.bound) == (pytest.approx(value), bound)


def test_an_unknown_cost_stays_unknown():
    found = compare({"a": [points((1, 3), (2, 2))], "b": [points((1, 3), (2, 2))]}, [2.5])
    assert all(row.costs["seconds"].bound == "unknown" and math.isnan(row.costs["seconds"].value) for row in found)
    assert found[1].ratios["seconds"].bound == "unknown" and found[1].ratios["flops"].value == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "bound"),
    [(2.0, 1.0, "at least"), (1.0, 2.0, "at most"), (2.0, 2.0, "unknown")],
)
def test_a_ratio_to_what_was_not_reached_is_a_bound(ours, theirs, bound):
    curves = {end: points((1, 3), (10, 1 if end == 1.0 else 2)) for end in (1.0, 2.0)}
    rows = compare({"first": [curves[theirs]], "second": [curves[ours]]}, [1.5])
    assert rows[1].ratios["flops"].bound == bound
    reached = [row.costs["flops"].reached for row in rows]
    assert reached == [int(theirs == 1), int(ours == 1)]


def test_several_seeds_have_an_interval_that_holds_their_mean():
    generator = np.random.default_rng(0)
    noisy = lambda scale: [power("", scale * math.exp(generator.normal(0, 0.05))) for _ in range(6)]  # noqa: E731
    (first, second) = compare({"one": noisy(1.0), "half": noisy(0.5)}, [2.2])
    found = second.ratios["flops"]
    assert found.low < found.value < found.high and found.low < 0.5 < found.high and found.high / found.low < 1.3
    assert first.costs["flops"].low < 6e3 / 0.04 < first.costs["flops"].high
    alone = compare({"one": noisy(1.0), "single": [power("", 0.5)]}, [2.2])[1]
    assert math.isnan(alone.ratios["flops"].low) and math.isnan(alone.costs["flops"].low)


def test_a_group_with_a_run_that_stays_above_has_a_lower_bound_and_no_interval():
    costs = [cost_to(each, 1.5, "flops") for each in (points((1, 3), (10, 1)), points((1, 3), (100, 2)))]
    found = pool(costs)
    assert (found.bound, found.reached, found.runs) == ("at least", 1, 2) and math.isnan(found.low)
    assert ratio(costs, costs).bound == "unknown"


def test_levels_lie_where_all_runs_have_been_and_else_are_asked_for():
    groups = {"a": [power("a", 1.0, 1e5)], "b": [power("b", 1.0, 1e6), power("c", 0.5, 1e4)]}
    levels = common_levels(groups)
    lowest, highest = 2 + 0.05**0.5, 2 + 0.5**0.5
    assert levels == sorted(levels, reverse=True) and len(levels) == 5
    assert levels[-1] == pytest.approx(lowest) and levels[0] < highest
    with pytest.raises(ValueError, match=r"early comes down to a loss of 2\.5000 and late begins"):
        common_levels({"a": [power("early", 1.0, 4e3)], "b": [power("late", 0.09)]})


@given(st.lists(st.floats(1, 10), min_size=2, max_size=30), st.floats(0.5, 11))
def test_a_lower_loss_never_costs_less(losses, level):
    wandering = Curve("", np.array(losses), {"tokens": np.arange(1.0, len(losses) + 1)})
    first, second = (cost_to(wandering, each, "tokens").value for each in (level, level - 0.3))
    assert second >= first * (1 - 1e-12)


def test_the_running_median_keeps_a_line_and_drops_a_spike():
    line = np.linspace(5, 3, 50)
    assert running_median(line) == pytest.approx(line)
    spiked = line.copy()
    spiked[20] = 40
    assert np.abs(running_median(spiked) - line).max() < 0.1


def write_logs(folder, tokens, *, flops=6.0, before=0.0, parent=None, held_out=(), seconds=1e-3):
    folder.mkdir(parents=True)
    rows = [
        {
            "step": k,
            "tokens": int(each),
            "loss": 3 + 1e3 / each,
            "flops": before + flops * (each - (parent or {"tokens": 0})["tokens"]),
            "wall_time": seconds * (each - (parent or {"tokens": 0})["tokens"]),
        }
        for k, each in enumerate(tokens)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [{"tokens": int(each), "segment": 0, "set": "heldout", "loss": 4 + 1e3 / each} for each in held_out]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "run.json").write_text(json.dumps({"name": folder.name, **({"parent": parent} if parent else {})}))
    return folder


def test_a_branch_has_the_past_and_the_costs_of_its_parent(tmp_path):
    trunk = write_logs(tmp_path / "trunk", range(100, 2001, 100), held_out=[500, 1000, 1500])
    parent = {"run": "trunk", "checkpoint": str(trunk / "checkpoints" / "x"), "carry": "all", "tokens": 1000}
    parent["flops"] = 6000.0
    folder = write_logs(
        tmp_path / "branch", range(1100, 1401, 100), before=6000, parent=parent, held_out=[1200, 1400], seconds=2e-3
    )
    found = curve(read_lineage(folder), "heldout")
    assert found.costs["tokens"].tolist() == [500, 1000, 1200, 1400]
    assert found.costs["flops"] == pytest.approx(6 * found.costs["tokens"])
    # A second of the parent's for its thousand tokens, then the branch at half its speed.
    assert found.costs["seconds"] == pytest.approx([0.5, 1.0, 1.4, 1.8])
    assert found.loss == pytest.approx(4 + 1e3 / found.costs["tokens"])


def test_a_parent_that_cannot_be_read_is_told_and_its_flops_counted(tmp_path):
    parent = {"run": "gone", "checkpoint": "/nowhere/gone/checkpoints/x", "carry": "weights", "tokens": 1000}
    parent["flops"] = 6000.0
    folder = tmp_path / "grown"
    write_logs(folder, [100, 200], held_out=[100, 200])
    rows = [{"step": k, "tokens": k * 100, "loss": 3.0, "flops": 6000 + k * 600, "wall_time": k} for k in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps({"name": "grown", "parent": parent}))
    lineage = read_lineage(folder)
    found = curve(lineage, "heldout")
    assert found.costs["tokens"].tolist() == [1100, 1200] and found.costs["flops"].tolist() == [6600, 7200]
    assert found.costs["seconds"].tolist() == [1, 2]
    (note,) = lineage.notes
    assert note == "grown: the logs of gone cannot be read, so its wall time is its own"


def test_the_last_write_of_a_step_counts_and_a_fragment_does_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "tokens": 10, "loss": 1}\n{"step": 2, "tokens": 20}\n{"step": 1, "tokens": 10, "loss"')
    with open(path, "a") as file:
        file.write('\n{"step": 1, "tokens": 10, "loss": 3}\n[]\n{"step": 3, "tok')
    assert [row.get("loss") for row in last_writes(path, ("step",))] == [3, None]


def test_runs_without_a_set_in_common_are_compared_by_their_training_loss(tmp_path):
    one = read_lineage(write_logs(tmp_path / "a", range(100, 1001, 100), held_out=[500, 1000]))
    two = read_lineage(write_logs(tmp_path / "b", range(100, 1001, 100)))
    assert common_measure([one]) == "heldout" and common_measure([one, two]) == TRAINING
    assert common_measure([one], TRAINING) == TRAINING and len(curve(two, TRAINING).loss) == 10
    with pytest.raises(ValueError, match="'other' is no set that all runs were evaluated on; accepted: heldout, train"):
        common_measure([one], "other")
    with pytest.raises(ValueError, match="has no logged step"):
        read_lineage(tmp_path)
