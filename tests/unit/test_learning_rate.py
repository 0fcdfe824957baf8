"""Learning rates against published values, and the invariances of a rate that is a function of tokens."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedulers.learning_rate import TAIL_NAMES, WSD, Constant, Cosine, build

PEAK, WARMUP, DECAY, HORIZON = 3e-3, 4_000, 20_000, 100_000
KINDS = [("constant", "linear"), ("cosine", "linear"), *(("wsd", tail) for tail in TAIL_NAMES)]


def schedule(kind, tail, *, warmup=WARMUP, decay=DECAY, final=0.1):
    return build(kind, peak=PEAK, warmup=warmup, horizon=HORIZON, decay=decay, tail=tail, final=final)


every_schedule = pytest.mark.parametrize("kind, tail", KINDS)
boundaries = st.sets(st.integers(1, 2 * WARMUP) | st.integers(1, HORIZON - 1), max_size=20)


def joints(rate):
    return [tokens for tokens, _, _ in rate.landmarks()]


@pytest.mark.parametrize(
    "tail, expected",
    [
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("1-sqrt", [1, 0.5, 0.29289322, 0.13397460, 0]),
        ("cosine", [1, 0.85355339, 0.5, 0.14644661, 0]),
    ],
)
def test_a_tail_has_its_published_shape(tail, expected):
    rate = WSD(peak=1.0, warmup=0, horizon=1000, decay=400, tail=tail)
    assert [rate(tokens, 1) for tokens in (600, 700, 800, 900, 1000)] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    "tail, progress, expected",
    [("linear", 0.5, 1.63932957e-3), ("1-sqrt", 0.25, 1.63932957e-3), ("1-sqrt", 0.5, 9.60297e-4)],
)
def test_a_tail_starts_from_the_rate_it_finds(tail, progress, expected):
    rate = WSD(peak=3.27865914e-3, warmup=0, horizon=10**12, decay=10**11, tail=tail)
    assert rate(int((0.9 + 0.1 * progress) * 1e12), 1) == pytest.approx(expected, rel=1e-6)


def test_an_exponential_tail_falls_by_equal_ratios_to_its_last_rate():
    rate = WSD(peak=3.27865914e-3, warmup=0, horizon=1000, decay=100, tail="exponential", final=0.1)
    assert [rate(tokens, 1) for tokens in (900, 950, 1000)] == pytest.approx(
        [3.27865914e-3, 1.03680306e-3, 3.27865914e-4], rel=1e-8
    )


def test_the_cosine_falls_from_its_peak_to_its_last_rate():
    rate = Cosine(peak=3.0e-4, warmup=200, horizon=1000, final=0.55)
    assert [rate(tokens, 1) for tokens in (200, 400, 600, 800, 1000)] == pytest.approx(
        [3.0e-4, 2.80230e-4, 2.325e-4, 1.84770e-4, 1.65e-4], rel=1e-5
    )


def test_neither_the_first_nor_the_last_step_is_wasted_at_rate_zero():
    """Ten batches, two of warm-up and five of decay: warm-up counts to a step's end, decay from its beginning."""
    rate = WSD(peak=1.0, warmup=200, horizon=1000, decay=500, tail="linear")
    trace = [rate(tokens, 100) for tokens in range(0, 1000, 100)]
    assert trace == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_a_batch_that_grows_does_not_move_the_schedule():
    """Samples 8 a step, then 16: warm-up still ends at 80 samples and decay fills the last 320 of 1440."""
    rate = WSD(peak=1.0, warmup=80, horizon=1440, decay=320, tail="linear")
    sizes = [8] * 20 + [16] * 80
    trace, samples = [], 0
    for size in sizes:
        trace.append((samples, samples + size, rate(samples, size)))
        samples += size
    assert samples == 1440
    assert min(end for _, end, value in trace if value == 1.0) == 80
    assert max(begin for begin, _, value in trace if value == 1.0) == 1120
    assert trace[-1][2] == pytest.approx(16 / 320)


