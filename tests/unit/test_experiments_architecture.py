"""The experiments of the architecture: arms that are comparable and can run, and reports that say what runs show."""

import importlib
import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from experiments.analysis import best_rate
from experiments.arms import Arm, merged, training_flops
from experiments.contest import Contender, wanted
from experiments.loops import plan as loops
from experiments.mup import plan as mup
from experiments.norm_scaling import depths
from experiments.norm_scaling import plan as norm_scaling
from experiments.run import Queue
from experiments.store import Store
from experiments.streams import plan as streams
from experiments.tying import plan as tying
from launch.growth_config import RunConfiguration
from runtime.model.config import ModelConfig
from runtime.model.counts import count
from runtime.model.decoder import Decoder
from runtime.model.initialization import initialize
from tests.token_files import random_documents, write_tokens

PLANS = {"tying": tying, "loops": loops, "streams": streams, "norm_scaling": norm_scaling, "mup": mup}
SIZES = ("cpu", "gpu", "smoke")
INF = math.inf


def ran(losses):
    return {name: SimpleNamespace(loss=loss, outcome="finished") for name, loss in losses.items()}


def every_arm(name, size):
    """One arm of each kind, of the first seed and the middle rate."""
    if name == "mup":
        return {arm.name: arm for *_, rate, seed, arm in mup.grid(size) if (rate, seed) == (1.0, 0)}
    arms = {label: side.make(side.lr, side.seeds[0]) for label, side in PLANS[name].contenders(size).items()}
    if name == "tying":
        arms |= {"dense": tying.dense(size, 0), "reduced": tying.dense(size, 0, 6)}
    return arms


# A contender


def contender(label="a", leader=None):
    return Contender(label, lambda lr, seed: Arm(f"{label}-lr{lr:g}-s{seed}", {}, 1.0), 4.0, leader, (5, 6))


def test_a_contender_sweeps_with_its_first_seed_and_runs_all_seeds_at_its_best_rate():
    names = [arm.name for arm in wanted([contender()], {})]
    assert names == ["a-lr2-s5", "a-lr4-s5", "a-lr8-s5"]
    results = ran({"a-lr2-s5": 3.0, "a-lr4-s5": 2.0, "a-lr8-s5": 2.5})
    assert [arm.name for arm in wanted([contender()], results)] == [*names, "a-lr4-s6"]
    assert contender().runs(results).keys() == {5}


def test_a_follower_waits_for_its_leaders_rate_and_sweeps_nothing():
    follower = contender("b", leader=contender())
    assert wanted([follower], {}) == []
    results = ran({"a-lr2-s5": 3.0, "a-lr4-s5": 2.0, "a-lr8-s5": 1.5, "a-lr16-s5": 1.75})
    assert [arm.name for arm in wanted([follower], results)] == ["b-lr8-s5", "b-lr8-s6"]


@pytest.mark.parametrize(
    "losses, rate, interior",
    [
        ({1.0: 3.0, 2.0: 2.0, 4.0: 3.0}, 2.0, True),
        ({1.0: 2.5, 2.0: 2.0, 4.0: 3.0}, 2 ** (1 - 1 / 6), True),
        ({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}, 1.0, False),
        ({1.0: 3.0, 2.0: 2.0, 4.0: INF}, 2.0, True),
    ],
    ids=["middle", "towards the lower neighbour", "edge", "beside a divergence"],
)
def test_a_best_rate_is_the_vertex_of_the_parabola_in_its_logarithm(losses, rate, interior):
    found, inside = best_rate(losses)
    assert found == pytest.approx(rate) and inside is interior


# The plans


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PLANS)
def test_every_arm_is_a_configuration(name, size):
    for arm in every_arm(name, size).values():
        RunConfiguration.model_validate(merged(arm.config, {"run": {"name": "arm"}}))


@pytest.mark.parametrize("name", PLANS)
def test_the_sizes_ask_the_same(name):
    # Labels name ranks, which follow the width.
    kinds = [Counter(label.rstrip("0123456789") for label in every_arm(name, size)) for size in SIZES]
    assert sum(kinds[0].values()) == sum(kinds[1].values()) == sum(kinds[2].values())


