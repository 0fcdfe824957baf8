"""What is said of a schedule before it is trained: its course, and what is wrong with it."""

import pytest
from matplotlib.image import imread

from launch import explain
from schedulers.adjustments import Remapped, Rewarmed
from schedulers.batch_size import BatchPlan
from schedulers.explain import MOST_STEPS, best_timescale, caveats, decay_caveats, timescale, trace
from schedulers.learning_rate import Annealed, Constant, InverseSqrt, cosine, wsd
from schedulers.power import Power
from schedulers.stages import Periods, Sequence, Stage
from tests.presets import SMALL

FLAT = Constant(1.0, 0)


def test_a_trace_has_every_step_and_of_a_long_run_the_first_and_last_of_many():
    rate = wsd(1.0, 20, 100, 50, "linear")
    assert [(step.number, step.tokens, step.lr) for step in trace(rate, BatchPlan(3), 10, 100)] == [
        (0, 0, 1.0),
        (1, 30, 1.0),
        (2, 60, 0.8),
        (3, 90, pytest.approx(0.2)),
    ]
    long = list(trace(FLAT, BatchPlan(2), 1, 10**9))
    assert len(long) <= MOST_STEPS + 1 and (long[0].number, long[-1].number) == (0, 5 * 10**8 - 1)


class Line:
    """A rate that goes on falling below zero, as lm-engine's exponential does."""

    def __call__(self, tokens, batch_tokens):
        return 1 - tokens / 50

    def landmarks(self):
        return [(0, "start", 1.0)]


USUAL = [
    (wsd(1.0, 20, 1000, 200), 1000),
    (cosine(1.0, 20, 1000, 0.1), 1000),
    (InverseSqrt(1.0, 20), 1000),
    (Power(1e-2, 20, 8, 10), 10**7),
    (Periods(1.0, 20, (500, 1000), decay=0.5, tail="linear", final=1.0), 1000),
]


@pytest.mark.parametrize(("schedule", "end"), USUAL)
def test_nothing_is_said_of_what_is_usual(schedule, end):
    assert caveats(schedule, BatchPlan(10), 1, end) == []


UNUSUAL = {
    "negative": (Line(), 100, ["The rate is negative: -0.8 at 90 tokens", "zero in 1 of 10 steps, first at 50"]),
    "no rate at all": (wsd(1.0, 0, 50, 10, "linear"), 100, ["zero in 5 of 10 steps, first at 50 tokens"]),
    "a jump": (
        Sequence((Stage(FLAT, 50), Stage(Constant(0.5, 0), jumps=True))),
        100,
        ["jumps at 50 tokens (stage 2), from 1 to 0.5"],
    ),
    "periods": (Periods(1.0, 0, (50, 100), decay=0.2, final=0.1), 100, ["jumps at 50 tokens"]),
    "a period cut short": (Periods(1.0, 0, (50, 100), decay=0.2, final=0.97), 90, ["within a period"]),
    "a warm-up that outlives the run": (Constant(1.0, 200), 100, ["ends at 200 tokens and the run at 100"]),
    "a tail that is not reached": (wsd(1.0, 10, 300, 100), 100, ["ends at 100 tokens, before its decay begins at 200"]),
    "half a tail": (wsd(1.0, 10, 120, 40), 100, ["when 50% of the decay up to 120"]),
    "a cap that never lifts": (Annealed(Power(1e-2, 10, 64, 10), 10**9, 0), 10**6, ["above its cap of 0.01 up to"]),
    "a tail under a re-warm": (
        Rewarmed(wsd(1.0, 10, 300, 100), at=50, tokens=0, start=1.0, peak=1.01),
        100,
        ["before its decay begins at 200"],
    ),
    # From 100 on as from 200, at half the pace: 150 and 250 are the decay's 225 and 275.
    "a tail under a remap": (
        Remapped(wsd(1.0, 10, 300, 75), at=100, to=200, horizon=300),
        120,
        ["ends at 120 tokens, before its decay begins at 150"],
    ),
    "half a tail under a remap": (
        Remapped(wsd(1.0, 10, 300, 50), at=100, to=200, horizon=300),
        250,
        ["when 50% of the decay up to 300"],
    ),
    "a cap under a re-warm": (
        Rewarmed(Power(1e-2, 10, 64, 10), at=50, tokens=0, start=1.0, peak=1.01),
        10**4,
        ["above its cap of 0.01 up to"],
    ),
    "a warm-up in a remap of a re-warm": (
        Remapped(Rewarmed(Constant(1.0, 200), 20, 0, 1.0, 1.01), at=100, to=98, horizon=300),
        120,
        ["The warm-up ends at 201 tokens and the run at 120"],
    ),
    "a stage's tail": (
        Sequence((Stage(FLAT, 50), Stage(wsd(1.0, 0, 100, 50), 100))),
        80,
        ["ends at 80 tokens, before its decay begins at 100"],
    ),
    "a stage's warm-up": (
        Sequence((Stage(FLAT, 50), Stage(Constant(1.0, 60), 100, warmup=60))),
        80,
        ["The warm-up ends at 110 tokens and the run at 80"],
    ),
    "a stage that is not reached": (
        Sequence((Stage(FLAT, 50), Stage(FLAT, 50), Stage(FLAT, 50))),
        60,
        ["ends at 60 tokens, before stage 3 begins at 100"],
    ),
    "a branch's tail": (
        Rewarmed(Annealed(wsd(1.0, 10, 900, 300), 200, 100), at=150, tokens=0, start=1.0, peak=1.01),
        150,
        ["when 50% of the decay up to 200"],
    ),
}


