"""The experiments of schedules and batches: arms that can run, and reports that say what invented runs show."""

import importlib
import json
import math

import pytest

from experiments.adaptive_batch import plan as adaptive_batch
from experiments.arms import merged
from experiments.critical_batch import plan as critical_batch
from experiments.critical_batch.report import critical
from experiments.power import plan as power
from experiments.power.report import mean_regret
from experiments.rewarming import plan as rewarming
from experiments.rewarming.text import docstrings
from experiments.run import Queue
from experiments.store import Store
from experiments.tails import averages
from experiments.tails import plan as tails
from launch.growth_config import RunConfiguration
from runtime.model.config import ModelConfig
from runtime.model.counts import count

PICTURES = {"power": 1, "tails": 2, "adaptive_batch": 2, "critical_batch": 2, "rewarming": 1}


def invented_loss(arm):
    """Best at the rate of 4e-3; seeds lie 0.01 apart; sides of some names are 0.1 above the rest."""
    rate, seed = float(arm.name.rsplit("-lr", 1)[1].split("-s")[0]), arm.config["run"]["seed"]
    worse = 0.1 * arm.name.startswith(("power", "large", "tail-square", "branch-0.1-x16", "no-re-warming"))
    return 3.0 + worse + 0.01 * (seed - 1) + 0.05 * math.log2(rate / 4e-3) ** 2


