"""Batches that change: plans, the seesaw, and what follows a change."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedulers.batch_size import BatchPlan, Stretch, ramp
from schedulers.coupling import LEAST_BETA2, Coupled, Coupling, blended
from schedulers.learning_rate import Annealed, Constant, cosine
from schedulers.power import Power
from schedulers.seesaw import seesaw

DEEPSEEK = BatchPlan(2304, ((10_000, 4608), (30_000, 9216)))


@pytest.mark.parametrize(
    ("tokens", "sequences"), [(0, 2304), (9_999, 2304), (10_000, 4608), (29_999, 4608), (30_000, 9216), (10**12, 9216)]
)
def test_a_change_holds_from_its_token_on(tokens, sequences):
    assert DEEPSEEK(tokens) == sequences


@pytest.mark.parametrize(("consumed", "sequences"), [(2380, 16), (2381, 24), (100_000, 352), (300_000, 1024)])
def test_a_ramp_is_megatrons(consumed, sequences):
    """--rampup-batch-size 16 8 300000 towards 1024, in samples: 126 increments of 2380.95."""
    plan = ramp(16, 1024, 8, 300_000)
    assert len(plan.changes) == 126 and plan(consumed) == sequences


def test_the_warm_up_of_a_batch_saves_its_published_steps():
    """OLMo-1B's, from 1,024 to 4,096 documents of 4,096 tokens: 43 % fewer steps (arXiv 2505.23971)."""
    plan, end = BatchPlan(1_024, ((168 * 10**9, 2_048), (503 * 10**9, 4_096))), 658 * 10**9
    steps, constant = plan.step_at(end, 4_096), BatchPlan(1_024).step_at(end, 4_096)
    assert (steps, constant) == pytest.approx((89_228, 156_879), abs=1), "and the last, which is not a whole one"
    assert 1 - steps / constant == pytest.approx(0.431, abs=5e-4)


def test_steps_are_counted_over_changes():
    """Megatron-Bridge issue 2609: 100 iterations to a batch of 16 with a ramp [8, 8, 160] are 1,440 samples."""
    plan = ramp(8, 16, 8, 160)
    assert list(plan.stretches(1_440, 1)) == [Stretch(0, 0, 8, 20), Stretch(20, 160, 16, 80)]
    assert [plan.step_at(samples, 1) for samples in (80, 1_120, 1_440)] == [10, 80, 100]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.lists(st.integers(1, 4_000), min_size=4, max_size=4, unique=True),
    st.integers(1, 9),
    st.integers(1, 6_000),
)
def test_stretches_are_the_steps_that_a_loop_takes(sizes, places, seq_len, end):
    plan = BatchPlan(sizes[0], tuple(zip(sorted(places), sizes[1:], strict=False)))
    tokens, taken = 0, []
    while tokens < end:
        taken.append((len(taken), tokens, plan(tokens)))
        tokens += plan(tokens) * seq_len
    found = [
        (each.step + k, each.tokens + k * each.sequences * seq_len, each.sequences)
        for each in plan.stretches(end, seq_len)
        for k in range(each.steps)
    ]
    assert found == taken
    assert plan.step_at(end, seq_len) == len(taken)


def test_a_measured_change_replaces_what_was_to_come():
    assert DEEPSEEK.changed(20_000, 3_000) == BatchPlan(2304, ((10_000, 4608), (20_000, 3_000)))
    assert DEEPSEEK.changed(10_000, 3_000) == BatchPlan(2304, ((10_000, 3_000),))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: BatchPlan(0), "a batch of 0 sequences"),
        (lambda: BatchPlan(8, ((5, 16), (5, 32))), r"\[5, 5\] tokens, which is not in order"),
        (lambda: BatchPlan(8, ((0, 16),)), "not in order, above 0"),
        (lambda: ramp(8, 17, 8, 100), "from 8 to 17 sequences in increments of 8"),
        (lambda: ramp(16, 8, 8, 100), "from 16 to 8"),
        (lambda: ramp(8, 16, 0, 100), "increments of 0"),
        (lambda: ramp(8, 16, 1, 7), "7 tokens has no room for 8"),
        (lambda: seesaw(cosine(1.0, 0, 100), 0, 8, 1, 64, 100), "a factor of 1"),
        (lambda: seesaw(cosine(1.0, 0, 100), 0, 8, 2, 15, 100), "largest = 15 leaves no room for 2 times"),
        (lambda: Coupling("surge"), "belong together"),
        (lambda: Coupling("sqrt", noise_sequences=4.0), "belong together"),
    ],
)
def test_what_cannot_be_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


