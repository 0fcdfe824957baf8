"""The gradient noise scale: its two scalars, their averages, its interval, and the norm test."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.model.config import ModelConfig
from runtime.model.decoder import Decoder
from runtime.parallel.pieces import GROUPS, group_of, moments_of
from schedulers.noise_scale import MOST_BLOCKS, Moments, NoiseScale, moments, noise_share, norm_test, student_quantile

TWO_PIECES = moments(small=7, big=5, inverse_size=1 / 4, batch=8)
"""Of m = 4 sequences each, with mean gradients (3, 0) and (1, 2)."""


def test_two_pieces_give_both_scalars():
    assert Moments(noise=16, signal=3) == TWO_PIECES
    found = NoiseScale()
    found.add(8, 100, {"all": TWO_PIECES})
    assert found.value == pytest.approx(16 / 3)


@pytest.mark.parametrize(("eta", "batch"), [(0.1, 320), (0.15, 143), (0.25, 52), (0.5, 13), (1, 4)])
def test_the_norm_test_names_the_batch_that_passes(eta, batch):
    assert norm_test(TWO_PIECES, 8, eta) == batch
    assert norm_test(TWO_PIECES, 8, eta, debiased=True) == math.ceil(16 / 3 / eta**2)


@given(noise=st.floats(0.1, 1e4), signal=st.floats(0.1, 1e4), eta=st.floats(0.1, 0.9))
def test_the_norm_test_comes_to_rest_where_the_noise_scale_says(noise, signal, eta):
    """At B_simple (1 / eta^2 - 1), where it names the batch it was given, and grows by at most 1 / eta^2 at a time."""
    found, rest = Moments(noise, signal), noise / signal * (1 / eta**2 - 1)
    assert norm_test(found, rest, eta) == pytest.approx(max(rest, 1), abs=1.01, rel=1e-9)
    assert norm_test(found, max(rest / 2, 1e-6), eta) <= max(rest / 2, 1e-6) / eta**2 + 1
    assert noise_share(found, rest) == pytest.approx(eta)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moments(5, 5, 1 / 8, 8), "do not divide a batch of 8"),
        (lambda: norm_test(Moments(1, -1), 8, 0.1), "allows no norm test"),
        (lambda: norm_test(Moments(1, -0.01), 8, 0.1, debiased=True), "allows no norm test"),
        (lambda: norm_test(Moments(1, 1), 8, 0.0), "eta = 0.0"),
    ],
)
def test_what_has_no_answer_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_positive_gradient_is_no_noise_scale():
    found = NoiseScale()
    assert found.value is None and found.moments is None and found.interval() is None
    found.add(8, 100, {"all": Moments(1.0, -0.1)})
    assert found.value is None and found.group_values() == {} and noise_share(Moments(1, -0.2), 8) is None
    assert NoiseScale([[1.0, -2.0, 3.0]]).value == 0.0


def seen(gradients: np.ndarray, sizes: np.ndarray) -> tuple[float, float, float, float]:
    """What `moments` is given, of pieces' mean gradients [pieces, dims] and their sizes, weighted by them."""
    weights = sizes / sizes.sum()
    small = (weights * (gradients**2).sum(1)).sum()
    return small, ((weights[:, None] * gradients).sum(0) ** 2).sum(), (weights / sizes).sum(), sizes.sum()


@pytest.mark.parametrize(("equal", "pieces"), [(8, 4), (4, 8)])
def test_the_scalars_are_unbiased(equal, pieces):
    """In 20 dims with a deviation of 2 and a mean of 0.3 in each: S = 80, |G|^2 = 1.8. Also of unequal pieces."""
    rng = np.random.default_rng(0)
    for sizes in (np.full(pieces, equal), np.array([1, 2, 3, 10, 16])):
        drawn = 0.3 + 2 * rng.standard_normal((20_000, len(sizes), 20)) / np.sqrt(sizes)[:, None]
        weights = sizes / sizes.sum()
        big = (np.einsum("j,rjd->rd", weights, drawn) ** 2).sum(1)
        found = np.stack(moments((drawn**2).sum(2) @ weights, big, (weights / sizes).sum(), sizes.sum()), 1)
        mean, error = found.mean(0), found.std(0) / len(found) ** 0.5
        assert (abs(mean - (80, 1.8)) < 3 * error).all() and (error < (0.3, 0.03)).all()


