"""Learning rates against published values, and the invariances of a rate that is a function of tokens."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedulers import tails
from schedulers.infinite import COOLDOWNS, Infinite
from schedulers.learning_rate import Annealed, Constant, InverseSqrt, cosine, linear_to_zero, wsd
from schedulers.power import Power
from schedulers.stages import Periods, Sequence, Stage

PEAK, WARMUP, DECAY, HORIZON = 3e-3, 4_000, 20_000, 100_000
SEQ_LEN = 10


def power(sequences=64, cap=PEAK, warmup=WARMUP, seq_len=SEQ_LEN, **options):
    return Power(cap, warmup, sequences, seq_len, **options)


OPEN = {
    "constant": Constant(PEAK, WARMUP),
    "inverse sqrt": InverseSqrt(PEAK, WARMUP, floor=0.3),
    "power": power(a=0.01, follows_batch=False),
    **{f"infinite, {shape}": Infinite(PEAK, WARMUP, 30_000, 0.55, shape) for shape in COOLDOWNS},
}
"""Schedules without an end."""
ENDING = {
    **{f"wsd, {tail}": wsd(PEAK, WARMUP, HORIZON, DECAY, tail, final=0.1) for tail in tails.NAMES},
    "cosine": cosine(PEAK, WARMUP, HORIZON, final=0.1),
    "linear to zero": linear_to_zero(PEAK, WARMUP, HORIZON),
    **{f"{name}, annealed": Annealed(schedule, HORIZON, DECAY, final=0.01) for name, schedule in OPEN.items()},
}
STAGES = Sequence(
    (
        Stage(wsd(PEAK, WARMUP, 40_000, 10_000, final=0.2), 40_000),
        Stage(cosine(PEAK / 2, 2_000, 50_000, final=0.1), 50_000, warmup=2_000),
        Stage(Constant(0.05 * PEAK, 0)),
    )
)
PERIODS = Periods(PEAK, WARMUP, (20_000, 50_000, HORIZON), peaks=(1.0, 0.8, 0.6))
ALL = OPEN | ENDING | {"stages": STAGES, "periods": PERIODS}
CONTINUOUS = {name: each for name, each in ALL.items() if name != "periods"}


def every(schedules):
    return pytest.mark.parametrize("rate", schedules.values(), ids=schedules)


boundaries = st.sets(st.integers(1, 2 * WARMUP) | st.integers(1, HORIZON - 1), max_size=20)

# Published values.


@pytest.mark.parametrize(
    "tail, expected",
    [
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("1-sqrt", [1, 0.5, 0.29289322, 0.13397460, 0]),
        ("cosine", [1, 0.85355339, 0.5, 0.14644661, 0]),
        ("mirror-cosine", [1, 0.64644661, 0.5, 0.35355339, 0]),
        ("square", [1, 0.9375, 0.75, 0.4375, 0]),
    ],
)
def test_a_tail_has_its_published_shape(tail, expected):
    rate = wsd(peak=1.0, warmup=0, horizon=1000, decay=400, tail=tail)
    assert [rate(tokens, 1) for tokens in (600, 700, 800, 900, 1000)] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    "tail, progress, expected",
    [("linear", 0.5, 1.63932957e-3), ("1-sqrt", 0.25, 1.63932957e-3), ("1-sqrt", 0.5, 9.60297e-4)],
)
def test_a_tail_starts_from_the_rate_it_finds(tail, progress, expected):
    """Power's own, at 0.9e12 tokens with 1,024 sequences."""
    rate = Annealed(Power(0.02, 0, 1024, 4096), horizon=10**12, decay=10**11, tail=tail)
    assert rate(9 * 10**11, 0) == pytest.approx(3.27865914e-3, rel=1e-8)
    assert rate(int((0.9 + 0.1 * progress) * 1e12), 1024 * 4096) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "tail, peak, final, expected",
    [
        ("exponential", 3.27865914e-3, 0.1, {0: 3.27865914e-3, 0.5: 1.03680306e-3, 1: 3.27865914e-4}),
        ("exponential", 1.65e-4, 30 / 165, {0: 1.65e-4, 0.25: 1.07744e-4, 0.5: 7.03562e-5, 0.75: 4.59422e-5, 1: 3e-5}),
        ("inverse-proportional", 3e-4, 0.1, {0: 3e-4, 0.25: 9.2308e-5, 0.5: 5.4545e-5, 0.75: 3.8710e-5, 1: 3e-5}),
    ],
    ids=["power", "the anneal of infinite", "WSD-S"],
)
def test_tails_that_never_reach_zero_have_their_published_values(tail, peak, final, expected):
    rate = wsd(peak, warmup=0, horizon=1000, decay=100, tail=tail, final=final)
    found = {progress: rate(900 + round(100 * progress), 1) for progress in expected}
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "sequences, expected",
    [
        (64, [6.58021320e-3, 2.03348028e-3, 6.28405482e-4, 1.94195859e-4]),
        (128, [1.31604264e-2, 4.06696056e-3, 1.25681096e-3, 3.88391718e-4]),
        (256, [0.02, 8.13392112e-3, 2.51362193e-3, 7.76783437e-4]),
        (512, [0.02, 1.62678422e-2, 5.02724386e-3, 1.55356687e-3]),
        (1024, [0.02, 0.02, 1.00544877e-2, 3.10713375e-3]),
    ],
)
def test_power_has_its_published_values(sequences, expected):
    rate = Power(0.02, 0, sequences, 4096)
    for batch in (0, 4096 * sequences):
        found = [rate(10**exponent, batch) for exponent in (9, 10, 11, 12)]
        assert found == pytest.approx(expected, rel=1e-8)


