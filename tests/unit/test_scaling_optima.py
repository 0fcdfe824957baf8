"""Cells, bowls, laws through them, and what is decided from them, on ladders whose truth is known."""

import numpy as np
import pandas as pd
import pytest

from scaling.cells import levels
from scaling.laws import find
from scaling.optima import cells, decide, find_bowls, fit_optima, fit_stability, regret, regrets
from scaling.optima.plateau import plateau
from scaling.optima.polynomial import fitted_bowl
from scaling.optima.regression import censored_regression, cluster_weights, least_squares
from scaling.optima.regret import expected_regret
from scaling.optima.surface import by_surface
from scaling.table import RunTable, tidy
from tests.ladders import BATCH, CURVATURE, LR, best_batch, best_lr, ladder

SIZE = "non_embedding"
CALM = {"scatter": 0.0, "noise": 1e-6, "outliers": 0.0, "edges": 0}


def table(**columns) -> RunTable:
    rows = max((len(each) for each in columns.values() if np.ndim(each)), default=1)
    known = {SIZE: 1e8, "tokens": 1e9, "lr": 1e-3, "batch_tokens": 1e5, "loss": 3.0}
    return RunTable(tidy(pd.DataFrame(known | columns, index=range(rows))))


def one_cell(lr, batch, best=(-6.0, 12.0), curvature=CURVATURE, **columns) -> RunTable:
    z = np.column_stack([each.ravel() for each in np.meshgrid(lr, batch)])
    off = z - best
    loss = 3 * np.exp(np.einsum("bi,ij,bj->b", off, curvature, off) / 2)
    return table(lr=np.exp(z[:, 0]), batch_tokens=np.exp(z[:, 1]), loss=loss, **columns)


# cells


PLANE = {"lr": [1e-3, 2e-3, 1e-3, 2e-3], "batch_tokens": [1e5, 1e5, 2e5, 2e5]}
LINES = {"lr": [1e-3, 2e-3, 1e-3, 2e-3]}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (PLANE, 1),
        (LINES | {"weight_decay": [0.1, 0.1, 0.2, 0.2]}, 2),
        (LINES | {"optimizer": ["adamw", "adamw", "muon", "muon"]}, 2),
        (PLANE | {"final_lr": [1e-4, 2e-4, 1e-4, 2e-4]}, 1),  # a tenth of the peak
        (PLANE | {"final_lr": [1e-5, 2e-5, 2e-5, 4e-5]}, 1),  # a log's last, one step short of zero
        (PLANE | {"final_lr": [1e-5, 1e-5, 1e-5, 1e-5]}, 1),  # a number
        (LINES | {"final_lr": [1e-5, 1e-5, 1e-4, 1e-4]}, 2),  # two numbers
        (LINES | {"final_lr": [0.0, 0.0, 1e-4, 2e-4]}, 2),  # two shares
        (PLANE | {"warmup_tokens": [1e6, 1e6, 2e6, 2e6]}, 1),  # a number of steps
        (PLANE | {"tokens": [1.000e9, 1.003e9, 1.000e9, 1.003e9]}, 1),  # rounded to whole batches
        (PLANE | {"tokens": [1e9, 2e9, 1e9, 2e9]}, 2),
        (PLANE | {"seed": [1, 2, 3, 4]}, 1),
        (PLANE | {"streams": [1, 2, 1, 2]}, 2),  # another model, though each has its rate
        (PLANE | {"active": [1e7, 1e7, 2e7, 2e7]}, 2),
    ],
)
def test_cells_part_where_settings_other_than_lr_and_batch_differ(columns, expected):
    found = cells(table(**columns), SIZE)
    assert len(found) == expected
    assert sum(map(len, found)) == 4


def test_only_finished_runs_have_losses_and_diverged_ones_are_kept_apart():
    found = cells(
        table(
            lr=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2],
            loss=[3.0, 2.9, np.inf, 9.0, 2.5, np.nan],
            status=["finished", "finished", "finished", "diverged", "killed", "finished"],
        ),
        SIZE,
    )
    assert list(found[0].loss) == [3.0, 2.9]
    assert list(found[0].diverged[:, 0]) == [4e-3, 8e-3]


@pytest.mark.parametrize(("column", "said"), [("loss", "'loss'"), ("tokens", "'tokens'"), (SIZE, SIZE)])
def test_a_table_without_what_is_needed_is_refused(column, said):
    with pytest.raises(ValueError, match=said):
        cells(table(**{column: np.nan}), SIZE)