@pytest.mark.parametrize(("schedule", "end", "said"), UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_unusual_is_said(schedule, end, said):
    found = caveats(schedule, BatchPlan(10), 1, end)
    assert len(found) == len(said) and all(part in each for part, each in zip(said, found, strict=True))


def test_a_batch_that_would_go_on_growing_is_said():
    plan = BatchPlan(10, ((60, 20), (120, 40)))
    (found,) = caveats(FLAT, plan, 1, 100)
    assert found == (
        "The batch ends at 20 sequences: it would come to 40 at 120 tokens, past the end of the run at 100."
    )
    assert [(step.tokens, step.sequences) for step in trace(FLAT, plan, 1, 100)][-3:] == [(50, 10), (60, 20), (80, 20)]


def test_the_published_time_scale_of_weight_decay():
    """Power Lines: of 1B parameters, B = 1M tokens and a rate of 3e-3, a decay of 0.07455 at 20 tokens a parameter, and
    of 0.02509 at 200."""
    found = {ratio: best_timescale(ratio) for ratio in (1, 20, 80, 200, 1000)}
    assert found == pytest.approx({1: 1.084, 20: 0.22356, 80: 0.10767, 200: 0.06643, 1000: 0.02845}, rel=2e-4)
    for ratio, decay in ((20, 0.0745525), (200, 0.0250878)):
        assert timescale(10**6, 3e-3, decay, ratio * 10**9) == pytest.approx(best_timescale(ratio), rel=1e-5)
    assert decay_caveats(10**6, 3e-3, 0.1, 2 * 10**10, 10**9) == []
    assert "a weight decay of 0.075" in decay_caveats(10**6, 3e-3, 0.01, 2 * 10**10, 10**9)[0]
    assert decay_caveats(10**6, 3e-3, 0.0, 2 * 10**10, 10**9) == []


GROWING = """
weight_decay = 0.0
[schedule]
horizon = "16K"
[[growth]]
at = "50%"
operator = "depth.stack"
schedule = { kind = "rewarm", tokens = "10%" }
"""


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL + GROWING)
    return str(path)


