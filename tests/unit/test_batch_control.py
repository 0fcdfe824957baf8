"""Controllers of the batch, on noise scales that are known."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.batch_control import has_diverged
from schedulers.control import Bounds, critical_multiple, evidence, next_size, noise_multiple, norm_test_target
from schedulers.noise_scale import Moments, NoiseScale

LARGEST = Bounds(first=8, largest=256)


def measured(noise_scale: float, spread: float = 0.0, steps: int = 40) -> NoiseScale:
    """Averages of steps whose noise goes up and down by a share of itself."""
    found = NoiseScale()
    for step in range(steps):
        found.add(1, 1e9, {"all": Moments(noise_scale * (1 + spread * (-1) ** step), 1.0)})
    return found


@pytest.mark.parametrize(
    ("noise_scale", "bounds", "size"),
    [
        (15.9, LARGEST, 8),
        (16.1, LARGEST, 16),
        (1_000.0, LARGEST, 16),
        (1_000.0, Bounds(8, 256, most=8), 64),
        (29.0, Bounds(8, 256, most=8), 24),
        (1_000.0, Bounds(8, 15), 8),
        (1.0, LARGEST, 8),
    ],
)
def test_a_batch_grows_by_whole_multiples_within_its_bounds(noise_scale, bounds, size):
    assert next_size(noise_multiple(1.0), measured(noise_scale), 8, bounds) == size


def test_what_the_interval_leaves_open_moves_nothing():
    sure, unsure = measured(20.0), measured(20.0, spread=0.9)
    assert unsure.value == pytest.approx(20) and unsure.interval()[0] < 16
    assert next_size(noise_multiple(1.0), sure, 8, LARGEST) == 16
    assert next_size(noise_multiple(1.0), unsure, 8, LARGEST) == 8
    assert next_size(noise_multiple(1.0), measured(20.0, steps=3), 8, LARGEST) == 8, "three steps have no interval"
    assert next_size(noise_multiple(1.0), NoiseScale(), 8, LARGEST) == 8


def test_an_endless_noise_scale_takes_what_it_may():
    """Where the gradient's own norm is not told from zero, the lower bound still is a bound."""
    nothing = NoiseScale()
    for step in range(40):
        nothing.add(1, 1e9, {"all": Moments(100.0, 0.5 * (-1) ** step + 0.05)})
    low, high = nothing.interval()
    assert high == math.inf and 16 < low < 1_000
    assert next_size(noise_multiple(1.0), nothing, 8, LARGEST) == 16
    assert evidence(noise_multiple(1.0), nothing, 8)["interval"] == [low, None]


def test_a_batch_shrinks_only_where_it_may_and_never_below_the_first():
    falling = Bounds(8, 256, shrinks=True)
    assert next_size(noise_multiple(1.0), measured(20.0), 64, LARGEST) == 64
    assert next_size(noise_multiple(1.0), measured(20.0), 64, falling) == 16
    assert next_size(noise_multiple(1.0), measured(40.0), 64, falling) == 64
    assert next_size(noise_multiple(1.0), measured(1.0), 64, falling) == 8


@pytest.mark.parametrize(("eta", "multiple"), [(0.5, 3), (0.25, 15), (0.15, 43.44), (0.1, 99)])
def test_the_norm_test_comes_to_rest_at_a_multiple_of_the_noise_scale(eta, multiple):
    """B_simple (1 / eta^2 - 1), and B_simple / eta^2 where it is debiased: identity of AdAdaGrad's test."""
    noise_scale = 100.0
    for debiased, rest in ((False, noise_scale * multiple), (True, noise_scale / eta**2)):
        target = norm_test_target(eta, debiased=debiased)
        assert target(noise_scale, math.floor(rest * 0.9)) > rest * 0.9
        assert target(noise_scale, math.ceil(rest * 1.1)) < rest * 1.1
        assert target(noise_scale, round(rest)) == pytest.approx(rest, rel=1e-3)


@given(st.floats(0.1, 1e6), st.integers(1, 1_000), st.floats(0.05, 0.95), st.booleans())
def test_targets_grow_with_the_noise_scale(noise_scale, sequences, eta, debiased):
    for target in (noise_multiple(eta), norm_test_target(eta, debiased=debiased)):
        asked = [target(noise_scale * factor, sequences) for factor in (0.5, 1, 2)]
        assert all(before <= after for before, after in pairwise(asked))


@pytest.mark.parametrize(
    ("losses", "multiple"),
    [
        ({1: 3.0, 2: 3.005}, 2),
        ({1: 3.0, 2: 3.02}, 1),
        ({1: 3.0, 2: 2.9, 4: 2.95}, 2),
        ({1: 3.0, 2: 3.009, 4: 3.009, 8: 3.02}, 4),
        ({1: 3.0, 2: 3.02, 4: 2.9}, 4),
        ({1: 3.0, 2: math.nan, 4: 3.02}, 1),
        ({1: math.nan, 2: math.nan}, 1),
        ({1: 3.0, 2: math.inf}, 1),
    ],
)
def test_the_critical_batch_is_where_branches_begin_to_lose(losses, multiple):
    assert critical_multiple(losses, 0.01) == multiple


@pytest.mark.parametrize(
    ("skipped", "diverged"),
    [
        ([], True),
        ([True, True], True),
        ([True, False], False),
        ([True, True, False, True, True], False),
        ([False, True, True, True, False], True),
    ],
    ids=str,
)
def test_a_branch_diverges_as_a_run_does_or_by_never_moving(skipped, diverged):
    assert has_diverged(skipped, 3) == diverged