@every_schedule
@given(shared=boundaries, ours=boundaries, theirs=boundaries)
def test_batches_of_any_size_see_one_curve(kind, tail, shared, ours, theirs):
    """Where batches of two divisions end together in the warm-up, or begin together after it, the rates are equal."""
    rate = schedule(kind, tail)

    def trace(cuts):
        steps = [(begin, end, rate(begin, end - begin)) for begin, end in pairwise([0, *sorted(cuts), HORIZON])]
        ends = {("end", end): value for _, end, value in steps if end <= WARMUP}
        return ends | {("begin", begin): value for begin, _, value in steps if begin >= WARMUP}

    first, second = trace(shared | ours), trace(shared | theirs)
    common = first.keys() & second.keys()
    assert len(common) >= len(shared)
    assert {point: first[point] for point in common} == {point: second[point] for point in common}


@every_schedule
@given(tokens=st.integers(0, HORIZON - 1), batch=st.integers(1, 10_000))
def test_a_rate_lies_between_zero_and_the_peak_up_to_the_horizon(kind, tail, tokens, batch):
    assert 0 < schedule(kind, tail, final=0.01)(tokens, batch) <= PEAK


@every_schedule
@pytest.mark.parametrize("warmup", [0, WARMUP, HORIZON - DECAY])
def test_rates_are_continuous_where_parts_join(kind, tail, warmup):
    rate = schedule(kind, tail, warmup=warmup)
    for joint in joints(rate)[1:]:
        before, at, after = (rate(joint + offset, 0) for offset in (-1, 0, 1))
        # 1 - sqrt(p) is continuous but steep where it begins.
        steepest = PEAK * max(1 / WARMUP, math.pi / DECAY, math.sqrt(1 / DECAY))
        assert abs(at - before) <= steepest and abs(after - at) <= steepest


@every_schedule
def test_past_the_horizon_the_last_rate_stays(kind, tail):
    rate = schedule(kind, tail)
    assert rate(3 * HORIZON, 1_000) == rate(HORIZON, 1_000) > 0


def test_landmarks_name_the_joints_in_order_with_their_rates():
    assert WSD(peak=2.0, warmup=200, horizon=1000, decay=400, tail="linear").landmarks() == [
        (0, "start", 0.0),
        (200, "end of warm-up", 2.0),
        (600, "start of decay", 2.0),
        (800, "middle of decay", 1.0),
        (1000, "end", 0.0),
    ]
    assert Cosine(peak=2.0, warmup=0, horizon=1000, final=0.5).landmarks() == [
        (0, "start", 2.0),
        (500, "middle of decay", 1.5),
        (1000, "end", 1.0),
    ]
    assert Constant(peak=2.0, warmup=100, horizon=1000).landmarks() == [
        (0, "start", 0.0),
        (100, "end of warm-up", 2.0),
        (1000, "end", 2.0),
    ]


def test_a_decay_of_no_length_never_begins():
    rate = schedule("wsd", "1-sqrt", decay=0)
    assert rate(HORIZON - 1, 1) == rate(HORIZON, 1) == PEAK
    assert [label for _, label, _ in rate.landmarks()] == ["start", "end of warm-up", "end"]


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("triangle", {}, "accepted: constant, cosine, wsd"),
        ("wsd", {"tail": "cubic"}, "accepted: linear, 1-sqrt, cosine, exponential"),
        ("wsd", {"tail": "exponential", "final": 0.0}, "never reaches zero"),
        ("wsd", {"warmup": 90_000}, "do not fit into 100,000"),
        ("wsd", {"decay": -1}, "do not fit"),
        ("cosine", {"warmup": 100_001}, "do not fit"),
        ("cosine", {"final": 1.5}, "share of the peak"),
    ],
)
def test_an_impossible_schedule_is_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        schedule(kind, **{"tail": "linear", **changes})
