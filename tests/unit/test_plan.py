"""From laws to the next run: the optimum, the shape, what the machine holds, and the file that says its sources."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch import main as verbs
from launch import planning
from launch.auto import columns_of, open_laws
from launch.config import compose
from launch.planning import Machine, Target, open_preset
from launch.shapes import Family
from runtime.model.config import ModelConfig
from runtime.model.counts import count, flops_per_token
from runtime.observe.memory import estimate
from runtime.parallel.mesh import plan_layout
from scaling import decisions, optima
from scaling.laws import find
from scaling.proposal import allocate, law_for, value_at
from scaling.results import Verdict
from tests.fits import HOFFMANN, batch_fit, fit, loss_fit, rate_fit
from tests.plans import ONE, SMALL, bowls, grid, make_plan_of, run, small_fits, write_laws

LLAMA = ModelConfig(
    num_layers=22, hidden_size=2048, intermediate_size=5632, num_heads=32, num_kv_heads=4, vocab_size=32000
)


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture
def laws(tmp_path):
    return write_laws(tmp_path, loss_fit(), rate_fit(), batch_fit(), bowls=bowls())


# The optimum.


@pytest.mark.parametrize("compute", [1e18, 1e21, 1e24])
def test_the_split_of_compute_is_chinchilla_s(compute):
    """N = G (C / 6)^(beta / (alpha + beta)), with G = (alpha A / (beta B))^(1 / (alpha + beta)); Hoffmann, eq. 4."""
    a, b, alpha, beta = (HOFFMANN[each] for each in ("A", "B", "alpha", "beta"))
    found = allocate(loss_fit(), compute)
    best = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (compute / 6) ** (beta / (alpha + beta))
    assert found.N.value == pytest.approx(best, rel=1e-3)
    assert found.N.low < best < found.N.high and found.N.value * found.D.value == pytest.approx(compute / 6)
    loss = loss_fit().predict({"N": np.array([found.plateau.low]), "D": compute / 6 / np.array([found.plateau.low])})
    assert loss[0] / found.loss - 1 == pytest.approx(1e-3, rel=0.1)
    assert 0 < found.regret < 1e-3


def test_a_law_without_an_optimum_is_refused():
    with pytest.raises(ValueError, match="has no optimum of N at 1e\\+21 FLOPs"):
        allocate(fit("chinchilla", HOFFMANN | {"B": 1e-6}), 1e21)
    with pytest.raises(ValueError, match="law 'step_law_batch' is of D"):
        allocate(batch_fit(), 1e21)


# The shape.


@given(st.floats(min_value=1e6, max_value=1e12), st.sampled_from(["total", "non_embedding", "active"]))
@example(166685973.0, "non_embedding")  # 19 heads would be the nearest, which share one key-value head
@settings(max_examples=15, deadline=None)
def test_the_nearest_shape_is_near_and_of_the_family(target, size):
    if size != "non_embedding":
        target += 2 * 32000 * 512
    found = Family(LLAMA).nearest(size, target)
    assert getattr(count(found), size) == pytest.approx(target, rel=0.3 if found.num_heads < 32 else 0.05)
    assert (found.head_dim, found.vocab_size) == (64, 32000)
    assert found.num_heads < 8 or 4 <= found.num_heads / found.num_kv_heads <= 16
    assert found.hidden_size == found.num_heads * 64
    assert found.intermediate_size / found.hidden_size == pytest.approx(2.75, rel=0.13)
    nominal = max(1, round(22 * found.hidden_size / 2048))
    assert nominal * 0.7 - 1 <= found.num_layers <= nominal * 1.34 + 1


def test_a_family_has_its_preset():
    for size in ("total", "non_embedding"):
        assert Family(LLAMA).nearest(size, getattr(count(LLAMA), size)) == LLAMA


def test_flops_of_a_family_are_its_shapes_own():
    wanted = np.array([count(LLAMA).non_embedding], dtype=float)
    assert Family(LLAMA).flops_per_token("non_embedding", 2048)(wanted)[0] == pytest.approx(
        flops_per_token(LLAMA, 2048), rel=0.02
    )
    rising = Family(LLAMA).flops_per_token("total", 2048)(np.geomspace(1e3, 1e14, 300))
    assert (np.diff(rising) > 0).all()


def test_tied_depths_and_tensor_parallel_degrees_are_kept_to():
    tied = ModelConfig.model_validate(LLAMA.model_dump() | {"tying": {"plan": "cycle", "loops": 2}})
    assert Family(tied).nearest("total", 5e8).num_layers % 2 == 0
    found = Family(LLAMA, tensor=4).nearest("total", 3e9)
    assert found.num_kv_heads % 4 == 0 and found.intermediate_size % 4 == 0


def test_a_size_below_the_family_is_refused():
    with pytest.raises(ValueError, match="no shape of the preset's family has about 5,000 total parameters; its small"):
        Family(LLAMA).nearest("total", 5000)


# The command.


def test_a_target_of_compute_is_told_with_intervals_and_plateaus(laws, capsys):
    code, out, _ = run(capsys, "--laws", laws, "--compute", "2e20", "--throughput", "1e6")
    assert code == 0
    rows = dict(
        re.findall(r"^(parameters \(non_embedding\)|tokens|batch, tokens|learning rate|loss) +(\S+)", out, re.M)
    )
    n, d = allocate(loss_fit(), 2e20).N.value, allocate(loss_fit(), 2e20).D.value
    known = {"non_embedding": n, "tokens": d}
    assert float(rows["parameters (non_embedding)"]) == pytest.approx(n, rel=1e-3)
    assert float(rows["learning rate"]) == pytest.approx(value_at(rate_fit(), known).value, rel=1e-3)
    assert float(rows["batch, tokens"]) == pytest.approx(value_at(batch_fit(), known).value, rel=1e-3)
    assert float(rows["loss"]) == pytest.approx(value_at(loss_fit(), known).value, rel=1e-3)
    assert out.count(" to ") >= 8 and "2 times the largest compute" in out and "warning" not in out
    assert f"{d / 1e6 / 86400:.3g} days" in out


TARGETS = {
    ("--params", "7B", "--tokens", "140B"): (7e9, 1.4e11),
    ("--params", "7e9", "--compute", "1e21"): (7e9, 1e21 / 6 / 7e9),
    ("--tokens", "1e11", "--compute", "6e20"): (1e9, 1e11),
}


@pytest.mark.parametrize("target", TARGETS)
def test_two_of_three_tell_the_third(laws, capsys, target):
    code, out, _ = run(capsys, "--laws", laws, "--far", *target)
    n, d = (
        float(re.search(rf"^{name}.*? (\d\S+)", out, re.M)[1]) for name in (r"parameters \(non_embedding\)", "tokens")
    )
    assert code == 0 and (n, d) == pytest.approx(TARGETS[target], rel=2e-3)


BAD = {
    "no target": ([], "a target of nothing; accepted are --compute alone, or two"),
    "one": (["--params", "7B"], "a target of --params"),
    "three": (["--params", "7B", "--tokens", "1T", "--compute", "1e21"], "a target of --compute, --params, --tokens"),
    "text": (["--compute", "much"], "--compute 'much' is not a number; accepted are such as 1e21, 7B or 1.4T"),
    "nan": (["--compute", "nan"], "--compute nan is not positive"),
    "negative": (["--compute=-1e20"], "--compute -1e+20 is not positive"),
    "tiny": (["--compute", "100"], "are too few to be split"),
    "out": (["--compute", "1e20", "--out", "x"], "--out needs --config"),
    "memory": (["--compute", "1e20", "--device-memory", "80"], "--device-memory needs --config"),
    "override": (["--compute", "1e20", "optim.lr=1"], "override 'optim.lr=1' is of a preset"),
    "world": (["--compute", "1e20", "--world-size", "0"], "--world-size 0 is not positive"),
    "next": (["--compute", "1e20", "--next", "3"], "--next K and --budget FLOPS belong together"),
    "throughput": (
        ["--compute", "1e20", "--next=3", "--budget=1e20", "--throughput=1e6"], "--throughput is of one shape"
    ),
    "laws": (["--compute", "1e20", "--laws", "nowhere"], "'nowhere' is neither a laws file nor a published law"),
    "preset": (["--compute", "1e20", "--config", "nowhere.toml"], "cannot read the configuration nowhere.toml"),
    "no loss": (["--compute", "1e20", "--laws", "step-law"], "there is no law of loss, which --compute alone needs"),
    "next of a publication": (
        ["--params=1B", "--tokens=1B", "--laws=step-law", "--next=3", "--budget=1e20"], "step-law is a publication"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(laws, capsys, case):
    arguments, said = BAD[case]
    code, out, err = run(capsys, "--laws", laws, *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and said in err


@pytest.mark.parametrize("quantity", ["loss", "lr", "batch_tokens"])
def test_a_law_that_is_not_identified_is_an_answer(tmp_path, capsys, quantity):
    fits = [
        make(level="failure" if name == quantity else "ok")
        for name, make in (("loss", loss_fit), ("lr", rate_fit), ("batch_tokens", batch_fit))
    ]
    laws = write_laws(tmp_path, *fits)
    code, _, err = run(capsys, "--laws", laws, "--compute", "1e20")
    assert code == 3 and f"the law of {quantity} (" in err and "is not identified by its data: made by hand" in err
    assert "--next K --budget FLOPS" in err
    given, *_ = run(capsys, "--laws", laws, "--params", "1B", "--tokens", "10B")
    assert given == (0 if quantity == "loss" else 3)


def test_warnings_of_the_laws_are_told(tmp_path, preset, capsys):
    soft = Verdict("warning", "interval", "E is known to 1.05 only")
    fits = replace(loss_fit(), verdicts=(soft,)), *small_fits()[1:]
    for asked in (["--compute", "2e20"], ["--params", "200K", "--tokens", "1M", "--config", preset]):
        code, out, _ = run(capsys, "--laws", write_laws(tmp_path, *fits), *asked, "--far")
        assert code == 0 and "warning: law of loss (chinchilla): E is known to 1.05 only" in out


def test_far_extrapolation_is_warned_of_and_then_refused(laws, capsys):
    near, out, _ = run(capsys, "--laws", laws, "--compute", "2.9e20")
    assert near == 0 and "warning" not in out
    code, out, _ = run(capsys, "--laws", laws, "--compute", "3.1e20")
    assert code == 0 and "warning: 3.1e+20 FLOPs are 3.1 times the most" in out
    code, out, err = run(capsys, "--laws", laws, "--compute", "1.1e21")
    assert (code, out) == (3, "") and "11 times the most" in err and "--far" in err
    code, out, _ = run(capsys, "--laws", laws, "--compute", "1.1e21", "--far")
    assert code == 0 and "11 times the most" in out


def test_published_laws_plan_too(capsys):
    code, out, _ = run(capsys, "--laws", "step-law", "--params", "1B", "--tokens", "100B")
    assert code == 0 and "By step-law" in out and "0.001632" in out
    code, out, _ = run(capsys, "--laws", "chinchilla-epoch", "--compute", "1e21")
    assert code == 0 and "not known" in out


def test_plan_is_a_verb(laws, capsys):
    assert verbs.main(["plan", "--laws", laws, "--compute", "1e20"]) == 0


def test_a_plan_by_a_published_law_says_what_the_law_was_not_measured_on(preset, capsys):
    arguments = ("--laws=step-law", "--params=300K", "--tokens=4M", f"--config={preset}")
    code, out, _ = run(capsys, *arguments, "model.experts.count=4")
    assert code == 0 and out.count("warning: the law was measured on dense models") == 1
    assert "warning: D = 4e+06 is outside of what was fitted" in out


# The file.


def test_the_plan_is_written_as_a_configuration_that_composes(tmp_path, preset, capsys):
    laws, out = write_laws(tmp_path, *small_fits(), bowls=bowls()), tmp_path / "plans"
    arguments = ("--laws", laws, "--compute", "1e13", "--config", preset, "--out", str(out), "--world-size", "3")
    code, said, err = run(capsys, *arguments)
    assert code == 0, err
    (path,) = out.glob("*.toml")
    assert f"python launch/pretrain.py {path}" in said
    config, text = compose(path), path.read_text()
    assert flops_per_token(config.model, 64) * config.schedule.horizon == pytest.approx(1e13, rel=0.02)
    known = {"non_embedding": count(config.model).non_embedding, "tokens": config.schedule.horizon}
    _, rate, batch = small_fits()
    assert config.batch.sequences * 64 == pytest.approx(value_at(batch, known).value, rel=0.05)
    assert config.batch.sequences % 3 == 0
    assert config.optim.lr == pytest.approx(value_at(rate, known).value, rel=0.05)
    assert laws in text and "lr = c * N^a * D^b" in text and "arXiv 2503.04715" in text and "95 % interval" in text
    assert config.schedule.horizon % (config.batch.sequences * 64) == 0
    assert run(capsys, *arguments)[0] == 0 and list(out.iterdir()) == [path]
    path.write_text(text + "\n")
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "is there, and is another plan" in err


def test_a_hostile_name_of_the_laws_stays_a_comment(tmp_path, preset, capsys):
    folder = tmp_path / 'a\n[run]\nname = "b"'
    folder.mkdir()
    laws = write_laws(folder, *small_fits())
    assert run(capsys, "--laws", laws, "--compute", "1e13", "--config", preset, "--out", str(tmp_path / "o"))[0] == 0
    (path,) = (tmp_path / "o").glob("*.toml")
    assert compose(path).run.name.startswith("small-")


def test_a_grown_preset_is_refused(tmp_path, preset, laws, capsys):
    growth = 'growth=[{operator="depth.stack", at="10%"}]'
    code, _, err = run(capsys, "--laws", laws, "--compute", "1e20", "--config", preset, growth, "schedule.warmup=1")
    assert code == 2 and "a plan is of one shape, and this run grows" in err


def test_a_law_of_the_batch_alone_leaves_the_rate_of_the_preset(tmp_path, preset):
    path = write_laws(tmp_path, small_fits()[2])
    found = make_plan_of(path, Target(params=2e5, tokens=1e6), open_preset(preset, ["optim.lr=0.125"]))
    assert found.config.optim.lr == 0.125


# The machine.


def needed(config, world_size):
    layout = plan_layout(config.parallel, world_size, config.model, config.data.seq_len, *config.batches.sizes)
    return estimate(config, layout, device_type="cpu").total


@pytest.fixture
def once(monkeypatch):
    """Traces of a step are made once for each configuration, which plans of one test share."""
    trace, made = planning._needed, {}

    def needed(raw, machine):
        key = json.dumps([raw, machine.world_size], default=str)
        return made[key] if key in made else made.setdefault(key, trace(raw, machine))

    monkeypatch.setattr(planning, "_needed", needed)


def test_a_plan_fits_the_memory_that_a_device_has(tmp_path, preset, once):
    path, target = write_laws(tmp_path, *small_fits()), Target(params=3e5, tokens=4e6)
    roomy = make_plan_of(path, target, open_preset(preset, []), Machine(2, 10.0))
    assert roomy.config.parallel.recompute == "none" and roomy.memory == needed(roomy.config, 2)
    one = roomy.config.model_copy(update={"batch": roomy.config.batch.model_copy(update={"micro_sequences": 1})})
    least = needed(one, 2)
    assert roomy.config.batch.micro_sequences > 1 and least < roomy.memory
    tight = make_plan_of(path, target, open_preset(preset, []), Machine(2, (least + 1) / 2**30))
    assert tight.memory <= least + 1 and tight.config.batch.sequences == roomy.config.batch.sequences
    assert tight.config.batch.micro_sequences < roomy.config.batch.micro_sequences
    tighter = make_plan_of(path, target, open_preset(preset, []), Machine(2, (least - 1) / 2**30))
    assert tighter.memory < least and (tighter.config.parallel.recompute, tighter.config.parallel.tensor) != ("none", 1)


@given(
    counts=st.lists(st.integers(1, 64), min_size=1, unique=True).map(sorted),
    each=st.floats(0.1, 5.0),
    bend=st.floats(-0.1, 0.1),
    off=st.floats(0.93, 1.07),
    limit=st.floats(1.0, 200.0),
)
def test_the_largest_micro_batch_is_found_from_a_guess(counts, each, bend, off, limit):
    asked = []

    def needed(micro):
        asked.append(micro)
        return 3 + each * micro * (1 + bend * (micro == counts[0]))

    found = planning.largest_held(counts, needed, lambda micro: off * (3 + each * micro), limit)
    fitting = [micro for micro in counts if needed(micro) <= limit]
    assert found == max(fitting, default=None)


def test_a_good_guess_is_looked_at_twice():
    asked = []

    def needed(micro):
        asked.append(micro)
        return 10.0 + micro

    assert planning.largest_held([1, 2, 4, 8, 16, 32], needed, lambda micro: 10.0 + micro, 19.0) == 8
    assert set(asked) <= {8, 16} and planning.largest_held([1, 2], needed, lambda micro: 30.0, 19.0) is None


def test_memory_is_guessed_by_models_of_few_layers(preset):
    raw = planning._with(open_preset(preset, ["batch.sequences=4", "optim.lr=0.1"]).raw, "none", 2)
    raw["model"] |= {"num_layers": 9}
    raw["optim"]["lr"], raw["batch"]["sequences"] = 0.1, 4
    assert planning._likely(raw, ONE) == pytest.approx(planning._needed(raw, ONE), rel=0.01)
    raw["model"] |= {"num_layers": 4}
    assert planning._likely(raw, ONE) is None


def test_what_no_layout_holds_is_refused_with_the_least_that_would(tmp_path, preset):
    path, target = write_laws(tmp_path, *small_fits()), Target(params=3e5, tokens=4e6)
    with pytest.raises(ValueError, match=r"alone need \d+ devices of 0.001 GiB, and there are 1"):
        make_plan_of(path, target, open_preset(preset, []), Machine(1, 1e-3))
    weights = 16.1 * count(make_plan_of(path, target, open_preset(preset, [])).config.model).total / 2**30
    with pytest.raises(ValueError, match="no layout on 1 devices"):
        make_plan_of(path, target, open_preset(preset, []), Machine(1, weights))


# The next runs.


def test_the_next_runs_are_written_within_the_budget(tmp_path, preset, capsys):
    laws, out = write_laws(tmp_path, *small_fits(), table=grid()), tmp_path / "next"
    target = ("--params", "400K", "--tokens", "8M")
    code, said, err = run(
        capsys, "--laws", laws, *target, "--next", "3", "--budget", "2e13", "--config", preset, "--out", str(out)
    )
    assert code == 0, err
    paths = sorted(out.glob("*.toml"))
    assert 1 <= len(paths) <= 3 and said.count("python launch/pretrain.py") == len(paths)
    assert "design regret at the target now" in said and "that of the laws' decision" in said
    for path in paths:
        config, text = compose(path), path.read_text()
        n, d, lr = (float(re.search(rf"{name} = (\S+?),? ", text)[1]) for name in ("N", "D", "lr"))
        assert count(config.model).non_embedding == pytest.approx(n, rel=0.3)
        assert config.schedule.horizon == pytest.approx(d, rel=0.02)
        assert config.optim.lr == pytest.approx(lr, rel=5e-3)


@pytest.mark.parametrize(("gib", "said"), [("0.001", r"alone need \d+ devices of 0.001 GiB"), ("1", None)])
def test_the_next_runs_are_what_a_device_holds(tmp_path, preset, capsys, once, gib, said):
    laws, out = write_laws(tmp_path, *small_fits(), table=grid()), tmp_path / "next"
    asked = ("--params=400K", "--tokens=8M", "--next=2", "--budget=2e13", f"--config={preset}", f"--out={out}")
    code, _, err = run(capsys, "--laws", laws, *asked, f"--device-memory={gib}")
    if said:
        assert code == 2 and re.search(rf"run 1 of 2 \(N = .*{said}", err) and not out.exists()
    else:
        configs = [compose(path) for path in out.glob("*.toml")]
        assert code == 0 and len(configs) == 2 and all(config.batch.micro_sequences for config in configs)
        assert max(needed(config, 1) for config in configs) <= 2**30


def test_too_small_a_budget_says_so(tmp_path, capsys):
    laws = write_laws(tmp_path, *small_fits(), table=grid())
    code, said, _ = run(capsys, "--laws", laws, "--params=400K", "--tokens=8M", "--next=3", "--budget=1e3")
    assert code == 0 and "no run of at most 1000 FLOPs" in said


# What is refused alike by fit, plan and auto.


def untied(at_edge):
    """A law of loss of whose draws this share has no optimum of N: its tokens are worth nothing."""
    law = loss_fit()
    draws = law.draws.copy()
    draws[: round(at_edge * len(draws))] = find("chinchilla").coordinates(HOFFMANN | {"B": 1e-6})
    return replace(law, draws=draws)


def test_an_identified_law_that_comes_second_is_decided_by(tmp_path):
    fits = [fit("chinchilla", HOFFMANN | {"A": 4000.0}, level="failure"), loss_fit()]
    best = allocate(loss_fit(), 1e20).N.value
    assert law_for(fits, "loss") == (fits[1], ())
    planned = make_plan_of(write_laws(tmp_path, *fits), Target(1e20), None)
    for found in (planned.decision, decisions.decide({"C": 1e20}, fits)):
        assert found.proposal["N"].value == pytest.approx(best)


def test_compute_is_not_split_by_a_law_that_is_not_identified():
    found = decisions.decide({"C": 1e20}, [loss_fit(level="failure")])
    assert not found.proposal and [each.code for each in found.verdicts if each.level == "failure"] == ["law"]
    given = decisions.decide({"N": 1e9, "D": 1e10}, [loss_fit(level="failure"), rate_fit(), batch_fit()], bowls())
    assert "loss" not in given.proposal and {"N", "D", "lr", "batch_tokens"} <= set(given.proposal)
    assert [(each.level, each.code) for each in given.verdicts] == [("warning", "law")]


@pytest.mark.parametrize(("at_edge", "told"), [(0.04, True), (0.1, False)])
def test_draws_without_an_optimum_are_a_failure_beyond_a_few(tmp_path, capsys, at_edge, told):
    law = untied(at_edge)
    found = decisions.decide({"C": 1e20}, [law])
    assert bool(found.proposal) == told
    assert {each.level for each in found.verdicts if each.code == "no_optimum"} == {"warning" if told else "failure"}
    assert run(capsys, "--laws", write_laws(tmp_path, law), "--compute", "1e20")[0] == (0 if told else 3)


def settled_alike(tmp_path, preset, batch, *more, **kept):
    """The rate of a run with a batch of so many sequences, by fit, plan and auto, and the three's decisions."""
    fits = (*small_fits(), *more)
    path = write_laws(tmp_path, *fits, bowls=bowls(), **kept)
    config = compose(preset, [f"law.source={path}", f"batch.sequences={batch}", "law.far=true"])
    known = {name: each for name, each in columns_of(config).items() if name != "lr"}
    target = {"N": known["non_embedding"], "D": known["tokens"], "batch_tokens": batch * 64.0}
    laws = open_laws(path)
    found = planning.sizes(laws, Target(params=target["N"], tokens=target["D"]))
    planned = decisions.settle(found, laws.fits, laws.bowls, known, far=True)
    fitted = decisions.decide(target, fits, bowls(), far=True)
    return fitted, planned, config.law_record["values"]["optim.lr"]


