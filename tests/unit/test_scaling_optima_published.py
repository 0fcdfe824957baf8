"""Step Law's tables: its procedure gives its numbers, and its published laws cost what they were said to."""

import numpy as np
import pandas as pd
import pytest

from scaling.laws import find
from scaling.optima import cells, find_bowls, fit_optima, regrets
from scaling.optima.cells import inputs
from scaling.optima.pooled import near_optimal, row_bootstrap
from scaling.optima.surface import by_surface
from scaling.optima.vertices import by_vertices, optima
from scaling.table import RunTable, tidy
from tests.published import published

SIZE = "non_embedding"
SEQ_LEN = 2048
LR, BATCH = find("step_law_lr"), find("step_law_batch")


@pytest.fixture(scope="module")
def scalebench() -> RunTable:
    """41 cells, 60M to 1.07B parameters; the 42nd, 1.07B x 100B tokens, is in its test split, which is not here."""
    frame = pd.read_parquet(published("scalebench/lr_bsz_train.parquet"))
    return RunTable(
        tidy(
            pd.DataFrame(
                {
                    SIZE: frame["non_embedding_param_size"],
                    "tokens": frame["data_size"],
                    "lr": frame["lr"],
                    "batch_tokens": frame["bsz"] * SEQ_LEN,
                    "loss": frame["lm_loss"],
                }
            )
        )
    )


@pytest.fixture(scope="module")
def steplaw() -> RunTable:
    """17 cells, 215M to 1.07B."""
    frame = pd.read_csv(published("steplaw/dense_lr_bs_loss.csv"))
    return RunTable(
        tidy(
            pd.DataFrame(
                {
                    SIZE: frame["N"],
                    "tokens": frame["D"],
                    "lr": frame["lr"],
                    "batch_tokens": frame["bs"] * SEQ_LEN,
                    "hidden_size": frame["h"],
                    "steps": frame["ti"],
                    "loss": frame["smooth loss"],
                }
            )
        )
    )


def test_step_laws_procedure_gives_its_exponents(scalebench):
    """T4. The rate's exponents within 0.004 of the 42 cells' bootstrap means.

    The batch's own tolerance cannot be met without the largest cell: 41 cells give 0.581 where 42 give 0.571.
    """
    found = near_optimal(cells(scalebench, SIZE), "lr")
    assert len(found.lr) == 231
    lr = row_bootstrap(found, LR, SIZE).mean(axis=0)
    assert lr[1] == pytest.approx(-0.7095, abs=0.004) and lr[2] == pytest.approx(0.3069, abs=0.004)
    fit = fit_optima(scalebench, LR, size=SIZE, method="pooled", checks=False, replicates=100)
    assert fit.parameters["a"].value == pytest.approx(-0.7099, abs=0.002)
    assert fit.parameters["b"].value == pytest.approx(0.3079, abs=0.002)
    batch = fit_optima(scalebench, BATCH, size=SIZE, method="pooled", checks=False, replicates=100).parameters["b"]
    assert batch.value == pytest.approx(0.5812, abs=1e-4)
    assert batch.low < 0.5704 < batch.high


def proposed(table, law, values):
    law = find(law)
    x = inputs(law, [each.values for each in cells(table, SIZE)], SIZE)
    return np.exp(law.log_value(law.coordinates(values)[None], x)[0])


def test_published_laws_cost_what_was_found(scalebench):
    """T5, less the 42nd cell, whose regret is known: 0.098 % of 42 with one of 0 is 0.1004 % of 41."""
    grid = cells(scalebench, SIZE)
    lr = proposed(scalebench, "step_law_lr", {"c": 1.79, "a": -0.713, "b": 0.307})
    batch = proposed(scalebench, "step_law_batch", {"c": 0.58, "b": 0.571})
    assert regrets(grid, lr, batch).mean() == pytest.approx(0.00098 * 42 / 41, abs=5e-5)
    linear = regrets(grid, lr, batch, "linear")
    assert linear.mean() == pytest.approx((0.00122 * 42 - 0.00069) / 41, abs=2e-5)
    lr = proposed(scalebench, "deepseek_lr", {"c": 0.3118, "a": -0.125})
    batch = proposed(scalebench, "deepseek_batch", {"c": 0.292, "a": 0.3271})
    linear = regrets(grid, lr, batch, "linear")
    assert np.isnan(linear).sum() == 1  # of one cell it is off the grid
    assert np.nanmean(linear) == pytest.approx(0.0084, abs=1e-4)


def test_the_narrow_table_gives_other_exponents_and_says_so(steplaw):
    """T6."""
    lr = fit_optima(steplaw, LR, size=SIZE, method="pooled", checks=False, replicates=100)
    batch = fit_optima(steplaw, BATCH, size=SIZE, method="pooled", checks=False, replicates=100)
    assert lr.parameters["a"].value == pytest.approx(-0.7662, abs=1e-4)
    assert lr.parameters["b"].value == pytest.approx(0.1970, abs=1e-4)
    assert batch.parameters["b"].value == pytest.approx(0.6125, abs=1e-4)
    assert any(each.code == "span" and each.level != "ok" for each in lr.verdicts)


def test_quadratics_are_convex_in_every_cell(scalebench):
    """On runs within 2 %, as in the reference; one vertex lies beyond the grid."""
    bowls = find_bowls(scalebench, SIZE, skew=False)
    assert len(bowls) == 41
    assert sum(bool(bowl.curvature) for bowl in bowls) == 40
    (edge,) = [bowl for bowl in bowls if bowl.censored]
    assert edge.censored == {"batch_tokens": "above"}
    assert edge.cell["tokens"] == 1e11 and edge.cell[SIZE] == pytest.approx(268e6, rel=0.01)
    found = optima(bowls, "lr")
    lr = by_vertices(found, LR, SIZE, np.arange(41), 2, 0)
    assert lr.coordinates[1:] == pytest.approx([-0.685, 0.276], abs=0.01)
    found = optima(bowls, "batch_tokens")
    batch = by_vertices(found, BATCH, SIZE, np.arange(41), 2, 0)
    assert batch.coordinates[1] == pytest.approx(0.539, abs=0.02)


def test_laws_through_vertices_cost_as_little_as_the_published_one(scalebench):
    grid = cells(scalebench, SIZE)
    fits = [fit_optima(scalebench, law, size=SIZE, checks=False, replicates=2) for law in (LR, BATCH)]
    proposals = [fit.predict(inputs(find(fit.law), [each.values for each in grid], SIZE)) for fit in fits]
    assert regrets(grid, *proposals).mean() < 0.0011


def test_a_surface_of_one_curvature_moves_with_the_window(steplaw):
    """Reference: N exponents of -0.75 to -0.58 from windows of 0.5 to 3 %, with N among the batch's inputs too."""
    grid = cells(steplaw, SIZE)
    found = [
        by_surface(grid, LR, find("general_batch"), SIZE, 2, 0, window, shared=True).lr.coordinates
        for window in (0.01, 0.03)
    ]
    assert found[0][1] == pytest.approx(-0.70, abs=0.03)
    assert found[1][1] == pytest.approx(-0.58, abs=0.03)
    assert 0.10 < found[0][2] < 0.19
