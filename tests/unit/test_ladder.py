"""A ladder file's runs: which there are, what they share, what is refused; and which runs are hopeless."""

import tomllib

import pytest
import tomli_w

from launch.config import dump
from launch.ladder import laid_over, read_ladder
from launch.ladder_runs import essence, plan
from launch.sweep_slurm import columns, parse_options
from launch.sweep_stopping import ROWS, Rules, judge
from runtime.model.counts import flops_per_token
from tests.corpus import tiny_run

BATCH = 8 * 32
SMALL = {"name": "small", "model": {"hidden_size": 16, "intermediate_size": 32}}
LARGE = {"name": "large", "model": {"num_layers": 4}}
LADDER = {
    "name": "steps",
    "base": "base.toml",
    "tokens": [8 * BATCH, 16 * BATCH, 32 * BATCH],
    "lr": [1e-3, 2e-3],
    "batch": [8, 16],
    "sizes": [SMALL, LARGE],
}


def write(folder, over=None, /, **changes):
    """A ladder file of `LADDER` with changes, where None leaves a key out, and what lies over its base."""
    raw = tomllib.loads(dump(tiny_run(folder, run={"name": "base"})))
    schedule = {"kind": "wsd", "horizon": 1, "warmup": 2 * BATCH, "decay": "25%"}
    (folder / "base.toml").write_text(tomli_w.dumps(laid_over(raw | {"schedule": schedule}, over or {})))
    ladder = {key: value for key, value in (LADDER | changes).items() if value is not None}
    path = folder / "ladder.toml"
    path.write_text(tomli_w.dumps(ladder))
    return path


def runs_of(folder, over=None, /, **changes):
    path = write(folder, over, **changes)
    return plan(*read_ladder(path), path)


def test_runs_of_fewer_tokens_are_branches_of_the_one_of_most(tmp_path):
    runs = runs_of(tmp_path)
    assert len(runs) == 2 * 2 * 2 * 3 and len({run.name for run in runs}) == 24
    by_name = {run.name: run for run in runs}
    for run in runs:
        schedule, tokens = run.config.schedule, run.end
        decay = schedule.branch.decay or schedule.decay
        assert tokens % (16 * 32) == 0 and decay == round(tokens / 4 / (run.sequences * 32)) * run.sequences * 32
        if run.parent is None:
            assert (
                tokens == 32 * BATCH
                and run.begin == 0
                and run.flops == run.steps * run.sequences * 32 * (flops_per_token(run.config.model, 32))
            )
            continue
        parent = by_name[run.parent]
        assert runs.index(parent) < runs.index(run)
        # It leaves where its own tail begins, at a checkpoint that the parent keeps, and ends at its tokens.
        assert run.begin == tokens - decay and run.begin in parent.config.checkpoint.at
        assert parent.config.schedule.warmup < run.begin <= parent.end - parent.config.schedule.decay
        assert run.config.checkpoint.at == [] and run.steps * run.sequences * 32 == decay
        ours, theirs = essence(run.config), essence(parent.config)
        assert {key for key in ours if ours[key] != theirs[key]} == {"tokens", "schedule.decay"}
    assert sum(run.flops for run in runs) < sum(run.flops * run.end / (run.end - run.begin) for run in runs) * 0.75
    assert [len(column) for column in columns(runs).values()] == [3] * 8


def test_a_branch_is_the_same_run_as_a_separate_one(tmp_path):
    branches = {run.name: essence(run.config) for run in runs_of(tmp_path)}
    separate = runs_of(tmp_path, schedule="separate")
    assert all(run.parent is None and run.begin == 0 for run in separate)
    different = {
        name
        for name, run in ((run.name, run) for run in separate)
        if essence(run.config) != branches[name] and run.sequences * 32 * 4 <= run.end // 4
    }
    assert {run.name for run in separate} == set(branches) and not different


def test_grids_are_joined_and_a_point_that_two_ask_for_is_one_run(tmp_path):
    grids = [
        {"sizes": ["small"]},
        {"lr": [2e-3, 8e-3], "batch": [8], "seeds": [0, 1], "tokens": [32 * BATCH]},
    ]
    runs = runs_of(tmp_path, grids=grids)
    # 12 of the first; of the second 2 sizes x 2 rates x 2 seeds, of which one is there already.
    assert len(runs) == 12 + 8 - 1
    assert {run.config.run.seed for run in runs if run.size == "large"} == {0, 1}
    assert sum(run.parent is None for run in runs) == 4 + 8 - 1