def test_rates_that_were_printed_short_are_one_level():
    assert list(levels(np.array([3.45e-4, 3.453e-4, 4.88e-4, np.nan, 4.883e-4]))) == [0, 0, 1, -1, 1]


def test_a_dense_row_of_values_is_many_levels():
    found = levels(np.geomspace(1e9, 2e9, 100))
    assert found.max() + 1 == pytest.approx(np.log(2) / np.log(1.02), abs=3) and np.bincount(found).max() <= 3


def test_checkpoints_of_runs_are_cells_of_about_equal_tokens():
    steps = np.arange(100, 201)
    rows = [(lr, tied, k * 1e7) for lr, tied in ((1e-3, 1e8), (2e-3, 1e8), (4e-3, 2e8)) for k in steps]
    lr, total, tokens = np.array(rows).T
    found = cells(table(lr=lr, total=total, tokens=tokens, loss=3 + 1e8 / tokens, batch_tokens=1e6), SIZE)
    assert len(found) > 30 and all("tokens" in cell.values for cell in found)


# bowls


def test_a_bowl_is_found_where_it_is():
    bowl = find_bowls(one_cell(np.arange(-8, -4, 0.5), np.arange(10.5, 14, 0.5)), SIZE)[0]
    assert (bowl.lr.value, bowl.batch_tokens.value) == pytest.approx((np.exp(-6), np.exp(12)), rel=1e-6)
    assert bowl.curvature == pytest.approx((0.012, -0.004, 0.018), rel=1e-5)
    assert bowl.loss == pytest.approx(3.0) and not bowl.censored


@pytest.mark.parametrize("axis", [0, 1])
def test_one_setting_alone_has_a_bowl_too(axis):
    names, best = ("lr", "batch_tokens"), (-6.0, 12.0)
    grid = [np.array([best[0]]), np.array([best[1]])]
    grid[axis] = best[axis] + np.arange(-1.2, 1.3, 0.5)
    bowl = find_bowls(one_cell(*grid), SIZE)[0]
    assert getattr(bowl, names[axis]).value == pytest.approx(np.exp(best[axis]))
    assert getattr(bowl, names[1 - axis]) is None


@pytest.mark.parametrize(("shift", "side"), [(1.3, "above"), (-1.3, "below")])
def test_an_optimum_beyond_the_grid_is_censored(shift, side):
    lr = -6 - shift + np.arange(-1.0, 1.1, 0.25)
    bowl = find_bowls(one_cell(lr, np.arange(10.5, 14, 0.5)), SIZE)[0]
    assert bowl.censored == {"lr": side} and not bowl.curvature
    edge = np.exp(lr.max() if side == "above" else lr.min())
    assert (bowl.lr.low, bowl.lr.high) == pytest.approx((edge, np.inf) if side == "above" else (0.0, edge))
    assert bowl.lr.low <= np.exp(-6) <= bowl.lr.high


def test_a_grid_too_small_for_a_bowl_tells_an_interval():
    bowl = find_bowls(one_cell(np.array([-7, -6.2, -5.0]), np.array([11.0, 12.1, 13.0])[:2]), SIZE)[0]
    assert not bowl.curvature and np.isnan(bowl.lr.error)
    assert (bowl.lr.low, bowl.lr.high) == pytest.approx((np.exp(-7), np.exp(-5)))
    assert bowl.censored == {"batch_tokens": "above"}


@pytest.mark.parametrize("change", [-0.05, -0.015, 0.015])
def test_a_stray_run_does_not_move_a_bowl(change):
    made = one_cell(np.arange(-8, -4, 0.5), np.arange(10.5, 14, 0.5))
    noise = 2e-4 * np.random.default_rng(0).standard_normal(len(made))
    z = np.log(made.frame[["lr", "batch_tokens"]].to_numpy())
    y = np.log(made.frame["loss"].to_numpy()) + noise
    stray = int(np.argmin(np.abs(z - [-5.5, 12.5]).sum(axis=1)))
    calm = fitted_bowl(z, y, 0.02)
    y[stray] += change
    found = fitted_bowl(z, y, 0.02)
    assert found.outliers >= calm.outliers
    assert found.vertex == pytest.approx(calm.vertex, abs=0.05)


