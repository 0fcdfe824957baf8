"""The loss at the end of a curve."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.curves import final_loss, last_writes, window


@given(st.lists(st.integers(0, 30), max_size=40))
def test_the_last_write_of_a_step_wins_and_steps_rise(steps):
    kept = last_writes(np.array(steps, dtype=float))
    left = [step for step, is_kept in zip(steps, kept, strict=True) if is_kept]
    assert left == sorted(set(left))
    for k, step in enumerate(steps):
        assert kept[k] == (not any(later <= step for later in steps[k + 1 :]))


def test_what_an_abandoned_launch_wrote_past_its_resume_is_gone():
    kept = last_writes(np.array([1, 2, 3, 4, 5, 3, 4.0]))
    assert kept.tolist() == [True, True, False, False, False, True, True]


@pytest.mark.parametrize(
    ("rows", "size"), [(0, 0), (4, 4), (50, 10), (500, 50), (2000, 100), (10_000, 100), (100_000, 1000)]
)
def test_the_window_is_a_percent_or_a_hundred_rows_but_no_more_than_a_tenth(rows, size):
    assert window(np.arange(1.0, rows + 1)) == size


def curve(rows, *, slope=0.0, rho=0.0, seed=0, noise=0.05):
    generator = np.random.default_rng(seed)
    errors = generator.normal(size=rows)
    for k in range(1, rows):
        errors[k] = rho * errors[k - 1] + np.sqrt(1 - rho**2) * errors[k]
    tokens = np.arange(1, rows + 1) * 1e3
    return tokens, 2.5 + slope * (1 - tokens / tokens[-1]) + noise * errors


@pytest.mark.parametrize("slope", [0.0, 1.0])
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_its_interval_covers_the_truth(slope, rho):
    found = [final_loss(*curve(2000, slope=slope, rho=rho, seed=seed)) for seed in range(150)]
    z = np.array([(each.value - 2.5) / each.error for each in found])
    assert np.mean(np.abs(z) < 1.96) > 0.8
    assert 0.6 < z.std() < 1.5


def test_it_is_closer_than_the_last_logged_value():
    errors, last = [], []
    for seed in range(50):
        tokens, loss = curve(2000, slope=0.3, seed=seed)
        errors.append(final_loss(tokens, loss).value - 2.5)
        last.append(loss[-1] - 2.5)
    assert np.std(errors) < np.std(last) / 3


def test_spikes_do_not_move_it():
    tokens, loss = curve(2000)
    before = final_loss(tokens, loss)
    loss[-7], loss[-30] = 9.0, 11.0
    after = final_loss(tokens, loss)
    assert abs(after.value - before.value) < before.error


def test_a_fall_is_followed_to_its_end():
    tokens = np.arange(1, 201) * 1e3
    steep = final_loss(tokens, 5 - 2 * tokens / tokens[-1] + 1e-3 * np.sin(np.arange(200)))
    assert steep.value == pytest.approx(3.0, abs=2e-3)


@pytest.mark.parametrize("losses", [[], [2.0], [2.0] * 4, [3.0] * 200 + [np.nan], [3.0] * 200 + [np.inf]])
def test_too_few_rows_or_an_end_that_is_no_number_have_no_loss(losses):
    assert np.isnan(final_loss(np.arange(1.0, len(losses) + 1), losses).value)


def test_a_constant_loss_is_itself():
    found = final_loss(np.arange(1.0, 301), np.full(300, 2.25))
    assert found.value == 2.25 and found.error == 0
