"""The weight decay of plans and of the next runs, by a law of its timescale."""

import math
import re

import pytest

from launch.config import compose
from launch.planning import Machine, Target, open_preset
from runtime.model.counts import count
from scaling import decisions
from scaling.results import Estimate
from tests.fits import batch_fit, fit, loss_fit, rate_fit
from tests.plans import SMALL, bowls, grid, make_plan_of, run, small_fits, write_laws


def write_preset(tmp_path, weight_decay):
    path = tmp_path / "small.toml"
    path.write_text(SMALL.replace("[optim]", f"[optim]\nweight_decay = {weight_decay}"))
    return str(path)


@pytest.fixture
def preset(tmp_path):
    return write_preset(tmp_path, '"auto"')


def test_a_law_of_the_timescale_gives_the_weight_decay(tmp_path, preset, capsys):
    """At the rate and the batch of the run, and without one at those that are proposed."""
    timescale = fit("weight_decay_timescale", {"c": 1.084, "b": -0.527})
    laws, out = write_laws(tmp_path, *small_fits(), timescale, bowls=bowls()), tmp_path / "plans"
    code, said, err = run(capsys, "--laws", laws, "--compute", "1e13", "--config", preset, "--out", str(out))
    assert code == 0, err
    config = compose(next(out.glob("*.toml")))
    tau = 1.084 * (config.schedule.horizon / count(config.model).non_embedding) ** -0.527
    steps = config.schedule.horizon / (config.batch.sequences * 64)
    assert config.optim.weight_decay == pytest.approx(1 / (config.optim.lr * tau * steps), rel=0.02)
    assert "timescale of weight decay" in said and "\nweight decay " in said
    found = make_plan_of(laws, Target(compute=1e13), None).decision.proposal
    rate, batch, tokens = (found[name].value for name in ("lr", "batch_tokens", "D"))
    assert found["weight_decay"].value == pytest.approx(batch / (rate * found["timescale"].value * tokens))


def test_the_interval_of_a_weight_decay_has_those_of_rate_and_batch():
    one = Estimate(0.2, 0.1, 0.4)
    found = decisions.weight_decay(one, Estimate(1e6, 5e5, 2e6), Estimate(1e-3, 5e-4, 2e-3), 1e10)
    assert found.value == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5 * 2 ** -math.sqrt(3)) and found.high == pytest.approx(0.5 * 2 ** math.sqrt(3))


def test_a_number_of_the_preset_stays(tmp_path):
    timescale = fit("weight_decay_timescale", {"c": 1.084, "b": -0.527})
    laws = write_laws(tmp_path, *small_fits(), timescale, bowls=bowls())
    plan = make_plan_of(laws, Target(compute=1e13), open_preset(write_preset(tmp_path, 0.03), []))
    assert plan.config.optim.weight_decay == 0.03 and plan.decision.proposal["weight_decay"].value != 0.03


NOT_LEFT = {
    "no law of the batch": ([small_fits()[1]], [], 'batch.sequences = "auto" in the preset, .* tells no batch_tokens'),
    "no law of the decay": (small_fits()[1:], [], 'optim.weight_decay = "auto" in the preset'),
    "not identified": (
        [*small_fits()[1:], fit("weight_decay_timescale", {"c": 1.0, "b": -0.5}, level="failure")],
        [],
        "the law of timescale .* is not identified",
    ),
    "the next runs": (small_fits()[1:], ["--next", "2", "--budget", "2e13"], 'optim.weight_decay = "auto"'),
}


@pytest.mark.parametrize("case", NOT_LEFT)
def test_what_the_preset_leaves_to_laws_is_never_a_placeholder(tmp_path, preset, capsys, case):
    fits, more, said = NOT_LEFT[case]
    laws = write_laws(tmp_path, *fits, table=grid() if more else None, bowls=bowls())
    target = ("--params", "400K", "--tokens", "8M")
    code, _, err = run(capsys, "--laws", laws, *target, "--config", preset, *more)
    assert code in (2, 3) and re.search(said, err)


def test_a_timescale_that_is_not_told_takes_nothing_else_away(tmp_path):
    """One of a small sweep, and one of a column that is not known."""
    small = fit("weight_decay_timescale", {"c": 1.084, "b": -0.527}, largest=1e15)
    unknown = fit("timescale = c * hidden_size^a", {"c": 1.0, "a": -0.1})
    for each in (small, unknown):
        found = decisions.decide({"C": 1e19}, [loss_fit(), rate_fit(), batch_fit(), each], bowls())
        assert {"N", "D", "lr", "batch_tokens", "loss"} == set(found.proposal)
        assert any(verdict.message.startswith("no weight decay is told: ") for verdict in found.verdicts)
    far = decisions.decide({"C": 1e19}, [loss_fit(), rate_fit(), batch_fit(), small], bowls(), far=True)
    assert "weight_decay" in far.proposal


def test_a_timescale_is_told_at_the_batch_that_the_mesh_carries(tmp_path, preset):
    follows = fit("timescale = c * B^a", {"c": 1.0, "a": -0.1})
    laws = write_laws(tmp_path, *small_fits(), follows, bowls=bowls())
    plan = make_plan_of(laws, Target(compute=1e13), open_preset(preset, []), Machine(512))
    batch = plan.config.batch.sequences * 64
    assert plan.decision.proposal["timescale"].value == pytest.approx(batch**-0.1)


def test_a_published_timescale_is_for_the_rate_of_the_preset(preset):
    """The test vector of Power Lines: 1e9 parameters, 2e10 tokens, batches of 1e6, lr 3e-3."""
    one, number = Estimate(1.084 * 20**-0.527, 0.0, math.inf), decisions.given
    found = decisions.weight_decay(one, number(1e6), number(3e-3), 2e10)
    assert found.value == pytest.approx(0.0745525, rel=1e-5) and (found.low, found.high) == (0.0, math.inf)
    opened = open_preset(preset, ["optim.lr=0.125", "batch.sequences=16"])
    plan = make_plan_of("power-lines", Target(params=2e5, tokens=4e6), opened)
    assert (plan.config.optim.lr, plan.config.batch.sequences) == (0.125, 16)
    assert plan.config.optim.weight_decay == pytest.approx(plan.decision.proposal["weight_decay"].value, rel=5e-3)


def test_the_next_runs_have_the_weight_decay_of_a_law(tmp_path, preset, capsys):
    timescale = fit("weight_decay_timescale", {"c": 1.084, "b": -0.527})
    laws, out = write_laws(tmp_path, *small_fits(), timescale, table=grid()), tmp_path / "next"
    target = ("--params", "400K", "--tokens", "8M", "--next", "2", "--budget", "2e13")
    code, _, err = run(capsys, "--laws", laws, *target, "--config", preset, "--out", str(out))
    assert code == 0, err
    for path in out.glob("*.toml"):
        config = compose(path)
        tau = 1.084 * (config.schedule.horizon / count(config.model).non_embedding) ** -0.527
        steps = config.schedule.horizon / (config.batch.sequences * 64)
        assert config.optim.weight_decay == pytest.approx(1 / (config.optim.lr * tau * steps), rel=5e-3)