@pytest.mark.parametrize("batch", [8, 64, 1024])
@pytest.mark.parametrize("limit", [None, 1e-4])
def test_fit_plan_and_auto_have_the_same_rate(tmp_path, preset, batch, limit):
    more = []
    if limit is not None:
        values = {"c": limit, "a": 0.0, "b": 0.0, "g": 0.0}
        more = [fit("stable_lr", values, spread=0.0, details={"sharpness": 10.0})]
    fitted, planned, record = settled_alike(tmp_path, preset, batch, *more)
    rates = [fitted.proposal["lr"], planned.proposal["lr"]]
    for each in rates:
        assert (each.value, each.low, each.high) == pytest.approx((record["exact"], *record["interval"]), rel=1e-9)
    for each in (fitted, planned):
        assert ("stability" in {verdict.code for verdict in each.verdicts}) == (limit is not None)
    if limit is not None:
        assert record["exact"] == pytest.approx(limit) and any("is held at" in each for each in record["warnings"])


def test_the_loss_and_the_regret_have_what_a_given_batch_costs(tmp_path, preset):
    near, _, _ = settled_alike(tmp_path, preset, 40)
    fitted, planned, _ = settled_alike(tmp_path, preset, 1024)
    best = optima.decide({"N": fitted.target["N"], "D": fitted.target["D"]}, small_fits()[1:], bowls(), far=True)
    off = math.log(1024 * 64 / best.proposal["batch_tokens"].value)
    excess = (0.02 - 0.004**2 / 0.009) * off**2 / 2
    for each in (fitted, planned):
        assert each.excess == pytest.approx(excess) and each.regret > 0.9 * excess
        assert "batch" in {verdict.code for verdict in each.verdicts}
        known = {"non_embedding": each.proposal["N"].value, "tokens": each.proposal["D"].value}
        assert each.proposal["loss"].value == pytest.approx(value_at(small_fits()[0], known).value * (1 + excess))
    assert near.excess < 1e-3 and "batch" not in {verdict.code for verdict in near.verdicts}


def test_the_next_runs_of_a_target_too_far_are_refused_unless_asked_for(tmp_path, capsys):
    laws = write_laws(tmp_path, *small_fits(largest=1e12), table=grid())
    arguments = ("--laws", laws, "--params=400K", "--tokens=8M", "--next=2", "--budget=2e13")
    code, _, err = run(capsys, *arguments)
    assert code == 3 and "19.2 times the most" in err and "--far" in err
    code, said, _ = run(capsys, *arguments, "--far")
    assert code == 0 and "19.2 times the most" in said