@pytest.mark.parametrize(("workers", "each", "factor"), [(2, 2, 1.25), (8, 2, 1.4375)])
def test_the_sum_of_variances_within_workers_and_between_counts_noise_twice(workers, each, factor):
    """As in AdAdaGrad's code: the means of workers differ by noise that is in the variance within them already."""
    drawn = np.random.default_rng(0).standard_normal((workers, each, 400_000))
    means = drawn.mean(1)
    twice = drawn.var(1, ddof=1).mean(0).sum() + means.var(0).sum()
    found = moments(*seen(drawn.reshape(workers * each, -1), np.ones(workers * each))).noise
    assert found == pytest.approx(400_000, rel=5e-3) and twice / found == pytest.approx(factor, rel=5e-3)


@given(
    gradients=st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=2, max_size=6),
    scale=st.floats(0.01, 100),
    data=st.data(),
)
def test_scaling_the_gradient_scales_both_scalars_and_not_their_ratio(gradients, scale, data):
    sizes = np.array(data.draw(st.lists(st.integers(1, 9), min_size=len(gradients), max_size=len(gradients))))
    found, scaled = (moments(*seen(factor * np.array(gradients), sizes)) for factor in (1.0, scale))
    reach = 1e-9 * scale**2 * (1 + abs(found.noise))
    assert scaled == pytest.approx(Moments(*(scale**2 * each for each in found)), rel=1e-9, abs=reach)


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=3, max_size=3), st.integers(1, 9))
def test_pieces_that_do_not_differ_may_be_merged(gradients, size):
    """Merging equal pieces takes away a degree of freedom and no squares: (M - 1) S and S / B + |G|^2 stay."""
    apart = np.array([gradients[0], gradients[0], *gradients[1:]])
    merged = moments(*seen(np.array(gradients), np.array([2 * size, size, size])))
    split = moments(*seen(apart, np.full(4, size)))
    assert 2 * merged.noise == pytest.approx(3 * split.noise, rel=1e-9, abs=1e-9)
    total = [each.noise / (4 * size) + each.signal for each in (merged, split)]
    assert total[0] == pytest.approx(total[1], rel=1e-9, abs=1e-9)


@given(st.integers(1, 64), st.lists(st.integers(1, 8), min_size=1, max_size=20))
def test_neither_the_batch_nor_its_pieces_move_the_averages(batch, factors):
    """Where a step of any size sees the same moments, and a step of n batches weighs what n steps of one do."""
    truth = Moments(80.0, 1.8)
    apart, together = NoiseScale(), NoiseScale()
    for factor in factors:
        together.add(factor * batch, 50 * batch, {"all": truth})
        for _ in range(factor):
            small, big = (truth.signal + truth.noise / size for size in (batch / 2, batch))
            apart.add(batch, 50 * batch, {"all": moments(small, big, 2 / batch, batch)})
    assert together.moments == pytest.approx(truth) and apart.moments == pytest.approx(truth)
    weights = [math.fsum(block[0] for block in each.blocks) for each in (apart, together)]
    assert weights[0] == pytest.approx(weights[1])


def averaged(steps: list[Moments], tokens: int = 1, half_life: float = 20.0) -> NoiseScale:
    found = NoiseScale()
    for step in steps:
        found.add(tokens, half_life, {"one": step, "other": Moments(1.0, 2.0)})
    return found


def random_steps(count: int) -> list[Moments]:
    rng = np.random.default_rng(1)
    return [Moments(*pair) for pair in rng.normal((10, 1), (3, 0.5), (count, 2)).tolist()]


def test_averages_forget_by_half_lives_and_blocks_stay_few_and_even():
    steps = random_steps(400)
    found = averaged(steps)
    weights = 0.5 ** (np.arange(400)[::-1] / 20)
    noise, signal = np.average(np.array(steps), axis=0, weights=weights)
    assert found.moments == pytest.approx((noise + 1, signal + 2))
    assert found.group_values() == pytest.approx({"one": noise / signal, "other": 0.5})
    shares = [block[0] / math.fsum(each[0] for each in found.blocks) for block in found.blocks]
    assert len(shares) == MOST_BLOCKS and max(shares) < 0.1


def test_a_step_that_is_not_finite_is_left_out():
    steps = random_steps(9)
    spoiled = [*steps[:4], Moments(math.nan, 1.0), *steps[4:], Moments(1.0, math.inf)]
    assert averaged(spoiled) == averaged(steps)


def test_the_averages_go_on_from_json_bit_for_bit():
    steps = random_steps(90)
    resumed = NoiseScale(**json.loads(json.dumps(asdict(averaged(steps[:50])))))
    for step in steps[50:]:
        resumed.add(1, 20.0, {"one": step, "other": Moments(1.0, 2.0)})
    assert resumed == averaged(steps) and resumed.interval() == averaged(steps).interval()