def test_cubic_terms_take_the_bias_off_a_lopsided_bowl():
    made = ladder(0, **CALM | {"skew": 0.0015})
    found = {skew: find_bowls(made.table, SIZE, skew=skew) for skew in (True, False)}
    off = {skew: np.mean([np.log(bowl.lr.value) for bowl in bowls]) for skew, bowls in found.items()}
    truth = np.mean(np.log(made.lr))
    assert abs(off[True] - truth) < 0.02 < abs(off[False] - truth)


# laws


def test_censored_values_do_not_bias_a_regression():
    generator = np.random.default_rng(1)
    x = generator.uniform(-2, 2, 400)
    y = 1 + 0.5 * x + 0.5 * generator.standard_normal(400)
    seen = y < 1.5
    design, one = np.column_stack([np.ones(400), x]), np.ones((1, 400))
    low, high = np.where(seen, y, 1.5), np.where(seen, y, np.inf)
    found = censored_regression(design, low, high, np.ones(400), one)[0]
    cut = least_squares(design, np.minimum(y, 1.5), one)[0]
    assert found == pytest.approx([1, 0.5], abs=0.08)
    assert abs(cut[1] - 0.5) > 0.1


def test_values_known_to_an_interval_count_as_such():
    generator = np.random.default_rng(2)
    x = generator.uniform(-2, 2, 400)
    y = 1 + 0.5 * x + 0.2 * generator.standard_normal(400)
    design, one = np.column_stack([np.ones(400), x]), np.ones((1, 400))
    found = censored_regression(design, np.floor(2 * y) / 2, np.floor(2 * y) / 2 + 0.5, np.ones(400), one)[0]
    assert found == pytest.approx([1, 0.5], abs=0.04)


def test_clusters_are_drawn_as_a_whole():
    weights = cluster_weights(np.array([0, 0, 1, 1, 1]), 50, 0)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 2] == weights[:, 4]).all()
    assert (weights[:, 0] != weights[:, 2]).all()


@pytest.mark.parametrize("method", ["vertices", "surface"])
def test_every_method_finds_the_law_without_noise(method):
    made = ladder(0, **CALM)
    lr = fit_optima(made.table, "step_law_lr", size=SIZE, method=method, checks=False, replicates=20)
    batch = fit_optima(made.table, "step_law_batch", size=SIZE, method=method, checks=False, replicates=20)
    for fit, truth in ((lr, LR), (batch, BATCH)):
        assert {name: each.value for name, each in fit.parameters.items()} == pytest.approx(truth, rel=2e-3)
        assert fit.identified and fit.size == SIZE and fit.clusters == 20


def test_the_pooled_method_is_as_coarse_as_the_grid():
    made = ladder(0, **CALM)
    fit = fit_optima(made.table, "step_law_lr", size=SIZE, method="pooled", checks=False, replicates=20)
    assert fit.parameters["a"].value == pytest.approx(LR["a"], abs=0.1)
    assert len(fit.details["row_bootstrap"]["mean"]) == 3


def test_a_surface_uses_cells_whose_optimum_is_cut_off():
    made = ladder(3, **CALM | {"edges": 4})
    found = by_surface(cells(made.table, SIZE), find("step_law_lr"), find("step_law_batch"), SIZE, 20, 0)
    assert found.lr.coordinates[1:] == pytest.approx([LR["a"], LR["b"]], abs=2e-3)


def test_a_law_at_a_given_batch_has_the_batch_of_each_slice():
    """Along the valley of the bowl the best rate moves by -h12 / h11 in ln batch."""
    made = ladder(0, **CALM)
    fit = fit_optima(made.table, "batch_fixed_lr", size=SIZE, checks=False, replicates=20)
    assert fit.parameters["g"].value == pytest.approx(-CURVATURE[0, 1] / CURVATURE[0, 0], rel=0.01)
    assert fit.clusters == 20 and fit.rows > 100


def test_a_law_is_fitted_to_columns_that_are_named_at_run_time():
    made = ladder(0, **CALM)
    frame = made.table.frame.assign(hidden_size=np.sqrt(made.table.frame[SIZE]))
    fit = fit_optima(RunTable(frame), "lr = m * tokens^-a * hidden_size^-b", size=SIZE, checks=False, replicates=20)
    assert fit.parameters["a"].value == pytest.approx(-LR["b"], abs=1e-3)
    assert fit.parameters["b"].value == pytest.approx(-2 * LR["a"], abs=1e-3)
    with pytest.raises(ValueError, match="did you mean 'tokens'"):
        fit_optima(made.table, "lr = m * token^-a", size=SIZE)