def test_rates_and_batches_lie_around_a_value_or_a_law(tmp_path):
    law = {"coefficient": 2.0, "N": -0.5, "D": 0.25}
    runs = runs_of(
        tmp_path,
        lr={"factors": [0.5, 1, 2], "around": law},
        batch={"factors": [1, 2], "around": "base"},
        sizes=[SMALL],
    )
    count = runs[0].counts.non_embedding
    expected = 2 * count**-0.5 * (32 * BATCH) ** 0.25
    # Branches share the rate of their parent, so the law is asked for the most tokens.
    assert {run.config.optim.lr for run in runs} == {float(f"{factor * expected:.4g}") for factor in (0.5, 1, 2)}
    assert {run.sequences for run in runs} == {8, 16}
    law = {"coefficient": 9.0 * 32, "count": "total"}
    assert {run.sequences for run in runs_of(tmp_path, batch={"factors": [1, 2], "around": law})} == {8, 16}
    apart = runs_of(tmp_path, lr={"factors": [1], "around": {"coefficient": 1, "D": -0.5}}, schedule="separate")
    assert len({run.config.optim.lr for run in apart}) == 3
    fixed = runs_of(tmp_path, lr={"factors": [0.5, 1], "around": 4e-3})
    assert {run.config.optim.lr for run in fixed} == {2e-3, 4e-3}


@pytest.mark.parametrize(
    ("kind", "wanted"), [("total", 30_000), ("non_embedding", 80_000), ("non_embedding", 1_000_000)]
)
def test_a_size_may_be_parameters_of_the_base_s_proportions(tmp_path, kind, wanted):
    (run,) = runs_of(tmp_path, sizes=[{"name": "x", kind: wanted}], tokens=[8 * BATCH], lr=[1e-3], batch=[8])
    model = run.config.model
    assert getattr(run.counts, kind) == pytest.approx(wanted, rel=0.25)
    assert model.hidden_size == 8 * model.num_heads and model.num_heads == 2 * model.num_kv_heads
    assert abs(model.num_layers - model.hidden_size / 16) <= 1.5


def test_tokens_may_be_multiples_of_the_parameters(tmp_path):
    runs = runs_of(tmp_path, tokens=["2x", "4x"], per="total")
    for run in runs:
        assert run.end == pytest.approx(int(run.name.split("-")[1].removesuffix("x")) * run.counts.total, rel=0.05)


