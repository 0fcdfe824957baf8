"""The schedule that a configuration means, with and without a horizon."""

import pytest

from launch.config import compose, dump
from runtime.observe.dry_run import report
from schedulers import learning_rate
from schedulers.infinite import Infinite
from schedulers.learning_rate import Annealed, Constant, InverseSqrt
from schedulers.power import Power
from schedulers.stages import Periods, Sequence, Stage
from tests.corpus import tiny_run

PEAK, HORIZON, SEQUENCES, SEQ_LEN = 1e-2, 100_000, 8, 32
ENDLESS = {"horizon": None, "warmup": 100}


def config(folder, schedule, **sections):
    made = tiny_run(folder, evaluation={"every": 1_000}, checkpoint={"every": 1_000})
    raw = made.model_dump(by_alias=True) | {"schedule": schedule}
    return type(made).model_validate(raw | {name: raw[name] | keys for name, keys in sections.items()})


def built(folder, schedule):
    made = config(folder, schedule)
    return made.schedule.build(made.optim.lr, made.batch.sequences, made.data.seq_len)


POWER = {"a": 3.0, "b": -0.4, "follows_batch": False}
PARTS = [{"tokens": "50%", "warmup": "2%"}, {"kind": "rewarm", "warmup": "1%", "peak": 0.5, "final": 0.1}]
MEANT = {
    "wsd by default": ({}, learning_rate.wsd(PEAK, 2_000, HORIZON, 20_000)),
    "constant": ({"kind": "constant"}, Annealed(Constant(PEAK, 2_000), HORIZON, 0)),
    "cosine": ({"kind": "cosine", "final": 0.1}, learning_rate.cosine(PEAK, 2_000, HORIZON, 0.1)),
    "linear": ({"kind": "linear_to_zero"}, learning_rate.linear_to_zero(PEAK, 2_000, HORIZON)),
    "inverse sqrt": (
        {"kind": "inverse_sqrt", "inverse_sqrt": {"floor": 0.2}, "decay": "5%", "tail": "square"},
        Annealed(InverseSqrt(PEAK, 2_000, 0.2), HORIZON, 5_000, "square"),
    ),
    "WSD-S": (
        {"kind": "wsd_s", "periods": {"ends": ["25%", "50%", "100%"], "peaks": [1, 0.7, 0.5]}},
        Periods(PEAK, 2_000, (25_000, 50_000, 100_000), 0.1, "1-sqrt", 0.0, (1, 0.7, 0.5)),
    ),
    "power": (
        {"kind": "power", "power": POWER, "decay": 0},
        Annealed(Power(PEAK, 2_000, SEQUENCES, SEQ_LEN, 3.0, -0.4, False), HORIZON, 0),
    ),
    "infinite": (
        {"kind": "infinite", "infinite": {"plateau": 0.5}, "tail": "exponential", "final": 0.2},
        Annealed(Infinite(PEAK, 2_000, 15_000, 0.5), HORIZON, 20_000, "exponential", 0.2),
    ),
    "a sequence": (
        {"kind": "sequence", "parts": PARTS},
        Sequence(
            (
                Stage(Annealed(Constant(PEAK, 2_000), 50_000, 0), 50_000, 2_000),
                Stage(learning_rate.cosine(PEAK / 2, 1_000, 50_000, 0.1), 50_000, 1_000),
            )
        ),
    ),
}


@pytest.mark.parametrize(("schedule", "meant"), MEANT.values(), ids=MEANT)
def test_each_kind_means_its_schedule(schedule, meant, tmp_path):
    assert built(tmp_path, {"horizon": HORIZON} | schedule) == meant