@pytest.mark.parametrize(
    ("law", "options", "said"),
    [
        ("critical_batch_data", {}, "critical_batch"),
        ("step_law_lr", {"method": "magic"}, "'magic'"),
        ("step_lr", {}, "not known"),
    ],
)
def test_what_cannot_be_fitted_is_refused(law, options, said):
    with pytest.raises(ValueError, match=said):
        fit_optima(ladder(0, **CALM).table, law, size=SIZE, **options)


# verdicts


def codes(fit) -> dict[str, str]:
    return {each.code: each.level for each in fit.verdicts}


@pytest.mark.parametrize(
    ("made", "code", "level"),
    [
        ({"sizes": (1e8, 1.2e8, 1.4e8)}, "span", "failure"),
        ({"sizes": (1e8, 2e8, 4e8)}, "span", "warning"),
        ({"sizes": (1e8, 1e9), "tokens": (1e9, 1e10)}, "few_cells", "warning"),
        ({"edges": 14}, "edge", "failure"),
        ({"edges": 8}, "edge", "warning"),
    ],
)
def test_what_the_cells_cannot_tell_is_said(made, code, level):
    bowls = find_bowls(ladder(0, **{"edges": 0} | made).table, SIZE)
    fit = fit_optima(bowls, "step_law_lr", size=SIZE, replicates=50)
    assert codes(fit)[code] == level
    assert fit.identified == (level != "failure")


def test_inputs_that_move_together_are_told():
    made = ladder(0, sizes=(6e7, 1.2e8, 2.5e8, 5e8, 1e9), tokens=(1e9, 2e9, 4e9, 8e9, 1.6e10), edges=0)
    ratio = made.table.numbers("tokens") / made.table.numbers(SIZE)
    fit = fit_optima(made.table.where((ratio > 14) & (ratio < 18)), "step_law_lr", size=SIZE, checks=False)
    assert codes(fit)["condition"] == "failure"


def test_a_law_that_bends_is_told():
    made = ladder(0, **CALM | {"noise": 2e-4})
    frame = made.table.frame.copy()
    frame["lr"] *= np.exp(0.1 * np.log(frame["tokens"] / 1e10) ** 2)
    fit = fit_optima(RunTable(frame), "step_law_lr", size=SIZE, checks=False, replicates=50)
    assert codes(fit)["curvature"] == "warning"
    calm = fit_optima(made.table, "step_law_lr", size=SIZE, checks=False, replicates=50)
    assert "curvature" not in codes(calm)


def test_other_windows_and_methods_are_compared():
    fit = fit_optima(ladder(0).table, "step_law_lr", size=SIZE, replicates=50)
    assert set(fit.details["others"]["method"]) == {"pooled", "surface"}
    assert len(fit.details["others"]["window"]) == 2


@pytest.mark.parametrize("method", ["vertices", "pooled", "surface"])
@pytest.mark.parametrize(
    "columns",
    [
        {"lr": [1e-3]},
        {"lr": [1e-3, 2e-3], "loss": [np.nan, np.inf]},
        {"lr": [1e-3, 2e-3], "loss": [-1.0, -2.0]},
        {"lr": [np.inf, 0.0, -1.0]},
        {"lr": [1e-3] * 5},
        {"lr": [1e-3, 2e-3, 3e-3], "status": ["killed"] * 3},
    ],
)
def test_tables_that_tell_no_optimum_are_refused(columns, method):
    with pytest.raises(ValueError, match="optim"):
        fit_optima(table(**columns), "step_law_lr", size=SIZE, method=method)


def test_optima_that_all_lie_beyond_their_grids_identify_nothing():
    made = ladder(0, edges=20)
    fit = fit_optima(find_bowls(made.table, SIZE), "step_law_lr", size=SIZE, replicates=20)
    assert codes(fit)["edge"] == "failure" and np.isfinite(fit.coordinates).all()


def test_one_size_and_its_tokens_give_a_law_that_is_not_identified():
    made = ladder(0, sizes=(1e8,), edges=0)
    fit = fit_optima(find_bowls(made.table, SIZE), "step_law_lr", size=SIZE, replicates=20)
    assert not fit.identified and codes(fit)["condition"] == "failure"


# decisions


def made_fits(seed=0, **options):
    made = ladder(seed, **options)
    bowls = find_bowls(made.table, SIZE)
    return bowls, [fit_optima(bowls, law, size=SIZE, replicates=200) for law in ("step_law_lr", "step_law_batch")]