def test_the_cap_of_power_lifts_where_the_rule_says():
    knees = {64: 1.130714e8, 128: 4.401572e8, 256: 1.713415e9, 512: 6.669873e9, 1024: 2.596405e10}
    assert {each: Power(0.02, 0, each, 4096).knee() for each in knees} == pytest.approx(knees, rel=1e-6)
    path = {10**8: 0.02, 10**9: 0.02, 5 * 10**9: 0.0115831120, 5 * 10**10: 3.57952380e-3, 5 * 10**11: 1.10617861e-3}
    rate = Power(0.02, 0, 256, 4096)
    assert {tokens: rate(tokens, 0) for tokens in path} == pytest.approx(path, rel=1e-8)
    assert [label for _, label, _ in rate.landmarks()] == ["start", "below the cap"]


@pytest.mark.parametrize(
    "shape, expected",
    [
        ("cosine", [3.0e-4, 2.80230e-4, 2.325e-4, 1.84770e-4, 1.65e-4]),
        ("inverse-sqrt", [3.0e-4, 2.10035e-4, 1.85630e-4, 1.73018e-4, 1.65e-4]),
    ],
)
def test_infinite_cools_down_to_its_plateau_and_stays(shape, expected):
    rate = Infinite(peak=3.0e-4, warmup=200, cooldown=800, plateau=0.55, shape=shape)
    assert [rate(tokens, 1) for tokens in (200, 400, 600, 800, 1000)] == pytest.approx(expected, rel=1e-5)
    assert rate(10**12, 1) == rate(1000, 1)


def test_the_cosine_falls_from_its_peak_to_its_last_rate():
    rate = cosine(peak=3.0e-4, warmup=200, horizon=1000, final=0.55)
    assert [rate(tokens, 1) for tokens in (200, 400, 600, 800, 1000)] == pytest.approx(
        [3.0e-4, 2.80230e-4, 2.325e-4, 1.84770e-4, 1.65e-4], rel=1e-5
    )


def test_an_inverse_square_root_falls_to_megatrons_floor():
    rate = InverseSqrt(peak=1.0, warmup=100, floor=0.1)
    assert [rate(tokens, 0) for tokens in (50, 100, 400, 2_500, 10_000, 10**9)] == pytest.approx(
        [0.5, 1, 0.5, 0.2, 0.1, 0.1]
    )


def test_periods_end_in_a_decay_and_begin_at_the_peak():
    rate = Periods(1.0, 0, (100, 300), decay=0.5, tail="linear", final=0.2, peaks=(1.0, 0.5))
    found = [rate(tokens, 10) for tokens in (0, 40, 50, 75, 99, 100, 190, 200, 250, 300, 999)]
    assert found == pytest.approx([1, 1, 1, 0.6, 0.216, 0.5, 0.5, 0.5, 0.3, 0.1, 0.1])
    assert [label for _, label, _ in rate.landmarks()][1:] == [
        *("start of decay 1", "end of period 1", "start of decay 2", "end of period 2"),
    ]


def test_a_stage_warms_up_from_the_rate_that_it_finds():
    """From 0.2 of the peak to half of it in 2,000 tokens; the next begins where the cosine ended."""
    found = [STAGES(tokens, 0) / PEAK for tokens in (39_999, 40_000, 41_000, 42_000, 89_999, 90_000, 10**9)]
    assert found == pytest.approx([0.2, 0.2, 0.35, 0.5, 0.05, 0.05, 0.05], abs=1e-4)
    assert STAGES(40_000, 1_000) == pytest.approx(0.35 * PEAK)


# What holds for all.