def pretend(store, arm):
    """The folder of a run of this arm, with all that reports read."""
    config, folder, loss = arm.config, store.path(arm).with_suffix(""), invented_loss(arm)
    store.write(arm)
    (folder / "checkpoints").mkdir(parents=True)
    schedule = config["schedule"]
    end = schedule["branch"]["at"] + schedule["branch"]["decay"] if "branch" in schedule else schedule["horizon"]
    step = config["batch"]["sequences"] * config["data"]["seq_len"]
    rows = [
        {"step": n, "tokens": end * n // 2, "flops": arm.flops * n / 2, "wall_time": 9.0, "loss": loss,
         "batch_tokens": step, "segment": 0, "noise_scale": 12.0}
        for n in (1, 2)
    ]  # fmt: skip
    names = [each["name"] for each in config["evaluation"]["sets"]]
    evaluations = [{"tokens": end, "set": name, "loss": loss + (name == "second")} for name in names]
    files = {"metrics": rows, "evaluations": evaluations, "events": [{"event": "run_end", "outcome": "finished"}]}
    for name, found in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))
    counts = {"non_embedding": count(ModelConfig.model_validate(config["model"])).non_embedding}
    record = {"segments": [{"counts": counts, "device": "cpu"}], "versions": {"python": "3", "torch": "2"}}
    (folder / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("name", PICTURES)
def test_arms_are_configurations_and_a_report_says_what_invented_runs_show(name, tmp_path, monkeypatch):
    experiment, report = (importlib.import_module(f"experiments.{name}{part}") for part in ("", ".report"))
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    monkeypatch.setattr(averages, "measured", lambda size, lr: {"uniform": {str(seed): 3.2 for seed in range(3)}})
    queue, seen = Queue(experiment, Store(name, "cpu", tmp_path / "runs")), set()
    while pending := queue.pending(*queue.known()):
        for arm in pending:
            kind = arm.name.rsplit("-lr", 1)[0]
            if kind not in seen:  # a rate and a seed more change nothing of what is checked
                RunConfiguration.model_validate(merged(arm.config, {"run": {"name": "arm"}}))
                seen.add(kind)
            pretend(queue.store, arm)
    experiment.report("cpu", queue.known()[1])
    folder = tmp_path / "results" / "cpu"
    text, numbers = (folder / "results.md").read_text(), json.loads((folder / "results.json").read_text())
    assert len(list(folder.glob("*.png"))) == PICTURES[name]
    assert all(f"![]({path.name})" in text for path in folder.glob("*.png"))
    check(name, numbers, text)


def check(name, numbers, text):
    if name == "power":
        assert mean_regret(numbers["regret"]["power"]) == pytest.approx(0.1)
        assert mean_regret(numbers["regret"]["wsd-carried"]) == pytest.approx(0.0)
    elif name == "tails":
        assert numbers["contenders"]["tail-square"]["gain"]["mean"] == pytest.approx(-0.1)
        assert "| 0.8 | 0 | 3 |" in text and "+0.2000" in text
    elif name == "adaptive_batch":
        assert numbers["contenders"]["large"]["gain"]["mean"] == pytest.approx(-0.1)
        assert len(numbers["contenders"]) == len(adaptive_batch.batches("cpu")) == 13
    elif name == "critical_batch":
        found = {share: point["seeds"]["0"]["critical batch"] for share, point in numbers["points"].items()}
        assert found["0.3"] == found["0.9"] == 64 and 32 < found["0.1"] < 36
        assert numbers["points"]["0.3"]["seeds"]["0"]["noise scale"]["value"] == 12.0
    else:
        texts = numbers["texts"]
        assert len(texts) == 13 and texts["first stage"]["second"][0] == pytest.approx(
            1 + texts["first stage"]["heldout"][0]
        )
        assert "-0.1000" in text


# The plans


def test_power_has_the_swept_rate_at_the_end_of_the_cheapest_cell():
    arm = power.arm("cpu", "power", power.CALIBRATION, 2e-3, 0)
    own, tokens = arm.config["schedule"]["power"], arm.config["schedule"]["horizon"]
    assert arm.config["batch"]["sequences"] * own["a"] * tokens ** own["b"] == pytest.approx(2e-3)
    other = power.arm("cpu", "power", (1.0, 4), 2e-3, 0)
    assert other.config["schedule"]["power"] == own and other.config["optim"] == arm.config["optim"]


def test_branches_begin_where_their_stable_run_keeps_a_checkpoint_and_end_where_scratch_does():
    stable = tails.stable("cpu", 4e-3, 0)
    for share in tails.POINTS:
        config = tails.branch("cpu", "fan", share, tails.TAIL, 4e-3, 0).config
        at = config["schedule"]["branch"]["at"]
        assert at % stable.config["checkpoint"]["keep_every"] == 0 and f"tokens-{at}-" in config["start"]["from"]
        horizon = tails.scratch("cpu", share, 4e-3, 0).config["schedule"]["horizon"]
        assert horizon == at + config["schedule"]["branch"]["decay"]


def test_branches_of_larger_batches_have_a_rate_larger_by_the_root_and_whole_steps():
    for share in critical_batch.POINTS:
        for multiple in critical_batch.MULTIPLES:
            config = critical_batch.branch("cpu", share, multiple, 1e-3, 0).config
            assert config["optim"]["lr"] == pytest.approx(1e-3 * math.sqrt(multiple))
            step = config["batch"]["sequences"] * config["data"]["seq_len"]
            assert config["schedule"]["branch"]["decay"] % step == config["schedule"]["branch"]["at"] % step == 0


def test_a_second_stage_goes_on_at_the_first_ones_last_rate_or_warms_up_again():
    schedule, tokens = rewarming.SIZES["cpu"].config["schedule"], rewarming.SIZES["cpu"].tokens
    for peak, replay in ((None, 0.0), (0.5, 0.25)):
        arm = rewarming.second_stage("cpu", "any", peak, replay, 4e-3, 0)
        config = RunConfiguration.model_validate(merged(arm.config, {"run": {"name": "arm"}}))
        rates = config.schedule.build(config.optim.lr, 8, 128)
        step = 8 * 128
        assert rates(tokens - step, step) == pytest.approx(schedule["final"] * 4e-3, rel=0.5)
        assert rates(tokens + step, step) <= (schedule["final"] if peak is None else peak) * 4e-3 * (1 + 1e-9)
        highest = max(rates(tokens + step * n, step) for n in range(1, 60))
        assert highest == pytest.approx((peak or schedule["final"]) * 4e-3, rel=1e-2)
        assert math.fsum(each.weight for each in config.data.sources) == 1 and len(config.data.sources) == 1 + bool(
            replay
        )


# What reports compute


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1: 3.0, 2: 3.0, 4: 3.0}, 4.0),
        ({1: 3.0, 2: 3.02, 4: 3.1}, 2**0.5),
        ({1: 3.0, 2: 2.9, 4: 2.92}, 2 * 2**0.5),
        ({1: 3.0, 2: math.inf, 4: 3.0}, 1.0),
    ],
    ids=["all are equal", "half-way to the second", "against the lowest so far", "one that diverged"],
)
def test_the_critical_batch_is_the_last_whose_loss_is_no_worse(losses, expected):
    assert critical(losses, tolerance=0.01) == pytest.approx(expected)


def test_docstrings_are_those_of_modules_classes_and_functions(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""One."""\nclass A:\n    """Two."""\n    def b(self):\n        """Three."""\n        x = """no"""\n'
    )
    assert docstrings(path) == "One.\n\nTwo.\n\nThree."
    path.write_text("def broken(:\n")
    assert docstrings(path) == ""


def test_averages_of_each_seed_are_kept_apart():
    folders = [Store("tails", "cpu").path(tails.stable("cpu", 4e-3, seed)).with_suffix("") for seed in range(3)]
    assert len({averages.beside(each, "averages.json") for each in folders}) == 3