HORIZON = 1_000_000


def halvings(number):
    """Progress at which half a cosine has come down to 1/2, 1/4, ...: [D] of the reference."""
    return [math.acos(2 * 0.5**k - 1) / math.pi for k in range(1, number + 1)]


def test_the_seesaw_of_a_cosine():
    found = seesaw(cosine(1e-2, 0, HORIZON), 0, 4, 2, 4 * 2**10, HORIZON)
    places = [tokens / HORIZON for tokens, _ in found.plan.changes[:5]]
    assert places == pytest.approx([0.5, 0.66667, 0.76995, 0.83914, 0.88687], abs=1e-5)
    assert places == pytest.approx(halvings(5), abs=2e-6)
    assert found.plan.sizes == [4 * 2**k for k in range(11)]
    for k, (tokens, sequences) in enumerate(found.plan.changes[:-1], 1):
        assert found(tokens, sequences) == pytest.approx(1e-2 * 2 ** (-k / 2))
        assert found(tokens - 1, sequences) == pytest.approx(1e-2 * 2 ** (-(k - 1) / 2))
    steps = found.plan.step_at(HORIZON, 1)
    assert steps / (HORIZON / 4) == pytest.approx(0.622, abs=5e-4)


def test_the_steps_that_a_seesaw_saves_in_the_limit_of_small_stairs():
    """Of a quarter of a cosine: 1 - 2 / pi, 36.34 %, which the paper rounds."""
    first, sizes = 100_000, [round(100_000 * 1.001**stair) for stair in range(1, 5_000)]
    places = [round(math.acos(first / size) * 2 / math.pi * 10**12) for size in sizes]
    steps = BatchPlan(first, tuple(zip(places, sizes, strict=True))).step_at(10**12, 1)
    assert 1 - steps / (10**12 / first) == pytest.approx(0.3634, abs=5e-4)


def test_the_seesaw_goes_on_as_the_schedule_where_it_may_not_grow():
    base, end = cosine(1e-2, 1_000, HORIZON), HORIZON
    found = seesaw(base, 1_000, 4, 4, 63, end)
    assert found.plan.sizes == [4, 16]
    ((tokens, _),) = found.plan.changes
    assert found(500, 4) == base(500, 4) and found(tokens - 1, 4) == 1e-2
    for later in (tokens, tokens + 50_000, end - 1, end):
        assert found(later, 16) == 2 * base(later, 16)
    assert found(tokens, 16) == pytest.approx(1e-2 / 2, rel=1e-4), "no jump but the stair's"


def test_the_seesaw_of_a_schedule_without_an_end():
    power = Power(1e-2, 1_000, 8, 16, follows_batch=False)
    found = seesaw(power, 1_000, 8, 2, 64, None)
    places = [tokens for tokens, _ in found.plan.changes]
    assert [power(tokens, 0) / power(1_000, 0) for tokens in places] == pytest.approx([0.5, 0.25, 0.125], rel=1e-6)
    flat = seesaw(Annealed(Constant(1e-2, 10), 100, 0), 10, 8, 2, 64, 100)
    assert flat.plan == BatchPlan(8), "a rate that does not fall moves no batch"


PLAN = BatchPlan(64, ((1_000, 256), (5_000, 16)))


@pytest.mark.parametrize(
    ("coupling", "factors"),
    [
        (Coupling(), (1, 1, 1)),
        (Coupling("sqrt"), (1, 2, 0.5)),
        (Coupling("linear"), (1, 4, 0.25)),
        (Coupling("surge", noise_sequences=64.0), (1, 0.8, 0.8)),
        (Coupling("surge", noise_sequences=256.0), (1, 1.25, 0.47058824 / 0.8)),
    ],
)
def test_the_rate_follows_the_batch(coupling, factors):
    rate = Coupled(Constant(3.0, 0), PLAN, coupling)
    assert [rate(tokens, PLAN(tokens)) / 3 for tokens in (0, 1_000, 5_000)] == pytest.approx(factors)
    assert [rate(tokens, PLAN(tokens)) for tokens in (999, 4_999)] == [rate(tokens, 0) for tokens in (0, 1_000)]


