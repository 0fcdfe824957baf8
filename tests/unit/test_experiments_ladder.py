"""The experiment of the ladder: a sweep over two settings, arms in stages, and the regret of invented runs."""

import importlib
import json
import math
from functools import partial

import numpy as np
import pytest

from experiments import ladder
from experiments.arms import merged
from experiments.contest import SEEDS
from experiments.ladder import law, plan
from experiments.ladder.cells import HELD_OUT, LENGTHS, SIZES, WIDTHS, Cell, held_out, rungs
from experiments.ladder.grid import STEPS, around, search
from experiments.ladder.measure import above, cell_numbers
from experiments.run import Queue
from experiments.store import Store
from launch.growth_config import RunConfiguration
from runtime.model.config import ModelConfig
from runtime.model.counts import count
from scaling.analysis import analyse
from scaling.published import PUBLISHED
from tests.run_folders import event, run_json, segment, write

CURVATURE = np.array([[0.024, -0.006], [-0.006, 0.03]])
"""Of ln loss over ln lr and ln batch: a factor of two off costs half a percent."""
REPORT = importlib.import_module("experiments.ladder.report")
ALPHA, BETA, FLOOR = 0.3, 0.3, 1.6


def best_settings(n, d):
    """Rate, and batch in tokens, where the invented loss is lowest."""
    return 2.2 * n**-0.6 * d**0.05, 0.9 * d**0.5


def invented_loss(config):
    """A Chinchilla law with a bowl around the best settings; seeds lie 0.002 apart."""
    n = count(ModelConfig.model_validate(config["model"])).non_embedding
    d, lr = config["schedule"]["horizon"], config["optim"]["lr"]
    batch = config["batch"]["sequences"] * config["data"]["seq_len"]
    off = np.log([lr, batch]) - np.log(best_settings(n, d))
    level = FLOOR + 20 * n**-ALPHA + 40 * d**-BETA
    return level * math.exp(off @ CURVATURE @ off / 2) + 0.002 * (config["run"]["seed"] - 1)