@pytest.mark.parametrize("size", SIZES)
def test_loops_are_compared_at_the_same_flops_with_the_same_parameters_or_the_same_depth(size):
    arms = every_arm("loops", size)
    models = {label: ModelConfig.model_validate(arm.config["model"]) for label, arm in arms.items()}
    for label in [each for line in loops.LINES.values() for each in line]:
        config = arms[label].config
        spent = config["schedule"]["horizon"] * training_flops(config["model"], config["data"]["seq_len"])
        assert spent == pytest.approx(arms["params-1"].flops, rel=1e-3), label
    assert len({count(models[label]).total for label in loops.LINES["parameters"]}) == 1
    assert len({models[label].num_layers for label in loops.LINES["depth"]}) == 1
    for line in loops.LINES.values():
        assert [models[label].tying.loops for label in line] == [1, 2, 4]


def test_one_stream_gets_the_flops_of_several_and_a_second_stage_those_of_both_stages():
    arms = every_arm("streams", "cpu")
    for number in streams.COUNTS[1:]:
        assert arms[f"p1-as-p{number}"].flops == pytest.approx(arms[f"p{number}"].flops, rel=1e-5)
        staged = arms[f"staged{number}"]
        assert staged.flops == pytest.approx(0.9 * arms["p1"].flops + 0.1 * arms[f"p{number}"].flops, rel=1e-5)
        assert staged.config["growth"][0]["at"] + 0.1 * staged.config["schedule"]["horizon"] == pytest.approx(
            staged.config["schedule"]["horizon"]
        )


def test_conversions_wait_for_their_parent_and_begin_from_its_weights_on_other_data():
    before = [arm.name for arm in tying.arms("cpu", {})]
    assert not any("start" in arm.config for arm in tying.arms("cpu", {})) and "dense-lr0.004-s0" in before
    arms = tying.arms("cpu", ran({"dense-lr0.004-s0": 3.0}))
    uptrained = [arm for arm in arms if "start" in arm.config]
    assert {arm.config["run"]["seed"] for arm in uptrained} == {10}
    assert {arm.config["start"]["from"] for arm in uptrained} == {"runs/experiments/tying/cpu/dense-lr0.004-s0"}
    assert {arm.config["schedule"]["horizon"] for arm in uptrained} == {100_000}


def test_the_base_shape_is_run_once_for_both_parametrisations_and_both_axes():
    names = Counter(arm.name for arm in mup.arms("cpu", {}))
    assert set(names.values()) == {1}
    assert sum(name.startswith("base-") for name in names) == len(mup.RATES) * 3
    assert len(names) == (1 + 2 * 2 * 2) * len(mup.RATES) * 3


@pytest.mark.parametrize("axis", mup.AXES, ids=lambda axis: axis.name)
def test_a_transferring_parametrisation_differs_from_the_standard_one_in_that_alone(axis):
    size = mup.SIZES["cpu"]
    standard, other = (axis.model(size, kind, 4) for kind in ("standard", axis.kind))
    base = other.pop("parametrization")
    assert standard == other and base["kind"] == axis.kind
    assert all(base[f"base_{key}"] == size.config["model"][key] for key in ("hidden_size", "num_heads", "head_dim"))
    assert {key for key, value in standard.items() if value == 4 * size.config["model"][key]} == set(axis.grows)


# The reports