REFUSED = {
    "an unknown key": ({"learning_rates": [1]}, {}, "unknown key learning_rates"),
    "an unknown key of a grid": ({"grids": [{"size": ["small"]}]}, {}, "unknown key grids.0.size"),
    "no tokens": ({"tokens": None}, {}, "tokens is required"),
    "an amount": ({"tokens": ["20y"]}, {}, "tokens.0: '20y' is not a token count"),
    "no amount": ({"tokens": [0]}, {}, "a run of 0 tokens is none"),
    "a rate": ({"lr": [0.0]}, {}, "lr.0: input should be greater than 0 (got 0.0)"),
    "a centre": ({"lr": {"factors": [1], "around": "best"}}, {}, "lr.around: input should be 'base' (got 'best')"),
    "a law": ({"lr": {"factors": [1], "around": {"N": 1}}}, {}, "lr.around.coefficient is required"),
    "a size of a grid": ({"grids": [{"sizes": ["tiny"]}]}, {}, "grids.0.sizes: 'tiny' is none of small, large"),
    "two sizes of a name": ({"sizes": [SMALL, SMALL]}, {}, "sizes need distinct names, got small, small"),
    "a size without one": ({"sizes": [{"name": "x"}]}, {}, "sizes.0: size x: give one of model = {...}"),
    "a size that cannot be": (
        {"sizes": [{"name": "x", "model": {"num_heads": 3}}]}, {}, "size x: model: num_heads 3 is not a multiple",
    ),
    "a size too small": ({"sizes": [{"name": "x", "total": 100}]}, {}, "no model of the base's proportions has 100"),
    "batches that do not nest": ({"batch": [8, 11]}, {}, "or batches with a smaller common multiple"),
    "a warm-up past a branch": ({}, {"schedule": {"warmup": 8 * BATCH}}, "its decay begins at 1,536 tokens, and the"),
    "a cosine": ({}, {"schedule": {"kind": "cosine"}}, '"cosine" has no stable part that runs could share'),
    "a decay of nothing": ({}, {"schedule": {"decay": 0}}, "a decay of 0 of 8,192 tokens comes to 0 batches of 256"),
    "a growth": ({}, {"growth": [{"at": 1, "operator": "depth.stack"}]}, "growth changes the size of a run"),
    "a plan without a fit": ({"then": {"plan": []}}, {}, "plan reads the laws that fit writes: give fit too"),
    "a folder of its own": ({"then": {"fit": ["--out", "x"]}}, {}, "then: fit: --out is given by the sweep"),
    "a base that is not there": ({"base": "none.toml"}, {}, "cannot read the base"),
    "a key of the base": ({}, {"optim": {"learning": 1}}, "unknown key optim.learning"),
    "a rate of a base without one": ({"lr": {"factors": [1]}}, {"optim": {"lr": "auto"}}, "no number that factors"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "base", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_by_name(tmp_path, changes, base, message):
    with pytest.raises(ValueError) as refusal:
        runs_of(tmp_path, base, **changes)
    assert message in str(refusal.value)


def test_processes_that_cannot_share_a_batch_are_refused_before_anything_runs(tmp_path):
    path = write(tmp_path)
    with pytest.raises(ValueError, match=r"batch.sequences = 8 is not a multiple of the 3 data-parallel ranks"):
        plan(*read_ladder(path), path, processes=3)


def rows(*losses: float, step: int = 100):
    return [{"tokens": step * (k + 1), "loss": loss} for k, loss in enumerate(losses)]


LEARNS, ABOVE = [7.0 - 0.1 * k for k in range(20)], [8.2] * 20
JUDGED = {
    "one that learns": (LEARNS, Rules(200, 500, 8.0, 7.5), None),
    "above its beginning": (ABOVE, Rules(200, 500, 8.0, 7.5), "initial"),
    "above its beginning in its warm-up": (ABOVE, Rules(1500, 500, 8.0, 7.5), None),
    "above a unigram model": ([7.8] * 20, Rules(200, 500, 8.0, 7.5), "unigram"),
    "above a unigram model at its beginning": ([7.8] * 20, Rules(200, 1900, 8.0, 7.5), None),
    "above it but for a step": ([7.8] * 18 + [7.4, 7.8], Rules(200, 500, 8.0, 7.5), None),
    "with too few rows": (ABOVE[: ROWS - 1], Rules(0, 0, 8.0, 7.5), None),
    "without anything to compare with": (ABOVE, Rules(0, 0), None),
    "far above the others": ([6.2] * 20, Rules(200, 500, 8.0, 7.5, 0.5), "margin"),
    "not so far above them": ([5.6] * 20, Rules(200, 500, 8.0, 7.5, 0.5), None),
}


@pytest.mark.parametrize(("losses", "rules", "rule"), JUDGED.values(), ids=JUDGED)
def test_a_run_is_hopeless_by_rules_that_say_why(losses, rules, rule):
    others = [rows(*LEARNS), rows(*[5.8] * 30), rows(1.0)]
    found = judge(rows(*losses), rules, others)
    assert (found and found.evidence["rule"]) == rule
    if found is not None:
        reference = {"initial": 8.0, "unigram": 7.5, "margin": pytest.approx(5.45)}[rule]
        assert found.evidence["reference"] == reference and found.evidence["loss"] == losses[-1]
        assert f"at 2,000 tokens the lowest of the last 8 logged losses, {losses[-1]:.4f}, is above" in found.reason


def test_options_of_slurm_are_submitit_s():
    found = parse_options("partition=gpu,time=1-2:30:01,gpus_per_node=8,qos=low,cluster=local")
    assert found == {"slurm_partition": "gpu", "timeout_min": 1591, "gpus_per_node": 8, "slurm_qos": "low"} | {
        "cluster": "local"
    }
    assert parse_options("time=90") == {"timeout_min": 90}
    for text, message in {
        "partition": "not of the form key=value",
        "nodes=2": "a run of a sweep is on one machine",
        "time=2:00": "accepted are minutes",
        "time=soon": "accepted are minutes",
        "cluster=moon": "accepted are slurm, local, debug",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_options(text)