@pytest.mark.parametrize(
    ("noise_scale", "batch", "steps"),
    [(200.0, 100, 24), (200.0, 100, 60), (200.0, 50, 60), (20.0, 200, 60)],
    ids=["few steps", "near the noise scale", "batches a quarter of it", "batches ten times as large"],
)
def test_the_interval_covers_the_truth_as_often_as_it_says(noise_scale, batch, steps):
    """Over 800 runs, of anisotropic gradients in 32 dims and four pieces; the half-life is 20 steps."""
    runs, pieces, dims = 800, 4, 32
    rng = np.random.default_rng(7)
    spectrum = 1 / np.arange(1, dims + 1)
    spectrum /= spectrum.sum()
    covered = unbounded = 0
    for _ in range(runs):
        deviations = np.sqrt(spectrum * pieces / batch)
        gradients = rng.standard_normal((steps, pieces, dims)) * deviations + (1 / noise_scale / dims) ** 0.5
        small, big = (gradients**2).sum(2).mean(1), (gradients.mean(1) ** 2).sum(1)
        found = NoiseScale()
        for pair in zip(small.tolist(), big.tolist(), strict=True):
            found.add(batch, 20 * batch, {"all": moments(*pair, pieces / batch, batch)})
        low, high = found.interval()
        covered += low <= noise_scale <= high
        unbounded += math.isinf(high)
    assert 0.93 <= covered / runs <= 0.97
    assert unbounded < runs / 2


def test_an_interval_needs_enough_steps():
    assert averaged(random_steps(7)).interval() is None
    low, high = averaged(random_steps(12)).interval()
    assert low < averaged(random_steps(12)).value < high


def test_a_gradient_lost_in_noise_bounds_the_noise_scale_from_below_alone():
    rng = np.random.default_rng(3)
    found = averaged([Moments(100.0, each) for each in rng.normal(0.0, 1.0, 60)][:60])
    found.groups.clear()
    lost = NoiseScale([[w, noise, signal - 2 * w] for w, noise, signal in found.blocks])
    low, high = lost.interval()
    assert low > 10 and high == math.inf


@pytest.mark.parametrize(("freedom", "quantile"), [(7, 2.3646), (10, 2.2281), (31, 2.0395), (1000, 1.9623)])
def test_quantiles_of_student_are_the_tables(freedom, quantile):
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-3)


def test_every_parameter_belongs_to_a_group():
    tying = {"plan": "cycle", "loops": 2, "own_norms": True, "own_scales": True, "relaxation": "lora"}
    options = {"streams": {"count": 2, "prefix_tokens": 2}, "tying": tying | {"injection": "linear"}}
    shape = {"num_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "vocab_size": 8}
    decoders = [
        Decoder(ModelConfig(**shape, **each))
        for each in (options, {"experts": {"count": 2}, "norm": "layernorm", "qk_norm": True}, {"templates": 2})
    ]
    found = {name: group_of(name) for decoder in decoders for name, _ in decoder.named_parameters()}
    assert set(found.values()) == set(GROUPS)
    expected = {
        "head.weight": "embedding",
        "norm.weight": "norms",
        "depths.1.feed_forward_norm.weight": "norms",
        "blocks.0.attention.q_norm.weight": "norms",
        "blocks.0.attention.o_proj.templates.1": "attention",
        "blocks.0.feed_forward.up_proj.coefficients": "feed_forward",
        "blocks.0.feed_forward.router.weight": "feed_forward",
        "blocks.0.feed_forward.experts.1.up_proj.weight": "feed_forward",
        "depths.1.relaxations.v_proj.relaxation_in": "attention",
        "depths.1.relaxations.down_proj.relaxation_out": "feed_forward",
        "depths.0.prefix.prefix_keys": "attention",
        "depths.0.attention_scale.weight": "norms",
        "injection.weight": "other",
    }
    assert {name: found.get(name) for name in expected} == expected


def test_a_step_of_one_piece_has_no_moments():
    one, spoiled = [1.0] * 11, [1.0] * 5 + [math.nan] * 6
    assert moments_of(one, 8) is None and moments_of(spoiled, 8) is None
    two = [5.0, 0, 0, 0, 0, 7.0, 0, 0, 0, 0, 2.0]
    assert moments_of(two, 8) == {"embedding": TWO_PIECES}
