"""The whole trainer on gloo: what a resume, another mesh, a branch and a change of data do to a trajectory."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.assembly import open_trainer
from runtime.checkpoint.unsharded import open_unsharded
from runtime.model.counts import flops_per_token
from runtime.observe.jsonl import read_rows
from runtime.startup import BadInput
from tests.corpus import tiny_run, write_corpus
from tests.workers import run_workers

BATCH = 8 * 32
TOLERANCE = 2e-5
"""Relative; what regrouped float32 sums may differ by over a dozen steps (tests/distributed/test_parity.py)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    write_corpus(folder / "data" / "train")
    write_corpus(folder / "data" / "other", seed=2)
    write_corpus(folder / "data" / "heldout", documents=20, seed=1)
    return folder


def launch(rank: int, folder: Path, sections: dict[str, dict[str, Any]]) -> str:
    """One launch of a tiny run on this process group; its outcome."""
    with open_trainer(tiny_run(folder, **sections), "") as trainer:
        return str(trainer.run())


def train(folder: Path, name: str, processes: int = 1, **sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Launch a run and return its metrics rows."""
    sections["run"] = {"name": name, **sections.get("run", {})}
    outcomes = run_workers(launch, processes, folder, sections)
    assert outcomes == ["finished"] * processes
    return read_rows(folder / "runs" / name / "metrics.jsonl")


def column(rows: list[dict[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows]


@pytest.fixture(scope="module")
def whole(folder) -> list[dict[str, Any]]:
    return train(folder, "whole")


def test_a_run_learns_and_keeps_its_clock(whole, folder):
    assert column(whole, "tokens") == [BATCH * step for step in range(1, 13)]
    assert whole[-1]["loss"] < 0.7 * whole[0]["loss"]
    flops = json.loads((folder / "runs" / "whole" / "run.json").read_text())["segments"][0]["flops_per_token"]
    assert whole[-1]["flops"] == flops * whole[-1]["tokens"]
    held_out = read_rows(folder / "runs" / "whole" / "evaluations.jsonl")
    assert column(held_out, "tokens") == [6 * BATCH, 12 * BATCH]
    assert held_out[1]["loss"] < held_out[0]["loss"]


EXACT = ("loss", "grad_norm", "lr", "tokens", "sequences", "flops")
NOISE = ("noise_scale", "noise_scale_low", "noise_scale_high")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder, processes):
    options = {"optim": {"ema_half_life": "1K"}, "guard": {"sigma": 3.0, "window": 4}}
    options["batch"] = {"micro_sequences": 3}
    options["model"] = {"qk_norm": True, "experts": {"count": 4}}
    name = f"in-parts-{processes}"
    uninterrupted = train(folder, f"in-one-{processes}", processes, **options)
    for until in (3, 7, 12):
        resumed = train(folder, name, processes, run={"until": until * BATCH}, **options)
    assert [column(resumed, key) for key in EXACT] == [column(uninterrupted, key) for key in EXACT]
    noise = [[row.get(key) for row in uninterrupted] for key in NOISE]
    assert noise == [[row.get(key) for row in resumed] for key in NOISE] and all(any(each) for each in noise[:2])
    ours, _ = open_unsharded(folder / "runs" / name)
    theirs, _ = open_unsharded(folder / "runs" / f"in-one-{processes}")
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    for section in ("model", "ema"):
        bias = ours[f"{section}.blocks.0.feed_forward.router.bias"]
        assert bias.any() and bias.abs().max() < 0.02 and "optimizer.blocks.0.feed_forward.router.bias.step" not in ours


def test_a_run_without_an_end_goes_on_where_it_was_stopped(folder):
    """Until other tokens each time, which moves no schedule."""
    schedule = {"kind": "power", "horizon": None, "warmup": BATCH, "decay": 0, "power": {"a": 0.04}}
    options = {"schedule": schedule, "evaluation": {"every": 4 * BATCH}, "checkpoint": {"every": 0}}
    whole = train(folder, "endless", run={"until": 9 * BATCH}, **options)
    for until in (4, 9):
        resumed = train(folder, "endless-in-parts", run={"until": until * BATCH}, **options)
    assert [column(resumed, key) for key in EXACT] == [column(whole, key) for key in EXACT]
    assert column(whole, "lr")[4] / column(whole, "lr")[8] == pytest.approx(2**0.51)
    assert "horizon_tokens" not in json.loads((folder / "runs" / "endless" / "run.json").read_text())["schedule"]


GROWING = {"kind": "steps", "steps": [{"at": 500, "sequences": 12}, {"at": 1_800, "sequences": 24}]}
SIZES = [8] * 2 + [12] * 4 + [24] * 2


def test_a_batch_that_grows_takes_the_same_samples_on_every_mesh(folder):
    """Whatever the mesh, the micro-batches and the resumes, one of them at the boundary of a change."""
    batch = GROWING | {"coupling": {"lr": "sqrt", "beta2": "half_life", "weight_decay": "timescale", "blend": 600}}
    flat = {"schedule": {"kind": "constant"}}
    rows = train(folder, "grows", batch=batch, **flat)
    for until, processes, micro, parallel in (
        (512, 4, 1, {"tensor": 2}),
        (2_000, 2, 3, {}),
        (None, 2, 2, {"tensor": 2}),
    ):
        batch["micro_sequences"] = micro
        moved = train(folder, "grows-moved", processes, batch=batch, run={"until": until}, parallel=parallel, **flat)
    assert column(rows, "batch_tokens") == [32 * size for size in SIZES]
    for key in ("tokens", "sequences", "lr", "weight_decay", "batch_tokens"):
        assert column(moved, key) == column(rows, key), key
    assert column(moved, "loss") == pytest.approx(column(rows, "loss"), rel=TOLERANCE)
    assert rows[-1]["lr"] == pytest.approx(1e-2 * 3**0.5) and rows[-1]["weight_decay"] == pytest.approx(0.1 * 3**0.5)
    told = [
        row for row in read_rows(folder / "runs" / "grows-moved" / "events.jsonl") if row["event"] == "batch_change"
    ]
    assert [(row["tokens"], row["before"], row["sequences"]) for row in told] == [(512, 8, 12), (2_048, 12, 24)]


PLANNED = {
    "ramp": ({"ramp": {"to": 24, "increment": 8, "tokens": 1_600}}, "constant", [8] * 4 + [16] * 2 + [24] * 2),
    "seesaw": ({"seesaw": {"largest": 32}}, "cosine", [8] * 7 + [16] + [32]),
}


@pytest.mark.parametrize("kind", PLANNED)
def test_a_planned_batch_is_resumed_where_it_changes_bit_for_bit(folder, kind):
    own, shape, sizes = PLANNED[kind]
    coupling = {"beta2": "half_life", "weight_decay": "timescale"}
    options = {"batch": {"kind": kind, **own, "coupling": coupling}, "schedule": {"kind": shape}}
    rows = train(folder, kind, **options)
    assert column(rows, "batch_tokens") == [32 * size for size in sizes]
    for until in (sizes.count(8) * BATCH, None):
        resumed = train(folder, f"{kind}-in-parts", run={"until": until}, **options)
    keys = (*EXACT, "weight_decay", "batch_tokens")
    assert [column(resumed, key) for key in keys] == [column(rows, key) for key in keys]


def test_drawn_loops_are_resumed_and_paid_for(folder):
    tying = {"plan": "cycle", "loops": 2, "injection": "linear", "sampling": "poisson", "backprop_loops": 1}
    model = {"tying": tying}
    rows = train(folder, "looped", 2, model=model)
    for until in (5, 12):
        resumed = train(folder, "looped-in-parts", 2, run={"until": until * BATCH}, model=model)
    assert [column(resumed, key) for key in (*EXACT, "loops")] == [column(rows, key) for key in (*EXACT, "loops")]
    assert len(set(column(rows, "loops"))) > 1
    shape = tiny_run(folder, model=model).model
    spent = [BATCH * flops_per_token(shape, 32, loops) for loops in column(rows, "loops")]
    assert column(rows, "flops") == list(itertools.accumulate(spent))


MESHES = [
    (2, {}),
    (2, {"parallel": {"tensor": 2}}),
    (4, {"parallel": {"tensor": 2}}),
    (4, {"parallel": {"data_replicate": 2}}),
    (1, {"batch": {"micro_sequences": 3}}),
    (2, {"batch": {"micro_sequences": 1}, "parallel": {"recompute": "full"}}),
]


@pytest.mark.parametrize(("processes", "sections"), MESHES)
def test_a_run_resumed_on_another_mesh_goes_the_same_way(folder, whole, processes, sections):
    name = f"moved-{processes}-{len(str(sections))}-{'-'.join(sections)}"
    train(folder, name, run={"until": 4 * BATCH})
    rows = train(folder, name, processes, **sections)
    for key in ("lr", "tokens", "sequences"):
        assert column(rows, key) == column(whole, key)
    assert column(rows, "loss") == pytest.approx(column(whole, "loss"), rel=TOLERANCE)


def test_what_belongs_to_depths_and_streams_moves_between_meshes(folder):
    """Relaxations, norms and prefixes with their moments, under multipliers that no tensor carries."""
    model = {
        "tying": {"plan": "cycle", "loops": 2, "own_norms": True, "relaxation": "lora", "rank": 3},
        "streams": {"count": 2, "prefix_tokens": 3},
        "parametrization": {
            "kind": "mup",
            "base_hidden_size": 16,
            "base_intermediate_size": 32,
            "base_num_heads": 2,
            "base_head_dim": 8,
        },
    }
    whole = train(folder, "unusual", model=model)
    for until, processes, parallel in ((6, 4, {"tensor": 2}), (12, 2, {})):
        run = {"until": until * BATCH}
        moved = train(folder, "unusual-moved", processes, run=run, model=model, parallel=parallel)
    for key in ("lr", "tokens", "sequences", "flops"):
        assert column(moved, key) == column(whole, key)
    for key in ("loss", "grad_norm"):
        assert column(moved, key) == pytest.approx(column(whole, key), rel=TOLERANCE)
    weights, _ = open_unsharded(folder / "runs" / "unusual-moved")
    for name in ("relaxations.q_proj.relaxation_out", "attention_norm.weight", "prefix.prefix_keys"):
        state = f"optimizer.depths.1.{name}"
        assert weights[f"{state}.exp_avg"].any() and weights[f"{state}.step"] == 12


def test_a_branch_carries_all_and_a_new_run_only_the_weights(folder, whole):
    parent = str(folder / "runs" / "whole")
    late = {"schedule": {"horizon": 15 * BATCH, "kind": "constant"}}
    late["observe"] = {"health_every": BATCH}
    branch = train(folder, "branch", start={"from": parent}, optim={"ema_half_life": "1K"}, guard={"window": 5}, **late)
    health = read_rows(folder / "runs" / "branch" / "health.jsonl")
    assert len(health) == 3 and not any("distance" in row for row in health)
    assert column(branch, "step") == [13, 14, 15]
    assert branch[0]["flops"] > whole[-1]["flops"]
    fresh = train(
        folder, "fresh", start={"from": parent, "carry": "weights"}, schedule={"horizon": 2 * BATCH, "warmup": 0}
    )
    assert column(fresh, "step") == [1, 2]
    assert fresh[0]["loss"] < 1.2 * whole[-1]["loss"] < whole[0]["loss"]
    identity = json.loads((folder / "runs" / "branch" / "run.json").read_text())
    assert identity["parent"]["tokens"] == 12 * BATCH


def test_a_branch_that_would_begin_where_it_ends_is_refused(folder, whole):
    with pytest.raises(BadInput, match="set a later schedule"):
        train(folder, "late", start={"from": str(folder / "runs" / "whole")})


def test_other_data_on_resume_is_refused_or_an_event(folder):
    train(folder, "switch", run={"until": 4 * BATCH})
    other = {"sources": [{"path": str(folder / "data" / "other")}]}
    with pytest.raises(BadInput, match=r"data\.on_change"):
        train(folder, "switch", data=other)
    rows = train(folder, "switch", data=other | {"on_change": "switch"})
    assert len(rows) == 12
    events = [row for row in read_rows(folder / "runs" / "switch" / "events.jsonl") if row["event"] == "mixture_change"]
    assert [event["mixture"]["from_sample"] for event in events] == [4 * 8]


FROZEN = [
    ({"schedule": {"horizon": 20 * BATCH}}, "schedule.horizon"),
    ({"optim": {"lr": 2e-2}}, "optim.lr"),
    ({"model": {"qk_norm": True}}, "model.qk_norm"),
    ({"batch": {"sequences": 16}}, "batch.sequences"),
    ({"run": {"seed": 1}}, "run.seed"),
    ({"data": {"seq_len": 16}}, "data.seq_len"),
]


@pytest.mark.parametrize(("sections", "key"), FROZEN)
def test_what_decides_the_trajectory_may_not_change_on_resume(folder, whole, sections, key):
    before = (folder / "runs" / "whole" / "config.toml").stat().st_mtime_ns
    with pytest.raises(BadInput, match=key):
        train(folder, "whole", **sections)
    assert (folder / "runs" / "whole" / "config.toml").stat().st_mtime_ns == before


def test_health_and_the_average_are_measured_on_their_cadence(folder):
    train(
        folder, "healthy", 2, observe={"health_every": 4 * BATCH}, optim={"ema_half_life": "1K"}, parallel={"tensor": 2}
    )
    health = read_rows(folder / "runs" / "healthy" / "health.jsonl")
    assert column(health, "tokens") == [4 * BATCH, 8 * BATCH, 12 * BATCH]
    assert all(len(row["depth_rms"]) == 2 and min(row["depth_rms"]) > 0 for row in health)
    assert all(1e-6 < ratio < 1 for row in health for ratio in row["update_ratio"].values())
    distances = [row["distance"]["total"] for row in health]
    assert 0.1 < distances[0] < distances[1] < distances[2]
    squares = [sum(x * x for role, x in row["distance"].items() if role != "total") for row in health]
    assert distances == pytest.approx([math.sqrt(each) for each in squares])
    sets = column(read_rows(folder / "runs" / "healthy" / "evaluations.jsonl"), "set")
    assert sets == ["heldout", "heldout-ema"] * 2


def launch_twice(rank: int, folder: Path) -> str:
    """A second launch of a run that is under way, in the same process group."""
    config = tiny_run(folder, run={"name": "busy"})
    with open_trainer(config, ""):
        try:
            with open_trainer(config, ""):
                return "admitted"
        except BadInput as error:
            return str(error)


def test_a_run_has_one_launch_at_a_time(folder):
    assert all("another launch is running it" in answer for answer in run_workers(launch_twice, 2, folder))


def poisoned_launch(
    rank: int, folder: Path, sections: dict[str, dict[str, Any]], bad: list[int], fail: list[int]
) -> str:
    """A launch whose loss is NaN for batches that begin at the `bad` samples, and whose saves with the numbers in
    `fail` fail on the way to disk."""
    with open_trainer(tiny_run(folder, **sections), "") as trainer:
        judge, write, saves = trainer.guard.judge, trainer.persistence.store._write, []

        def poisoned(loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
            return judge(loss * math.nan if trainer.state.next_position(8) in bad else loss, grad_norm)

        def failing(*arguments: Any) -> int:
            saves.append(arguments[0])
            if len(saves) in fail:
                raise OSError("no space left")
            return write(*arguments)

        trainer.guard.judge, trainer.persistence.store._write = poisoned, failing
        return str(trainer.run())


SKIPPING = {"observe": {"log_every": 10}, "checkpoint": {"every": 5 * BATCH}}


def test_skipped_steps_between_two_rows_survive_a_restart(folder):
    for name, stops in {"skips-in-one": (12,), "skips-in-parts": (6, 12)}.items():
        for until in stops:
            sections = {"run": {"name": name, "until": until * BATCH}, **SKIPPING}
            run_workers(poisoned_launch, 1, folder, sections, [2 * 8, 3 * 8], [])
        events = read_rows(folder / "runs" / name / "events.jsonl")
        assert [row["step"] for row in events if row["event"] == "skipped_step"] == [3, 4]
        assert read_rows(folder / "runs" / name / "metrics.jsonl")[-1]["skipped"] == 2


def test_skips_in_a_row_are_counted_over_restarts(folder):
    outcomes = []
    for until in (5, 12):
        sections = {"run": {"name": "relapse", "until": until * BATCH}, "guard": {"max_consecutive": 6}}
        outcomes += run_workers(poisoned_launch, 1, folder, sections, [8 * step for step in range(2, 12)], [])
    assert outcomes == ["finished", "diverged"]
    assert read_rows(folder / "runs" / "relapse" / "metrics.jsonl")[-1]["step"] == 8


def test_after_a_rollback_what_was_evaluated_past_it_is_evaluated_again(folder):
    sections = {
        "run": {"name": "rolled"},
        "guard": {"max_consecutive": 2, "on_spike": "rollback"},
        "evaluation": {"every": BATCH},
    }
    run_workers(poisoned_launch, 1, folder, sections, [6 * 8, 7 * 8], [])
    path = folder / "runs" / "rolled" / "evaluations.jsonl"
    evaluated = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["tokens"] // BATCH for row in evaluated] == [1, 2, 3, 4, 5, 6, 7, *range(5, 13)]
    losses = {row["tokens"] // BATCH: row["loss"] for row in evaluated}
    assert losses[7] != losses[6]


@pytest.mark.parametrize(("failing", "outcome"), [([3], "finished"), ([3, 4], "unsaved")])
def test_a_last_save_that_fails_is_tried_once_more_and_not_called_a_success(folder, failing, outcome):
    name = f"full-disk-{outcome}"
    sections = {"run": {"name": name, "until": 6 * BATCH}, "checkpoint": {"every": 2 * BATCH}}
    assert run_workers(poisoned_launch, 1, folder, sections, [], failing) == [outcome]
    checkpoints = {path.name for path in (folder / "runs" / name / "checkpoints").iterdir()}
    assert (f"tokens-{6 * BATCH}-segment-0" in checkpoints) == (outcome == "finished")


def test_a_branch_has_a_checkpoint_before_its_first_step_and_its_parents_order(folder, whole):
    start, schedule = {"from": str(folder / "runs" / "whole")}, {"horizon": 14 * BATCH, "kind": "constant"}
    with pytest.raises(BadInput, match=r"data\.seq_len = 16"):
        train(folder, "longer", start=start, schedule=schedule, data={"seq_len": 16})
    train(folder, "offshoot", start=start, schedule=schedule)
    saved = read_rows(folder / "runs" / "offshoot" / "events.jsonl")
    assert next(row["checkpoint"] for row in saved if row.get("outcome") == "saved") == f"tokens-{12 * BATCH}-segment-0"
    assert len(json.loads((folder / "runs" / "offshoot" / "run.json").read_text())["parent"]["hash"]) == 32


def test_damaged_logs_do_not_keep_a_run_from_going_on(folder):
    train(folder, "scarred", run={"until": 4 * BATCH})
    (folder / "runs" / "scarred" / "run.json").write_text("{")
    (folder / "runs" / "scarred" / "evaluations.jsonl").write_bytes(b"\0\0\n{}\n")
    assert len(train(folder, "scarred")) == 12
    assert json.loads((folder / "runs" / "scarred" / "run.json").read_text())["name"] == "scarred"


def test_runs_share_a_checkpoint_folder_without_taking_each_others(folder):
    checkpoint = {"dir": str(folder / "shared")}
    first, second = (train(folder, name, checkpoint=checkpoint, run={"until": 4 * BATCH}) for name in ("one", "two"))
    assert column(first, "step") == column(second, "step") == [1, 2, 3, 4]
    assert sorted(path.name for path in (folder / "shared").iterdir()) == ["one", "two"]


def test_a_run_never_begins_again_over_its_history(folder):
    train(folder, "history", run={"until": 4 * BATCH})
    with pytest.raises(BadInput, match="has saved checkpoints, but there are none"):
        train(folder, "history", checkpoint={"dir": str(folder / "elsewhere")})
    assert not (folder / "elsewhere").exists()


def test_the_same_mixture_written_otherwise_is_the_same(folder):
    paths = [str(folder / "data" / name) for name in ("train", "other")]
    sources = [[{"path": paths[0], "weight": 3}, {"path": paths[1], "weight": 1}], [{"path": paths[1], "weight": 0.25}]]
    sources[1].append({"path": paths[0], "weight": 0.75})
    train(folder, "mixed", run={"until": 4 * BATCH}, data={"sources": sources[0]})
    assert len(train(folder, "mixed", data={"sources": sources[1]})) == 12