def pretend(store, arm, loss):
    """The folder of a run of this arm that ended at `loss`."""
    config, folder = arm.config, store.path(arm).with_suffix("")
    store.write(arm)
    folder.mkdir(parents=True)
    horizon, model = config["schedule"]["horizon"], ModelConfig.model_validate(config["model"])
    row = {"step": 1, "tokens": horizon, "segment": 0, "flops": arm.flops, "wall_time": 9.0, "loss": loss}
    files = {
        "metrics": [row],
        "evaluations": [
            {"tokens": 0, "set": "heldout", "loss": 6.0},
            {"tokens": horizon, "set": "heldout", "loss": loss},
        ],
        "events": [{"event": "run_end", "outcome": "finished"}],
        "health": [{"tokens": horizon, "depth_rms": [math.sqrt(depth + 1) for depth in range(model.num_layers)]}],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    segment = {"counts": {"non_embedding": count(model).non_embedding}, "device": "cpu"}
    (folder / "run.json").write_text(json.dumps({"segments": [segment], "versions": {"python": "3", "torch": "2"}}))


def label_of(arm):
    return arm.name.rsplit("-lr", 1)[0]


def invented_loss(arm):
    """Best at 4e-3, of the shapes of muP at 16e-3 but for larger standard models, whose best rate falls by the factor;
    seeds lie 0.01 apart, and the side that a report compares with is 0.1 above all others."""
    lr, seed, label = arm.config["optim"]["lr"], arm.config["run"]["seed"] % 10, label_of(arm)
    shape = label.split("-")[0]
    best = 16e-3 if shape in ("base", "width2", "width4", "depth2", "depth4") else 4e-3
    best /= int(shape[-1]) if label.endswith("-standard") else 1
    worse = 0.1 * (label in ("stepwise", "p1", "scaled-init", "params-1", "depth-1"))
    return 3.0 + worse + 0.05 * math.log2(lr / best) ** 2 + 0.01 * (seed - 1)


@pytest.mark.parametrize("name", PLANS)
def test_a_report_says_what_invented_runs_show(name, tmp_path, monkeypatch):
    report = importlib.import_module(f"experiments.{name}.report")
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    monkeypatch.setattr(depths, "without_each", lambda run, held_out, seq_len: [0.1] * 24)
    store, experiment = Store(name, "cpu", tmp_path / "runs"), importlib.import_module(f"experiments.{name}")
    queue = Queue(experiment, store)
    experiment.report("cpu", {})
    assert not (tmp_path / "results").exists()
    while pending := queue.pending(*queue.known()):
        for arm in pending:
            pretend(store, arm, invented_loss(arm))
    experiment.report("cpu", queue.known()[1])
    folder = tmp_path / "results" / "cpu"
    check(name, json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text())
    assert all(f"![]({path.name})" in (folder / "results.md").read_text() for path in folder.glob("*.png"))
    assert len(list(folder.glob("*.png"))) == {"tying": 3}.get(name, 2)


def check(name, numbers, text):
    if name == "mup":
        for axis in mup.AXES:
            drift = numbers["drift"][axis.name]
            assert drift["standard"] == pytest.approx([2.0] * 3) and drift["other"] == pytest.approx(
                [0.0] * 3, abs=1e-9
            )
            assert drift["difference"]["mean"] == pytest.approx(2.0)
            largest = numbers["optima"][axis.name]["standard"][-1]
            # Two halvings beyond the best rate.
            assert largest["factor"] == 4 and largest["regret"]["0"] == pytest.approx(0.05 * 4)
        return
    sides = numbers.get("contenders") or {each["label"]: each for line in numbers["lines"].values() for each in line}
    gains = {label: each["gain"]["mean"] for label, each in sides.items() if "gain" in each}
    expected = dict.fromkeys(gains, 0.1)
    assert gains == pytest.approx(expected, abs=1e-9) and len(gains) >= 2
    assert all(each["lr"] == 4e-3 and len(each["losses"]) == 3 for each in sides.values())
    assert "+0.1000" in text and "with a power of 80 %" in text
    for duel in numbers.get("claims", []):
        expected = 0.1 * ((duel["second"] == "stepwise") - (duel["first"] == "stepwise"))
        assert duel["gain"]["mean"] == pytest.approx(expected, abs=1e-9)
    if name == "tying":
        assert len(numbers["dense"]) == len(numbers["reduced"]) == 3
        assert sides["average-svd4"]["before uptraining"] == 6.0 and "right after the conversion" in text


def test_without_a_depth_the_loss_rises_by_what_it_writes(tmp_path, monkeypatch):
    config = ModelConfig(num_layers=3, hidden_size=32, intermediate_size=64, num_heads=2, vocab_size=50, init_std=0.3)
    decoder = Decoder(config)
    initialize(decoder, 0)
    silent = decoder.blocks[1]
    with torch.no_grad():
        silent.attention.o_proj.weight.zero_()
        silent.feed_forward.down_proj.weight.zero_()
    found = SimpleNamespace(config=config, tensors=decoder.state_dict())
    monkeypatch.setattr(depths.formats, "read", lambda path: found)
    held_out = write_tokens(tmp_path / "heldout", random_documents(0, 40, vocab_size=50))
    rises = depths.without_each(tmp_path, held_out, 16)
    assert rises[1] == 0.0 and abs(rises[0]) > 1e-3 and abs(rises[2]) > 1e-3
