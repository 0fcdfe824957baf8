"""Laws recovered by fits: published tables, and synthetic runs whose truth is known."""

import numpy as np
import pandas as pd
import pytest

from scaling.analysis import analyse
from scaling.fitting import LeastSquares, fit
from scaling.growth_optima import growth_optima
from scaling.laws import find
from scaling.laws.growth_timing import PUBLISHED as TIMING
from scaling.table import RunTable, tidy
from tests.published import published

TRUTH = {
    "E": 1.7, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.36, "phi": 0.46, "a1": 0.2, "a3": 0.015, "D0": 3e9,
    "k": 0.39, "R_D": 15.0, "R_N": 5.3, "a": 900.0, "b": 2500.0, "eta": 0.16,
}  # fmt: skip


def runs(name, seed, rows=100, noise=2e-3):
    """A law, inputs, and losses of its truth with noise."""
    generator = np.random.default_rng(seed)
    size = np.exp(generator.uniform(np.log(5e7), np.log(3e9), rows))
    tokens = np.exp(generator.uniform(np.log(1e9), np.log(1e11), rows))
    share = generator.uniform(0.2, 0.6, rows)
    x = {
        "N": size, "D": tokens, "C": 6.0 * size * tokens * (1 + 3e7 / size) ** 0.5, "N_once": share * size,
        "N_rec": (1 - share) * size, "r": generator.integers(1, 9, rows).astype(float),
        "P": 2.0 ** generator.integers(0, 4, rows), "U": tokens / generator.choice([1.0, 1.0, 4.0, 16.0, 60.0], rows),
        "D1": np.exp(generator.uniform(np.log(1e9), np.log(1e12), rows)) * (generator.random(rows) > 0.25),
    }  # fmt: skip
    law = find(name)
    log = law.log_value(law.coordinates({each.name: TRUTH[each.name] for each in law.parameters})[None], x)[0]
    return law, x, np.exp(log + noise * generator.standard_normal(rows))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("recurrence", ("phi", "alpha")),
        ("reuse_sizes", ("a1", "a3")),
        ("parscale_tokens", ("k",)),
        ("over_training", ("eta",)),
        ("data_constrained", ("R_D",)),
        ("joint", ("phi", "k", "R_D")),
    ],
)
def test_the_truth_is_recovered_within_its_interval(name, parameters):
    law, x, y = runs(name, seed=1)
    found = fit(law, x, y, size="total", starts=32, replicates=200)
    for each in parameters:
        estimate = found.parameters[each]
        assert abs(estimate.value - TRUTH[each]) < 2.6 * estimate.error, (each, estimate)
        assert estimate.error < 0.25 * abs(TRUTH[each]) + 0.05, (each, estimate)
    assert found.noise == pytest.approx(2e-3, rel=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameter"), [("recurrence", "phi"), ("reuse_sizes", "a3")])
def test_intervals_cover_the_truth_in_200_replicates(name, parameter):
    inside, deviations = [], []
    for seed in range(200):
        law, x, y = runs(name, seed, rows=60)
        found = fit(law, x, y, size="total", starts=4, replicates=200, seed=seed).parameters[parameter]
        inside.append(found.low <= TRUTH[parameter] <= found.high)
        deviations.append((found.value - TRUTH[parameter]) / found.error)
    assert 0.90 <= np.mean(inside) <= 0.98
    assert abs(np.mean(deviations)) < 2 / np.sqrt(200) * 1.5 and np.mean(np.abs(deviations) < 2) > 0.88


def test_repetition_that_runs_hardly_show_is_not_identified():
    """As on public data: few repetitions leave R_D and R_N open, and the fit says so instead of giving a number."""
    law, x, _ = runs("data_constrained", seed=2)
    x = x | {"U": x["D"] / 1.3}
    log = law.log_value(law.coordinates({each.name: TRUTH[each.name] for each in law.parameters})[None], x)[0]
    y = np.exp(log + 5e-3 * np.random.default_rng(0).standard_normal(len(log)))
    found = fit(law, x, y, size="total", starts=32, replicates=100)
    assert not found.identified or found.parameters["R_D"].high > 3 * found.parameters["R_D"].low
    told = [each.message for each in found.verdicts if each.level != "ok"]
    assert any("R_D" in message or "R_N" in message or "compensate" in message for message in told), told


def test_the_parents_scale_is_fixed_where_no_run_is_from_the_beginning():
    law, x, _ = runs("reuse_sizes", seed=3)
    x = x | {"D1": np.maximum(x["D1"], 1e9)}
    truth = {each.name: TRUTH[each.name] for each in law.parameters} | {"D0": 1.0, "a1": 0.3, "a3": 0.012, "B": 1e5}
    log = law.log_value(law.coordinates(truth)[None], x)[0]
    y = np.exp(log + 1e-3 * np.random.default_rng(0).standard_normal(len(log)))
    found = fit(law, x, y, size="total", starts=32, replicates=100, fixed={"D0": 1.0})
    assert found.parameters["a3"].value == pytest.approx(0.012, abs=3 * found.parameters["a3"].error)


@pytest.mark.parametrize(
    ("column", "gain", "exponent", "floor"),
    [("loss_stack_v2_python", 0.3935, 0.1894, 0.6912), ("loss_pile", 0.3344, 0.1963, 1.2886)],
)
def test_parscale_gives_the_published_gain_and_predicts_more_streams(column, gain, exponent, floor):
    frame = pd.read_csv(published("parscale/parscale_42B_losses.csv"))
    x = {"N": frame["N_nonemb"].to_numpy(float), "P": frame["P"].to_numpy(float)}
    y = frame[column].to_numpy()
    found = fit(find("parscale"), x, y, size="non_embedding", starts=32, replicates=0)
    assert found.parameters["k"].value == pytest.approx(gain, rel=0.02)
    assert found.parameters["alpha"].value == pytest.approx(exponent, rel=0.02)
    assert found.parameters["E"].value == pytest.approx(floor, rel=0.01)
    few = x["P"] <= 4
    small = fit(
        find("parscale"),
        {name: each[few] for name, each in x.items()},
        y[few],
        size="N",
        starts=32,
        replicates=0,
    )
    errors = small.predict({name: each[~few] for name, each in x.items()}) / y[~few] - 1
    assert np.abs(errors).max() < 0.006 and abs(errors.mean()) < 0.002


def grown_runs() -> RunTable:
    """Cells of equal N and C whose loss is lowest at the law's tokens, with noise; the last has it at an end."""
    generator, rows = np.random.default_rng(0), []
    for size in (4e8, 1.1e9, 3e9):
        for compute in (8e19, 2e20, 5e20, 1.2e21):
            best = TIMING["a"] * np.log10(size) + TIMING["b"] / np.log10(compute) + TIMING["c"]
            for step in (-0.6, -0.3, 0.0, 0.3, 0.6):
                tokens = 10 ** (best + step + 0.1)
                loss = 2.5 * np.exp(0.02 * (step + 0.1) ** 2 + 1e-5 * generator.standard_normal())
                rows.append({"total": size, "flops": compute, "parent_tokens": tokens, "loss": loss, "tokens": 1e11})
    rows += [
        {"total": 7e9, "flops": 1e21, "parent_tokens": tokens, "loss": tokens, "tokens": 1e11}
        for tokens in (1, 2, 3, 4)
    ]
    return RunTable(tidy(pd.DataFrame(rows)))


def test_the_timing_law_is_refitted_from_runs():
    table = grown_runs()
    x, optima = growth_optima(table, np.ones(len(table), dtype=bool), "total")
    assert len(optima) == 12, "the last cell has its lowest loss at an end"
    found = fit(find("growth_timing"), x, optima, size="total", objective=LeastSquares(), starts=32, replicates=200)
    assert found.parameters["a"].value == pytest.approx(0.88, abs=0.02)
    assert found.parameters["b"].value == pytest.approx(163.27, rel=0.05)
    seven = found.predict({"N": np.array([7e9]), "C": np.array([6 * 7e9 * 2e12])})[0]
    assert seven == pytest.approx(11.11e9, rel=0.1)
    assert len(growth_optima(RunTable(pd.DataFrame({"loss": [2.0]})), np.ones(1, dtype=bool), "total")[1]) == 0


def test_the_timing_law_can_be_asked_for_by_name():
    found = analyse(grown_runs(), laws=["growth_timing"], size="total", replicates=50).best("growth_tokens")
    assert found.rows == 12 and found.parameters["a"].value == pytest.approx(0.88, abs=0.05)
    few = grown_runs()
    with pytest.raises(ValueError, match="needs the best growth times of 3 sizes or budgets"):
        analyse(few.where(np.arange(len(few)) < 8), laws=["growth_timing"], size="total", replicates=50)
