"""A growth from the command line is held to what an entry of the run's own file would be."""

from pathlib import Path

import pytest

from growth.plan import Step
from launch.growth_arguments import growth_entry
from launch.growth_config import GrowthConfig
from tests.corpus import tiny_run

BATCH = 8 * 32
TAILLESS = {"kind": "constant", "decay": 0, "warmup": BATCH}
CADENCES = {"evaluation": {"every": BATCH}, "checkpoint": {"every": BATCH}}
OPEN = {"schedule": {**TAILLESS, "horizon": None}, **CADENCES}
BRANCH = {"schedule": {**OPEN["schedule"], "branch": {"at": 10 * BATCH, "decay": 10 * BATCH}}, **CADENCES}
POWER = {"schedule": {"kind": "power"}}
SEESAW = {"batch": {"kind": "seesaw", "seesaw": {"largest": 32}}, "schedule": {"kind": "cosine"}}


def entry(schedule: str, sections: dict | None) -> GrowthConfig:
    run = None if sections is None else tiny_run(Path("absent"), **sections)
    return growth_entry([Step("depth.stack", {"factor": 2})], at=4 * BATCH, run=run, schedule=schedule)


@pytest.mark.parametrize(
    ("sections", "schedule", "key", "tokens"),
    [
        ({}, "rewarm,tokens=25%", "tokens", 3 * BATCH),
        ({}, "remap,to=50%", "to", 6 * BATCH),
        (BRANCH, "rewarm,tokens=25%", "tokens", 5 * BATCH),
        (BRANCH, "remap,to=1900", "to", 1900),
        (OPEN, "rewarm,tokens=512", "tokens", 512),
        (POWER, "rewarm,tokens=512", "tokens", 512),
        (None, "remap,to=512", "to", 512),
    ],
)
def test_a_change_of_the_schedule_is_of_the_checkpoints_run(sections, schedule, key, tokens):
    assert getattr(entry(schedule, sections).schedule, key) == tokens


@pytest.mark.parametrize(
    ("sections", "schedule", "message"),
    [
        (OPEN, "rewarm", "tokens = '2%' is a share of a horizon, but the checkpoint's run has none"),
        (OPEN, "remap,to=512", 'kind = "remap" goes on towards schedule.horizon, which is not given'),
        ({}, "remap,to=100%", "to = 3,072 is not before the end of the schedule, 3,072"),
        (BRANCH, "remap,to=5_120", "to = 5,120 is not before the end of the schedule, 5,120"),
        (POWER, "remap,to=512", "schedule.power.follows_batch would take another batch"),
        (SEESAW, "rewarm", 'kind = "rewarm" lifts the learning rate'),
        (SEESAW, "remap,to=512", 'kind = "remap" lifts the learning rate'),
        (None, "remap,to=50%", "to = '50%' is a share of a horizon"),
    ],
)
def test_what_the_run_cannot_take_is_refused(sections, schedule, message):
    with pytest.raises(ValueError, match=r"^--schedule: ") as refusal:
        entry(schedule, sections)
    assert message in str(refusal.value)