def test_neither_the_first_nor_the_last_step_is_wasted_at_rate_zero():
    """Ten batches, two of warm-up and five of decay: warm-up counts to a step's end, decay from its beginning."""
    rate = wsd(peak=1.0, warmup=200, horizon=1000, decay=500, tail="linear")
    trace = [rate(tokens, 100) for tokens in range(0, 1000, 100)]
    assert trace == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_a_batch_that_grows_does_not_move_the_schedule():
    """Samples 8 a step, then 16: warm-up still ends at 80 samples and decay fills the last 320 of 1440."""
    rate = wsd(peak=1.0, warmup=80, horizon=1440, decay=320, tail="linear")
    sizes = [8] * 20 + [16] * 80
    trace, samples = [], 0
    for size in sizes:
        trace.append((samples, samples + size, rate(samples, size)))
        samples += size
    assert samples == 1440
    assert min(end for _, end, value in trace if value == 1.0) == 80
    assert max(begin for begin, _, value in trace if value == 1.0) == 1120
    assert trace[-1][2] == pytest.approx(16 / 320)


@every(ALL)
@given(shared=boundaries, ours=boundaries, theirs=boundaries)
def test_batches_of_any_size_see_one_curve(rate, shared, ours, theirs):
    """Where batches of two divisions end together in the warm-up, or begin together after it, the rates are equal; a
    stage's own warm-up is left out."""
    inner = range(40_000, 42_001) if rate is STAGES else range(0)

    def trace(cuts):
        steps = [(begin, end, rate(begin, end - begin)) for begin, end in pairwise([0, *sorted(cuts), HORIZON])]
        ends = {("end", end): value for _, end, value in steps if end <= WARMUP}
        return ends | {("begin", begin): value for begin, _, value in steps if begin >= WARMUP and begin not in inner}

    first, second = trace(shared | ours), trace(shared | theirs)
    common = first.keys() & second.keys()
    assert len(common) >= len([each for each in shared if each not in inner])
    assert {point: first[point] for point in common} == {point: second[point] for point in common}


@every(ALL)
@given(tokens=st.integers(0, HORIZON - 1), batch=st.integers(1, 10_000))
def test_a_rate_lies_between_zero_and_the_peak_up_to_the_horizon(rate, tokens, batch):
    assert 0 < rate(tokens, batch) <= PEAK * (1 + 1e-12)


@every(CONTINUOUS)
def test_rates_are_continuous_where_parts_join(rate):
    for joint in [tokens for tokens, _, _ in rate.landmarks()][1:]:
        before, at, after = (rate(joint + offset, 0) for offset in (-1, 0, 1))
        # 1 - sqrt(p) is continuous but steep where it begins, and an inverse proportion of 0.1 ten times a line there.
        steepest = PEAK * max(1 / WARMUP, 10 / DECAY, math.sqrt(1 / DECAY), math.sqrt(1 / 10_000))
        assert abs(at - before) <= steepest and abs(after - at) <= steepest


@every(ENDING)
@given(first=st.integers(HORIZON - DECAY, HORIZON), second=st.integers(HORIZON - DECAY, HORIZON))
def test_tails_never_rise(rate, first, second):
    assert rate(min(first, second), 1) >= rate(max(first, second), 1)


@every(ENDING)
def test_past_the_horizon_the_last_rate_stays(rate):
    assert rate(3 * HORIZON, 1_000) == rate(HORIZON, 1_000)


tokens_past_the_knee = st.integers(10**6, 10**13)
batches = st.integers(1, 1 << 12)


@given(tokens=tokens_past_the_knee, sequences=batches, times=st.integers(2, 16))
def test_power_is_a_power_of_tokens_and_linear_in_the_batch_at_equal_tokens(tokens, sequences, times):
    rate = Power(cap=1e9, warmup=0, sequences=1, seq_len=64)
    one = rate(tokens, 64 * sequences)
    assert rate(times * tokens, 64 * sequences) == pytest.approx(one * times**-0.51, rel=1e-12)
    assert rate(tokens, 64 * times * sequences) == pytest.approx(one * times, rel=1e-12)
    assert Power(1e9, 0, sequences, 64, follows_batch=False)(tokens, 640) == pytest.approx(one, rel=1e-12)


@given(steps=st.integers(100, 10**6), sequences=batches, times=st.integers(2, 16))
def test_power_goes_with_the_root_of_the_batch_at_equal_steps(steps, sequences, times):
    def at_step(batch):
        return Power(1e9, 0, batch, 64)(64 * batch * steps, 0)

    assert at_step(times * sequences) == pytest.approx(at_step(sequences) * times**0.49, rel=1e-12)