def test_the_course_of_a_run_with_a_growth(preset, tmp_path, capsys):
    plot = tmp_path / "course.png"
    assert explain.main([preset, "--tokens-per-second", "100", "--processes", "2", "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("small: wsd, 1,000 steps of 16 tokens (2 sequences)")
    rows = [line.split() for line in text.splitlines()]
    assert ["8,000", "500", "1", "min", "20", "s", "0", "0", "growth:", "depth.stack"] in rows
    # Twice the blocks from half-way on, and the head as before: less than twice the time.
    end = next(row for row in rows if row[-1:] == ["end"])
    assert end[:2] == ["16,000", "1,000"] and 200 < 60 * int(end[2]) + int(end[4]) < 240
    assert "The rate jumps at 8,000 tokens (start of re-warm), from 0.01 to 0." in text
    assert plot.read_bytes()[:4] == b"\x89PNG" and plot.stat().st_size > 10_000


def test_named_checkpoints_have_rows_and_marks(preset, tmp_path, capsys):
    plots = [tmp_path / "plain.png", tmp_path / "named.png"]
    for plot, named in zip(plots, ([], ["checkpoint.at=['5%', 9_000]"]), strict=True):
        assert explain.main([preset, *named, "--plot", str(plot)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("checkpoint")]
    assert [row[:2] for row in rows] == [["800", "50"], ["9,000", "563"]]
    plain, named = map(imread, plots)
    assert plain.shape == named.shape and (plain != named).any()


def test_a_run_without_an_end_is_explained_as_far_as_one_says(tmp_path, capsys):
    endless = """
[schedule]
kind = "power"
warmup = 160
[evaluation]
every = 100
[checkpoint]
every = 100
"""
    path = tmp_path / "endless.toml"
    path.write_text(SMALL + "weight_decay = 0.0" + endless)
    assert explain.main([str(path)]) == 2
    assert "--tokens N" in capsys.readouterr().err
    assert explain.main([str(path), "--tokens", "1M"]) == 0
    text = capsys.readouterr().out
    assert "below the cap" in text and text.rstrip().endswith("Nothing unusual.")


RAMPED = """
weight_decay = 0.0
[schedule]
horizon = 11520
warmup = 640
decay = 2560
tail = "linear"
"""


def test_a_schedule_over_a_ramp_comes_out_right(tmp_path, capsys):
    """Megatron-Bridge issue 2609: with a ramp [8, 8, 160] to 16, warm-up over 10 iterations and decay over the last 20
    of 100, the warm-up took 20 and the decay stopped half-way. Samples are 8 tokens here: 80, 160, 1120 and 1440 of
    them."""
    path = tmp_path / "bridge.toml"
    path.write_text(SMALL + RAMPED)
    batch = ["batch.sequences=8", "batch.kind=ramp", "batch.ramp={to=16, increment=8, tokens=1280}"]
    assert explain.main([str(path), *batch, "--plot", str(tmp_path / "course.png")]) == 0
    printed = capsys.readouterr().out
    assert "100 steps of 64 to 128 tokens (8 to 16 sequences)" in printed
    rows = {line.split(maxsplit=5)[5]: line.split()[:4] for line in printed.splitlines() if line[:1] in " 1" and line}
    assert rows == {
        "start": ["0", "0", "8", "0"],
        "end of warm-up": ["640", "10", "8", "0.01"],
        "batch of 16": ["1,280", "20", "16", "0.01"],
        "start of decay": ["8,960", "80", "16", "0.01"],
        "middle of decay": ["10,240", "90", "16", "0.005"],
        "end": ["11,520", "100", "16", "0"],
    }
    assert explain.main([str(path), *batch, "batch.ramp.to=12", "batch.ramp.increment=1", "--processes", "8"]) == 2
    assert "cannot be shared: 9 is not a multiple of the 8 data-parallel ranks" in capsys.readouterr().err


def test_what_follows_the_batch_has_columns(tmp_path, capsys):
    path = tmp_path / "seesaw.toml"
    path.write_text(SMALL + 'weight_decay = 0.1\n[schedule]\nkind = "cosine"\nhorizon = "100K"\n')
    batch = ["batch.sequences=8", "batch.kind=seesaw", "batch.seesaw.largest=64"]
    coupling = ["batch.coupling.beta2=half_life", "batch.coupling.weight_decay=timescale"]
    panels = {"batch": (batch, 2), "all": ([*batch, *coupling], 4), "none": ([], 1)}
    for name, (overrides, number) in panels.items():
        plot = tmp_path / f"{name}.png"
        assert explain.main([str(path), *overrides, "--plot", str(plot)]) == 0
        assert imread(plot).shape[0] == 130 * (2.5 + 1.5 * number)
        capsys.readouterr()
    assert explain.main([str(path), *batch, *coupling]) == 0
    printed = capsys.readouterr().out
    found = [line.split()[:6] for line in printed.splitlines() if line.endswith(("batch of 16", "batch of 64"))]
    assert found == [
        ["51,000", "797", "16", "0.007071", "0.9025", "0.001"],
        ["77,455", "965", "64", "0.003535", "0.9", "0.001"],
    ]