def test_a_decision_has_intervals_a_plateau_and_a_regret():
    bowls, fits = made_fits()
    found = decide({"N": 1e9, "D": 1e11}, fits, bowls)
    for name, truth in (("lr", best_lr(1e9, 1e11)), ("batch_tokens", best_batch(1e11))):
        assert found.proposal[name].low < truth < found.proposal[name].high
        assert found.plateau[name].low < found.proposal[name].value < found.plateau[name].high
    assert 0 < found.regret < 1e-3
    assert found.extrapolation == pytest.approx(1.0) and not found.verdicts


@pytest.mark.parametrize(
    ("times", "far", "level"), [(2, False, None), (5, False, "warning"), (20, False, "failure"), (20, True, "warning")]
)
def test_far_targets_are_refused_unless_asked_for(times, far, level):
    bowls, fits = made_fits()
    found = {each.code: each.level for each in decide({"N": 1e9, "D": times * 1e11}, fits, bowls, far=far).verdicts}
    assert found.get("extrapolation") == level


def test_a_given_batch_moves_the_rate_along_the_valley():
    bowls, fits = made_fits(**CALM)
    free = decide({"N": 5e8, "D": 3e10}, fits, bowls)
    batch = free.proposal["batch_tokens"].value
    held = decide({"N": 5e8, "D": 3e10, "batch_tokens": 4 * batch}, fits, bowls)
    assert held.proposal["batch_tokens"].value == 4 * batch
    assert held.proposal["lr"].value / free.proposal["lr"].value == pytest.approx(4 ** (1 / 3), rel=1e-3)


@pytest.mark.parametrize(("target", "said"), [({"N": 1e9}, "does not say D"), ({"N": -1.0, "D": 1e9}, "N = -1.0")])
def test_targets_that_say_too_little_are_refused(target, said):
    bowls, fits = made_fits()
    with pytest.raises(ValueError, match=said):
        decide(target, fits, bowls)


def test_the_plateau_costs_what_it_says():
    found = plateau(1e-3, 0.012, 1e-3)
    for end in (found.low, found.high):
        assert 0.012 * np.log(end / 1e-3) ** 2 / 2 == pytest.approx(1e-3)


def test_regret_is_measured_and_expected():
    made = one_cell(np.arange(-8, -4, 0.5), np.arange(10.5, 14, 0.5))
    (cell,) = cells(made, SIZE)
    at = (np.exp(-5.5), np.exp(12))
    truth = np.exp(0.012 * 0.25 / 2) - 1
    assert regret(cell, *at) == pytest.approx(truth)
    assert regret(cell, *at, "linear") == pytest.approx(truth)
    assert regret(cell, np.exp(-5.75), np.exp(12), "linear") == pytest.approx(truth / 2)
    assert np.isnan(regret(cell, 1.0, np.exp(12), "linear"))
    assert list(regrets([cell], [np.exp(-6)], [np.exp(12)])) == [0.0]
    off = np.random.default_rng(0).standard_normal((100_000, 2)) * [0.1, 0.2]
    assert expected_regret(off, CURVATURE) == pytest.approx((0.012 * 0.01 + 0.018 * 0.04) / 2, rel=0.02)


# stability


def test_the_largest_stable_rate_follows_the_runs_that_diverged():
    generator = np.random.default_rng(0)
    made = ladder(0, edges=0).table.frame.copy()
    largest = 3 * best_lr(made[SIZE], made["tokens"])
    lost = generator.random(len(made)) < 1 / (1 + (largest / made["lr"]) ** 10)
    made["status"] = np.where(lost, "diverged", "finished")
    made.loc[lost, "loss"] = np.nan
    fit = fit_stability(RunTable(made), SIZE)
    assert fit.parameters["a"].value == pytest.approx(LR["a"], abs=0.06)
    x = {"N": np.array([5e8]), "D": np.array([3e10]), "B": np.array([best_batch(3e10)])}
    assert fit.predict(x)[0] == pytest.approx(3 * best_lr(5e8, 3e10), rel=0.1)
    bowls, fits = made_fits()
    assert "stability" not in {each.code for each in decide({"N": 5e8, "D": 3e10}, fits, bowls, stability=fit).verdicts}
    risky = decide({"N": 5e8, "D": 3e10, "B": 30 * best_batch(3e10)}, fits, bowls, stability=fit)
    assert "stability" in {each.code for each in risky.verdicts}


def test_runs_that_all_finished_bound_no_rate():
    assert fit_stability(ladder(0).table, SIZE) is None