@pytest.mark.parametrize(("ratio", "best"), [(0.25, 0.8), (0.5, 0.9428), (1, 1), (2, 0.9428), (4, 0.8)])
def test_the_surge_has_the_published_shape(ratio, best):
    """Of B / Bn, as a share of the highest rate (arXiv 2405.14578)."""
    plan = BatchPlan(1_000, ((1, int(1_000 * ratio)),)) if ratio != 1 else BatchPlan(1_000)
    assert Coupling("surge", noise_sequences=1_000.0).rate_factor(plan, 1, 0) == pytest.approx(best, abs=5e-5)


@pytest.mark.parametrize(
    ("first", "batch", "expected"),
    [
        (512, 1, 0.99989982),
        (512, 16, 0.99839837),
        (512, 128, 0.98725854),
        (512, 1_024, 0.9025),
        (512, 4_096, LEAST_BETA2),
        (524_288, 65_536, 0.99360885),
    ],
)
def test_second_moments_keep_their_half_life_in_tokens(first, batch, expected):
    plan = BatchPlan(first, ((1, batch),))
    assert Coupling(beta2=True).beta2_of(0.95, plan, 1) == pytest.approx(expected, abs=5e-9)
    assert Coupling(beta2=True).beta2_of(0.95, plan, 0) == 0.95 == Coupling().beta2_of(0.95, plan, 1)


def test_the_half_life_of_second_moments_in_tokens():
    """Of 0.95 at 524,288 tokens a batch, 7.0849M, and as many at an eighth of the batch."""
    coupling, first = Coupling(beta2=True), 524_288
    for batch in (first, first // 8):
        beta2 = coupling.beta2_of(0.95, BatchPlan(batch) if batch == first else BatchPlan(first, ((1, batch),)), 1)
        assert batch * math.log(0.5) / math.log(beta2) == pytest.approx(7.0849e6, rel=1e-5)


@pytest.mark.parametrize(("rule", "factor"), [("none", 4), ("sqrt", 2), ("linear", 1)])
def test_weight_decay_keeps_its_time_scale(rule, factor):
    coupling = Coupling(rule, weight_decay=True)
    assert coupling.decay_factor(PLAN, 1_000) == pytest.approx(factor)
    rate = coupling.rate_factor(PLAN, 1_000, 0)
    assert PLAN(1_000) / (rate * coupling.decay_factor(PLAN, 1_000)) == pytest.approx(PLAN.first)
    assert Coupling(rule).decay_factor(PLAN, 1_000) == 1


def test_a_change_is_blended_in():
    assert [blended(PLAN, tokens, 0, 1_000) for tokens in (999, 1_000, 1_500, 2_000, 4_000)] == pytest.approx(
        [64, 64, 128, 256, 256]
    )
    assert blended(PLAN, 1_000, 500, 1_000) == pytest.approx(128), "of a step's end, as a warm-up"
    overlapping = BatchPlan(16, ((100, 64), (200, 256)))
    assert blended(overlapping, 250, 0, 200) == pytest.approx(16 * 4**0.75 * 4**0.25)
    assert blended(overlapping, 200, 0, 0) == pytest.approx(256)


@given(st.integers(1, 400), st.integers(1, 400))
def test_power_is_linear_in_the_batch_and_nearly_its_root_at_equal_steps(first, batch):
    """Its rate at equal tokens, and at equal steps, where tokens grow with the batch too."""
    rule = Power(1e9, 0, first, 1)
    tokens = 10**9
    assert rule(tokens, batch) / rule(tokens, first) == pytest.approx(batch / first)
    assert rule(tokens * batch, batch) / rule(tokens * first, first) == pytest.approx((batch / first) ** 0.49)
