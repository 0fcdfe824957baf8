"""Candidates tried for a few steps and ranked: the runs that try them, what is read of them, and what comes of it."""

import json
import math
from pathlib import Path

import pytest

from launch import grow
from launch.candidates import parse_candidate
from launch.config import compose, dump
from launch.growth_config import segments
from launch.probing import Probe, probe_config, ranking, read_probe, table
from runtime.clock import Clock, is_due
from runtime.resume import has_schedule
from runtime.state import TrainState
from runtime.timetable import build_timetable
from runtime.trainer import Outcome
from tests.corpus import tiny_run

BATCH = 8 * 32


def description_at(batches: int, **sections) -> dict:
    config = tiny_run(Path("absent"), **sections)
    train = TrainState(Clock(tokens=batches * BATCH, sequences=batches * 8, step=batches), flops=1000)
    return {
        "model": config.model.model_dump(mode="json"),
        "config": config.model_dump(mode="json", by_alias=True, exclude_none=True),
        "train": train.to_json(),
    }


def config_of(text: str, batches: int = 3, steps: int = 4, **sections):
    return probe_config(description_at(batches, **sections), "runs/x/tokens-768", parse_candidate(text), "there", steps)


def test_a_probe_is_the_checkpoints_run_grown_before_its_next_step(tmp_path):
    stored = {
        "observe": {"log_every": 7, "tensorboard": True},
        "run": {"name": "x", "max_minutes": 5, "until": 4 * BATCH},
    }
    config = config_of("depth.stack factor=2 moments=keep schedule.kind=rewarm", **stored)
    assert (config.start.from_, config.start.carry) == ("runs/x/tokens-768", "all")
    assert config.run.until == 7 * BATCH and config.run.max_minutes is None and config.run.dir == "there"
    assert config.evaluation.every == 0 and config.observe.log_every == 1
    [growth] = config.growth
    assert growth.at == 3 * BATCH and growth.moments == "keep" and growth.schedule.tokens == round(0.02 * 12 * BATCH)
    before, after = segments(config)
    assert before.model.num_layers == 2 and after.model.num_layers == 4
    unchanged = tiny_run(Path("absent"))
    for section in ("data", "batch", "optim", "schedule", "guard"):
        assert getattr(before, section) == getattr(after, section) == getattr(unchanged, section)
    (tmp_path / "config.toml").write_text(dump(config))
    assert compose(tmp_path / "config.toml") == config


def test_candidates_with_another_batch_are_tried_on_the_same_samples():
    config = config_of("depth.stack batch.sequences=4 batch.micro_sequences=2")
    assert config.run.until == 7 * BATCH and segments(config)[1].batch.sequences == 4


@pytest.mark.parametrize("horizon", [4 * BATCH, None], ids=["the parent's horizon", "no horizon"])
def test_a_branch_is_probed_up_to_its_own_end(horizon):
    """Which lies where its tail does, and shares are of it."""
    schedule = {"kind": "constant", "horizon": horizon, "decay": 0, "branch": {"at": 2 * BATCH, "decay": 8 * BATCH}}
    sections = {"schedule": schedule, "evaluation": {"every": BATCH}, "checkpoint": {"every": BATCH}}
    config = config_of("depth.stack schedule.kind=rewarm schedule.tokens=20%", steps=7, **sections)
    assert config.run.until == 10 * BATCH and config.growth[0].schedule.tokens == 2 * BATCH
    assert has_schedule(description_at(3, **sections)["config"], config), "so that it goes on in the tail"
    with pytest.raises(ValueError, match="end past the end of the checkpoint's run, 2,560"):
        config_of("depth.stack", steps=8, **sections)


@pytest.mark.parametrize(
    "kind", [{"kind": "noise_scale"}, {"kind": "branch_probe", "branch_probe": {"tokens": BATCH}}], ids=str
)
def test_no_controller_moves_the_batch_of_a_probe(kind):
    batch = {"sequences": 8, "micro_sequences": 2, "control": {"largest": 32, "every": 2 * BATCH}, **kind}
    description = description_at(3, batch=batch)
    description["train"]["events"] = [{"event": "batch_change", "tokens": 2 * BATCH, "sequences": 16}]
    config = probe_config(description, "runs/x/tokens-768", parse_candidate("depth.stack"), "there", 2)
    assert config.run.until == 3 * BATCH + 2 * 16 * 32, "at the batch that was decided before"
    assert build_timetable(config, description["train"]["events"]).at(3 * BATCH).sequences == 16
    assert not is_due(config.batch.control.every, 0, config.run.until)
    assert config.batch.control.largest == 32


@pytest.mark.parametrize(
    "text, steps, message",
    [
        ("depth.stack", 10, "--probe 10: so many steps of 256 tokens, from 768 on, end past the end of .* 3,072"),
        ("depth.stack layers=[9]", 2, r"candidate 'depth.stack layers=\[9\]': growth.0: operator depth.stack: layers"),
        ("depth.stack batch.sequences=0", 2, "batch.sequences"),
    ],
)
def test_what_cannot_be_tried_is_refused(text, steps, message):
    with pytest.raises(ValueError, match=message):
        config_of(text, steps=steps)


