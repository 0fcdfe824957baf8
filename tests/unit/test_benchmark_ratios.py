"""Ratios of times that a busy machine lengthens."""

import numpy as np
import pytest

from benchmarks.bench import ratio, undisturbed


def disturbed(generator: np.random.Generator, cost: float) -> tuple[list[float], list[float]]:
    """A hundred rounds of two contenders, one `cost` times as slow, with delays that only ever add."""
    rounds = [1 + 0.05 * generator.exponential(size=100) for _ in range(2)]
    return rounds[0].tolist(), (cost * rounds[1]).tolist()


@pytest.mark.parametrize("cost", [1.0, 1.005, 1.05])
def test_the_fastest_quarter_tells_a_cost_that_delays_hide(cost):
    generator = np.random.default_rng(1)
    found = [undisturbed(*disturbed(generator, cost), draws=200) for _ in range(40)]
    covered = np.mean([low <= cost <= high for _, low, high in found])
    assert covered >= 0.85 and np.median([high - low for _, low, high in found]) < 0.01
    wide = [ratio(*disturbed(generator, cost), draws=200) for _ in range(5)]
    assert np.median([high - low for _, low, high in wide]) > 0.015