def test_landmarks_name_the_joints_in_order_with_their_rates():
    assert wsd(peak=2.0, warmup=200, horizon=1000, decay=400, tail="linear").landmarks() == [
        (0, "start", 0.0),
        (200, "end of warm-up", 2.0),
        (600, "start of decay", 2.0),
        (800, "middle of decay", 1.0),
        (1000, "end", 0.0),
    ]
    assert cosine(peak=2.0, warmup=0, horizon=1000, final=0.5).landmarks() == [
        (0, "start", 2.0),
        (500, "middle of decay", 1.5),
        (1000, "end", 1.0),
    ]
    assert Constant(peak=2.0, warmup=100).landmarks() == [(0, "start", 0.0), (100, "end of warm-up", 2.0)]
    for rate in ALL.values():
        places = [tokens for tokens, _, _ in rate.landmarks()]
        assert places == sorted(places) and all(value == rate(tokens, 0) for tokens, _, value in rate.landmarks())


def test_a_sequence_has_each_joint_once_and_the_end_of_its_last_stage():
    assert [(tokens, label) for tokens, label, _ in STAGES.landmarks()] == [
        (0, "start"),
        (4_000, "end of warm-up"),
        (30_000, "start of decay"),
        (35_000, "middle of decay"),
        (40_000, "stage 2"),
        (42_000, "end of warm-up"),
        (66_000, "middle of decay"),
        (90_000, "stage 3"),
    ]
    ending = Sequence((STAGES.stages[0], Stage(cosine(0.2 * PEAK, 0, 50_000), 50_000)))
    assert ending.landmarks()[-1][:2] == (90_000, "end")
    assert [label for _, label, _ in ending.landmarks()].count("end") == 1


def test_a_decay_of_no_length_never_begins():
    rate = wsd(PEAK, WARMUP, HORIZON, decay=0)
    assert rate(HORIZON - 1, 1) == rate(HORIZON, 1) == PEAK
    assert [label for _, label, _ in rate.landmarks()] == ["start", "end of warm-up", "end"]


FLAT = Stage(Constant(1.0, 0), 10)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: wsd(1.0, 0, 100, 10, "cubic"), "accepted: linear, 1-sqrt, cosine, mirror-cosine, square, exp"),
        (lambda: wsd(1.0, 0, 100, 10, "exponential"), "never reaches zero"),
        (lambda: wsd(1.0, 0, 100, 10, "inverse-proportional"), "never reaches zero"),
        (lambda: wsd(1.0, 95, 100, 10), "a warm-up of 95 and a decay of 10 tokens do not fit into 100"),
        (lambda: wsd(1.0, 0, 100, -1), "a decay of -1 tokens is negative"),
        (lambda: Constant(1.0, -1), "a warm-up of -1 tokens is negative"),
        (lambda: cosine(1.0, 101, 100), "negative"),
        (lambda: cosine(1.0, 0, 100, final=1.5), "final = 1.5 is not a share"),
        (lambda: InverseSqrt(1.0, 0), "begins at infinity"),
        (lambda: InverseSqrt(1.0, 1, floor=2.0), "floor = 2.0"),
        (lambda: power(b=0.5), "b = 0.5"),
        (lambda: power(sequences=0), "sequences = 0"),
        (lambda: Infinite(1.0, 0, 10, 0.0), "plateau = 0.0"),
        (lambda: Infinite(1.0, 0, 10, 0.5, "linear"), "accepted: cosine, inverse-sqrt"),
        (lambda: Periods(1.0, 0, ()), "periods = []"),
        (lambda: Periods(1.0, 0, (20, 10)), "not ascending"),
        (lambda: Periods(1.0, 0, (10, 20), peaks=(1.0,)), "2 positive factors"),
        (lambda: Periods(1.0, 10, (10, 20)), "does not fit before the decay"),
        (lambda: Sequence(()), "without stages"),
        (lambda: Sequence((Stage(Constant(1.0, 0)), FLAT)), "stage 0 of 2 has no end"),
        (
            lambda: Sequence((FLAT, Stage(Constant(0.5, 0), 10))),
            "begins at a rate of 0.5 and the stage before ends at 1",
        ),
        (lambda: Sequence((FLAT, Stage(Constant(0.5, 0), 10, warmup=11))), "do not hold a warm-up of 11"),
    ],
)
def test_an_impossible_schedule_is_refused(make, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        make()


def test_a_stage_may_jump_if_it_says_so():
    rate = Sequence((FLAT, Stage(Constant(0.5, 0), 10, jumps=True)))
    assert [rate(tokens, 1) for tokens in (9, 10)] == [1.0, 0.5]