def write_logs(folder: Path, losses: list[float], held_out: dict[str, tuple[float, float]], preserves: bool) -> Path:
    """The logs of a probe from 768 tokens and 1000 FLOPs on, a batch before its growth included."""

    def row(step: int, segment: int, loss: float) -> dict:
        return {
            "step": 3 + step,
            "tokens": 768 + BATCH * step,
            "segment": segment,
            "loss": loss,
            "flops": 1000 + 50 * step,
        }

    def evaluation(tokens: int, segment: int, name: str, loss: float) -> dict:
        return {"tokens": tokens, "segment": segment, "set": name, "loss": loss}

    metrics = [row(0, 0, 9.0), *(row(step, 1, loss) for step, loss in enumerate(losses, 1))]
    end = 768 + BATCH * len(losses)
    evaluations = [evaluation(768, 0, name, 8.0) for name in held_out]
    for name, (first, last) in held_out.items():
        evaluations += [evaluation(768, 1, name, first), evaluation(end, 1, name, last)]
    events = [{"event": "run_start"}, {"event": "growth", "preserves": preserves}]
    for name, rows in (("metrics", metrics), ("evaluations", evaluations), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder


@pytest.mark.parametrize(
    "losses, held_out, outcome, expected",
    [
        ([5.0, 4.0, 3.0, 2.0, 1.0], {}, Outcome.FINISHED, (5.0, 1.0)),
        ([5.0, 4.0, 3.5, 3.0, 3.0, 2.0, 2.0, 2.0, 1.5, 1.0], {}, Outcome.FINISHED, (5.0, 1.25)),
        ([5.0, 4.0], {"a": (6.0, 3.0)}, Outcome.FINISHED, (6.0, 3.0)),
        ([5.0, 4.0], {"a": (6.0, 3.0), "b": (4.0, 1.0), "a-ema": (90.0, 90.0)}, Outcome.UNSAVED, (5.0, 2.0)),
        ([5.0, 4.0], {"a": (6.0, 3.0)}, Outcome.DIVERGED, (6.0, None)),
        ([5.0, math.nan], {}, Outcome.FINISHED, (5.0, None)),
        ([], {}, Outcome.REFUSED, (None, None)),
    ],
)
def test_what_is_read_of_a_probe(losses, held_out, outcome, expected, tmp_path):
    folder = write_logs(tmp_path, losses, held_out, preserves=True)
    found = read_probe(folder, "x", outcome, 768, 1000, steps=max(1, len(losses)))
    assert (found.first, found.last) == expected
    assert (found.tokens, found.flops) == (BATCH * len(losses), 50 * len(losses))
    assert found.preserves and found.outcome == outcome


def result(name: str, first: float | None, last: float | None, flops: int = 100, outcome: str = "finished") -> Probe:
    return Probe(name, outcome, preserves=name == "zero", first=first, last=last, tokens=BATCH, flops=flops)


def test_the_rank_is_by_the_loss_after_the_steps_and_not_by_the_one_at_the_growth():
    probes = [
        result("zero", 2.0, 1.9),
        result("lost", 1.0, None),
        result("stack", 4.0, 1.5),
        result("middle", 3.0, 1.7),
    ]
    assert [each.name for each in ranking(probes)] == ["stack", "middle", "zero", "lost"]


def test_the_table_shows_all_and_says_what_it_compares():
    ranked = [result("stack", 4.0, 1.5, 200), result("zero", 2.0, 1.9), result("lost", 3.0, None, 10, "diverged")]
    lines = table(ranked, 50, held_out=True).splitlines()
    assert " ".join(lines[0].split()) == "candidate keeps the logits loss at 0 after 50 FLOPs"
    assert [line.split() for line in lines[1:4]] == [
        ["stack", "no", "4.0000", "1.5000", "200"],
        ["zero", "yes", "2.0000", "1.9000", "100"],
        ["lost", "no", "3.0000", "diverged", "10"],
    ]
    assert lines[-2:] == [
        "by held-out loss, from the best",
        "compared at equal tokens: the candidates' FLOPs are not equal",
    ]
    assert "equal" not in table([result("a", 1, 1), result("b", 1, 1)], 5, held_out=False)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--probe", "0", "--candidate", "depth.stack"], "--probe 0 is not 1 or more"),
        (["--probe", "5"], "--probe takes its growths from --candidate"),
        (["--probe", "5", "--operator", "depth.stack"], "--probe takes its growths from --candidate"),
        (["--probe", "5", "--candidate", "depth.stack", "--moments", "keep"], "--moments: a candidate has its own"),
        (["--probe", "5", "--candidate", "depth.stack", "--seed", "1"], "--seed: probes draw by the seed"),
        (["--probe", "5", "--candidate", "depth.stack", "--dry-run"], "three commands"),
        (["--probe", "5", "--candidate", "depth.stack", "--advise"], "three commands"),
        (["--probe", "5", "--candidate", "depth.stack", "--horizon", "1B"], "--horizon belongs to --advise"),
        (["OUT", "--advise"], "--advise writes nothing; leave out OUT"),
        (["--advise", "--tensor", "0"], "--tensor 0 is not 1 or more"),
        (["--advise", "--workspace", "there"], "--workspace belongs to --probe"),
        (
            ["OUT", "--operator", "depth.stack", "--candidate", "depth.stack"],
            "--candidate belongs to --advise and --probe",
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(words, message, capsys):
    assert grow.main(["CHECKPOINT", *words]) == 2
    assert message in capsys.readouterr().err