def pretend(store, arm, loss=None):
    """The folder of a run of this arm, with all that readers and the report read."""
    config, folder = arm.config, store.path(arm).with_suffix("")
    store.write(arm)
    model = ModelConfig.model_validate(config["model"])
    counts, d, lr = count(model), config["schedule"]["horizon"], config["optim"]["lr"]
    batch, seq_len = config["batch"]["sequences"], config["data"]["seq_len"]
    own = segment(non_embedding=counts.non_embedding, num_layers=model.num_layers, hidden_size=model.hidden_size) | {
        "batch_sequences": batch, "batch_tokens": batch * seq_len, "flops_per_token": round(arm.flops / d),
        "counts": {"total": counts.total, "non_embedding": counts.non_embedding, "active": counts.active},
        "device": "cpu",
    }  # fmt: skip
    schedule = {"kind": "wsd", "peak_lr": lr, "final_lr": 0.0, "horizon_tokens": d, "warmup_tokens": d // 10}
    identity = run_json(
        arm.name, seed=config["run"]["seed"], schedule=schedule, segments=[own],
        optimizer={"name": "adamw", "lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.1},
        versions={"python": "3", "torch": "2"},
    )  # fmt: skip
    loss = invented_loss(config) if loss is None else loss
    rows = [
        {"step": n, "tokens": d * n // 2, "segment": 0, "loss": loss, "lr": lr * batch / n / 1000, "wall_time": 9.0,
         "batch_tokens": batch * seq_len, "flops": arm.flops * n / 2}
        for n in (1, 2)
    ]  # fmt: skip
    write(
        folder, rows, identity=identity, evaluations=[{"tokens": d, "segment": 0, "set": "heldout", "loss": loss}],
        events=[event("run_start"), event("run_end", d, outcome="finished")],
    )  # fmt: skip


# Sweeps over two settings


def bowl_at(lr, batch):
    return lambda point: math.log2(point[0] / lr) ** 2 + math.log2(point[1] / batch) ** 2


def run_through(loss, largest=64, start=(1.0, 4)):
    """The sweep when nothing is left to be measured, and what it asked for first."""
    known, first = {}, search(around(start), largest, {}.get).wanted
    while (found := search(around(start), largest, known.get)).best is None and not known.keys() >= set(found.wanted):
        known |= {point: loss(point) for point in found.wanted}
    return found, first


@pytest.mark.parametrize(
    ("loss", "best", "interior", "runs"),
    [
        (bowl_at(1.0, 4), (1.0, 4), True, 9),
        (bowl_at(2.0, 8), (2.0, 8), True, 9 + 5),
        (bowl_at(4.0, 4), (4.0, 4), True, 9 + 6),
        (bowl_at(1.0, 0.5), (1.0, 1), False, 9 + 3),
        (bowl_at(1.0, 256), (1.0, 64), False, 9 + 9),
        (bowl_at(2.0**9, 4), (2.0 ** (STEPS + 1), 4), False, 9 + 3 * STEPS),
        (lambda point: math.inf if point[0] > 1 else bowl_at(1.0, 4)(point), (1.0, 4), True, 9),
        (lambda point: math.nan if point[0] > 1 else bowl_at(1.0, 4)(point), (1.0, 4), False, 9),
        (lambda point: math.nan, None, False, 9),
    ],
    ids=["the start", "a corner", "an edge", "batch 1", "the largest batch", "a rate too far", "diverged beside it",
         "failed beside it", "all failed"],
)  # fmt: skip
def test_a_sweep_of_two_settings_goes_on_until_all_neighbours_of_the_best_are_measured(loss, best, interior, runs):
    found, first = run_through(loss)
    assert len(first) == 9 and (1.0, 4) in first
    assert (found.best, found.interior, len(found.wanted)) == (best, interior, runs)


# The plan


@pytest.mark.parametrize("size", SIZES)
def test_cells_are_configurations_and_the_held_out_one_is_larger_and_not_refused(size):
    cells = [*rungs(size), held_out(size)]
    assert len({cell.label for cell in cells}) == len(WIDTHS) * len(LENGTHS) + 1
    for cell in cells:
        RunConfiguration.model_validate(merged(cell.arm((1e-3, 3)).config, {"run": {"name": "arm"}}))
    largest, beyond = (cell_numbers(cell) for cell in cells[-2:])
    assert 3 <= beyond["flops"] / largest["flops"] <= 4.5
    assert all(beyond[name] > largest[name] for name in ("non_embedding", "tokens"))


def test_a_batch_that_does_not_divide_the_tokens_leaves_whole_steps_of_about_as_many():
    cell = Cell("cpu", *HELD_OUT)
    for batch in (1, 5, 7, 64):
        horizon = cell.arm((1e-3, batch)).config["schedule"]["horizon"]
        assert horizon % (batch * 128) == 0 and horizon == pytest.approx(cell.tokens, rel=0.01)


def test_first_come_the_sweeps_of_the_rungs_alone():
    names = [arm.name for arm in plan.arms("cpu", {})]
    assert len(names) == 9 * len(rungs("cpu")) and all(name.startswith("rung-") for name in names)


# The loop


@pytest.fixture(scope="module")
def looped(tmp_path_factory):
    """The whole experiment on invented runs: the report's folder, its numbers, the queue and the stages of arms."""
    folder = tmp_path_factory.mktemp("ladder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(REPORT, "FOLDER", folder)
        patch.setattr(law, "analyse", partial(analyse, replicates=100))
        queue, stages = Queue(ladder, Store("ladder", "cpu", folder / "runs")), []
        while pending := queue.pending(*queue.known()):
            stages.append({arm.name.split("-")[0] for arm in pending})
            for arm in pending:
                pretend(queue.store, arm)
        ladder.report("cpu", queue.known()[1])
    written = folder / "results" / "cpu"
    return written, json.loads((written / "results.json").read_text()), queue, stages


def test_the_held_out_cell_comes_when_all_rungs_have_ended(looped):
    *_, stages = looped
    assert all(len(stage) == 1 for stage in stages)
    assert [min(stage) for stage in stages] == sorted((min(stage) for stage in stages), reverse=True)


def test_the_law_finds_the_best_settings_and_their_regret_is_small(looped):
    _, numbers, *_ = looped
    rows = {row["label"]: row for row in numbers["contenders"]}
    assert set(rows) == {plan.SWEPT, plan.CARRIED, law.OURS} | {name for name in PUBLISHED if "lr" in PUBLISHED[name]}
    assert all(len(row["losses"]) == len(SEEDS) for row in rows.values())
    lr, batch = best_settings(numbers["held out"]["non_embedding"], numbers["held out"]["tokens"])
    ours = rows[law.OURS]
    assert ours["lr"] == pytest.approx(lr, rel=0.05) and ours["batch"] * 128 == pytest.approx(batch, rel=0.15)
    # Grids have factors of two, so that what is proposed between them is as good as the swept best, or better.
    assert ours["share"] < 1e-3 and ours["by the bowl"] < 1e-3
    assert rows["porian"]["share"] > 10 * max(ours["share"], 1e-4) and rows["porian"]["by the bowl"] > 0.01


def test_the_regret_is_what_the_invented_loss_has(looped):
    _, numbers, *_ = looped
    swept, *others = numbers["contenders"]
    cell = held_out("cpu")
    lowest = invented_loss(cell.arm((swept["lr"], swept["batch"]), 1).config)
    for row in others:
        told = invented_loss(cell.arm((row["lr"], row["batch"]), 1).config)
        assert row["regret"]["mean"] == pytest.approx(told - lowest, abs=1e-9)
        assert row["share"] == pytest.approx(told / lowest - 1, abs=1e-9)


def test_the_predicted_loss_and_the_bowl_are_those_of_the_invented_one(looped):
    _, numbers, *_ = looped
    told, cell = numbers["prediction"], numbers["held out"]
    assert told["inside"] and abs(told["error"]) < 0.01
    assert cell["interior"] and cell["bowl"]["curvature"] == pytest.approx([0.024, -0.006, 0.03], rel=0.1)
    assert cell["bowl"]["loss"] <= cell["loss"]
    assert all(each["bowl"] and each["best"] for each in numbers["rungs"])


def test_the_report_shows_it(looped):
    written, numbers, *_ = looped
    text = (written / "results.md").read_text()
    assert sorted(path.name for path in written.glob("*.png")) == ["held-out.png", "rungs.png"]
    assert all(f"![]({path.name})" in text for path in written.glob("*.png"))
    for row in numbers["contenders"]:
        assert f"| {row['label']} | {row['lr']:g} | {row['batch']} |" in text
    assert "identified" in text and "step_law_lr" in text and "The loss measured there is" in text


def test_asking_again_does_not_fit_again(looped):
    *_, queue, _ = looped
    before = law.analysed.cache_info().misses
    queue.known()
    assert law.analysed.cache_info().misses == before


def test_a_report_of_half_the_rungs_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(REPORT, "FOLDER", tmp_path)
    queue = Queue(ladder, Store("ladder", "cpu", tmp_path / "runs"))
    for arm in queue.known()[0][:11]:
        pretend(queue.store, arm, loss=math.nan if arm.name.endswith("lr0.016-s0") else None)
    ladder.report("cpu", queue.known()[1])
    text = (tmp_path / "results" / "cpu" / "results.md").read_text()
    assert "not all rungs have ended" in text and "still swept" in text and "held-out cell" not in text


def test_runs_that_tell_no_law_are_said_to(tmp_path):
    """Two runs: the analysis has laws of nothing, and the proposals say so; published laws stand without them."""
    store = Store("ladder", "cpu", tmp_path)
    pair = [Cell("cpu", 1.0, 1.0).arm((4e-3, 4)), Cell("cpu", 1.0, 1.0).arm((8e-3, 4))]
    for arm in pair:
        pretend(store, arm)
    folders = tuple(store.path(arm).with_suffix("") for arm in pair)
    ours, *others = law.proposals(folders, held_out("cpu"), (8e-3, 4))
    assert ours.point is None and ours.note
    by_name = {each.label: each for each in others}
    assert by_name["kaplan"].point[1] == 4 and "no law of the batch" in by_name["kaplan"].note
    assert all(each.point for each in others)


def test_published_proposals_are_their_formulas():
    found = {each.label: each for each in law.proposals((), held_out("cpu"), (8e-3, 4)) if each.point}
    numbers = cell_numbers(held_out("cpu"))
    n, d = numbers["non_embedding"], numbers["tokens"]
    assert found["step-law"].point[0] == pytest.approx(1.79 * n**-0.713 * d**0.307, rel=5e-3)
    assert found["step-law"].point[1] == round(0.58 * d**0.571 / 128)
    assert found["porian"].point[0] == pytest.approx(3.7 * n**-0.36, rel=5e-3)
    assert found["kaplan"].point[0] == pytest.approx(3.239e-3 - 1.395e-4 * math.log(n), rel=5e-3)


def test_a_point_lies_above_a_bowl_by_its_quadratic():
    own = {"curvature": [0.02, 0.0, 0.04], "lr": {"value": 1e-3}, "batch_tokens": {"value": 512}}
    assert above(own, 1e-3, 512) == 0
    assert above(own, 2e-3, 512) == pytest.approx(math.expm1(0.01 * math.log(2) ** 2))
    assert above(own | {"curvature": []}, 1e-3, 512) is None