OPEN = {
    "constant": ({"kind": "constant"}, Constant(PEAK, 100)),
    "wsd": ({}, Constant(PEAK, 100)),
    "inverse sqrt": ({"kind": "inverse_sqrt"}, InverseSqrt(PEAK, 100)),
    "power": ({"kind": "power"}, Power(PEAK, 100, SEQUENCES, SEQ_LEN)),
    "infinite": ({"kind": "infinite", "infinite": {"cooldown": 900}}, Infinite(PEAK, 100, 900, 0.55)),
    "a sequence": (
        {"kind": "sequence", "parts": [{"tokens": 500}, {"kind": "power", "jumps": True}]},
        Sequence(
            (Stage(Annealed(Constant(PEAK, 0), 500, 0), 500), Stage(Power(PEAK, 0, SEQUENCES, SEQ_LEN), jumps=True))
        ),
    ),
}


@pytest.mark.parametrize(("schedule", "meant"), OPEN.values(), ids=OPEN)
def test_open_ended_kinds_run_without_a_horizon_and_survive_their_file(schedule, meant, tmp_path):
    assert built(tmp_path, ENDLESS | schedule) == meant
    made = config(tmp_path, ENDLESS | schedule)
    assert made.end is None
    path = tmp_path / "config.toml"
    path.write_text(dump(made))
    assert compose(path).model_dump(exclude={"growth", "law"}) == made.model_dump()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"kind": "cosine"}, '"cosine" is a shape between two ends; give it a horizon'),
        ({"kind": "linear_to_zero"}, "between two ends"),
        ({"warmup": "2%"}, "schedule.warmup = '2%' is a share of schedule.horizon, which is not given; write tokens"),
        ({"decay": 100}, "decay = 100 is a tail before the horizon"),
        ({"kind": "infinite"}, "infinite.cooldown is not given"),
        ({"kind": "sequence", "parts": [{"tokens": "5%"}]}, "schedule.parts.0.tokens = '5%' is a share"),
        ({"kind": "wsd_s", "periods": {"ends": [1_000, "5%"]}}, "schedule.periods.ends.1 = '5%' is a share"),
        ({"kind": "wsd_s"}, "periods = []"),
        ({"kind": "rewarm"}, "a stage after another"),
        ({"kind": "sequence"}, "needs some"),
        ({"parts": [{}]}, 'parts belong to kind = "sequence"'),
        ({"kind": "sequence", "parts": [{}, {}]}, "stage 0 of 2 has no end"),
        ({"kind": "power", "infinite": {"plateau": 0.3}}, 'infinite belongs to kind = "infinite", and this is "power"'),
        ({"kind": "power", "power": {"b": 0.3}}, "b"),
        ({"horizon": HORIZON, "kind": "wsd_s", "periods": {"ends": [10, 20]}}, "the last period ends at the horizon"),
        (
            {"horizon": HORIZON, "kind": "sequence", "parts": [{"tokens": 10}]},
            "the parts take 10 tokens, and the horizon",
        ),
        (
            {"horizon": HORIZON, "kind": "sequence", "parts": [{"tokens": 10}, {"peak": 0.5}]},
            "begins at a rate of 0.005",
        ),
        ({"horizon": HORIZON, "warmup": "50%", "decay": "60%"}, "do not fit into 100,000"),
        ({"horizon": HORIZON, "tail": "exponential"}, "never reaches zero"),
    ],
)
def test_what_cannot_be_is_refused(schedule, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        config(tmp_path, ENDLESS | schedule)


def test_other_sections_need_tokens_without_a_horizon(tmp_path):
    with pytest.raises(ValueError, match=r"evaluation\.every = '10%' is a share"):
        config(tmp_path, ENDLESS, evaluation={"every": "10%"})


def test_a_dry_run_of_a_run_without_an_end(tmp_path):
    text = report(config(tmp_path, ENDLESS | {"kind": "power"}), 1)
    assert "no end" in text and "goes on until it is stopped" in text and "every 1,000 tokens" in text
    assert "steps" not in text.split("Learning rate")[0].split("FLOPs per step")[1]
    until = report(config(tmp_path, ENDLESS | {"kind": "power"}, run={"until": 2_560}), 1)
    assert "no end" not in until and "2,560" in until
