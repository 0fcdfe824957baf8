"""Published laws by name: their values at points worked out by hand, their spread, and tables they were fitted to."""

import math

import numpy as np
import pandas as pd
import pytest

from scaling.laws import find
from scaling.proposal import value_at
from scaling.published import PUBLISHED, published, quantities
from tests.published import published as published_table

RUN = {"non_embedding": 1e9, "total": 1.2e9, "tokens": 1e11, "flops": 9e20, "flops_without_head": 6e20, "loss": 2.0}
BY_HAND = {
    ("step-law", "lr"): 1.79 * 1e9**-0.713 * 1e11**0.307,
    ("step-law", "batch_tokens"): 0.58 * 1e11**0.571,
    ("deepseek", "lr"): 0.3118 * 6e20**-0.125,
    ("deepseek", "batch_tokens"): 0.292 * 6e20**0.3271,
    ("kaplan", "lr"): 0.003239 - 0.0001395 * math.log(1e9),
    ("kaplan", "loss"): ((6.4e13 / 1e9) ** (0.076 / 0.103) + 1.8e13 / 1e11) ** 0.103,
    ("kaplan", "critical_batch"): 2e8 * 2.0 ** (-1 / 0.21),
    ("chinchilla", "loss"): 1.69 + 406.4 / 1.2e9**0.34 + 410.7 / 1e11**0.28,
    ("chinchilla-epoch", "loss"): 1.8172 + 482.01 / 1.2e9**0.3478 + 2085.43 / 1e11**0.3658,
    ("porian", "lr"): 3.7 * 1e9**-0.36,
    ("porian", "batch_tokens"): 0.7576 * 1e9**0.703,
    ("farseer", "loss"): math.exp(-0.062465 * 1e9**0.13 + 0.128488)
    + math.exp(230.734 * 1e9**-0.1729 - 1.5442) * 1e11 ** -math.exp(-1.66563 * 1e9**0.0459 + 3.13335),
    ("power-lines", "timescale"): 1.084 * (1e11 / 1.2e9) ** -0.527,
}
CASES = [(name, quantity) for name, known in PUBLISHED.items() for quantity in known]


@pytest.mark.parametrize(("name", "quantity"), CASES)
def test_a_law_has_the_value_that_its_formula_gives_by_hand(name, quantity):
    assert value_at(published(name, quantity), RUN).value == pytest.approx(BY_HAND[name, quantity], rel=1e-9)


@pytest.mark.parametrize(
    ("parameters", "tokens", "lr", "batch_tokens"), [(1e9, 2e10, 9.96023e-4, 441_892), (1e8, 2e9, 2.536701e-3, 118_663)]
)
def test_step_law_has_its_published_values(parameters, tokens, lr, batch_tokens):
    run = {"non_embedding": parameters, "tokens": tokens}
    found = {quantity: value_at(published("step-law", quantity), run).value for quantity in ("lr", "batch_tokens")}
    assert found["lr"] == pytest.approx(lr, rel=1e-6) and round(found["batch_tokens"]) == batch_tokens


@pytest.mark.parametrize(("name", "quantity"), CASES)
def test_a_law_says_where_it_is_from_and_what_its_symbols_mean(name, quantity):
    fit = published(name, quantity)
    assert "arXiv" in fit.details["source"] and fit.details["formula"] and fit.details["compute"]
    assert fit.size in ("total", "non_embedding") and fit.quantity == quantity and fit.identified
    assert all(low < high for low, high in fit.spans.values())
    assert set(fit.spans) <= {*find(fit.law).inputs, "N", "D", "C"}


def test_step_law_is_surest_at_the_centre_of_its_runs():
    fit = published("step-law", "lr")

    def spread(n, d):
        return np.log(fit.predictions({"N": np.array([n]), "D": np.array([d])})).std()

    assert spread(3.56e8, 1.68e10) == pytest.approx(0.026, rel=0.1)
    assert spread(1e12, 1e13) > 5 * spread(3.56e8, 1.68e10)
    assert fit.draws[:, 1].std() == pytest.approx(0.042, rel=0.1)
    assert fit.draws.mean(axis=0) == pytest.approx(fit.coordinates, abs=0.1)


def test_published_errors_are_intervals_and_unknown_ones_are_infinite():
    beta = published("chinchilla-epoch", "loss").parameters["beta"]
    assert (beta.low, beta.high) == pytest.approx((0.3658 - 1.96 * 0.0206, 0.3658 + 1.96 * 0.0206))
    assert published("chinchilla", "loss").parameters["beta"].high == math.inf


def test_kaplan_s_rate_ends_where_it_is_zero():
    with pytest.raises(ValueError, match="law 'kaplan_lr' has no value at N = 1e\\+11"):
        value_at(published("kaplan", "lr"), {"non_embedding": 1e11})


def test_what_is_not_published_is_named_with_what_is():
    with pytest.raises(ValueError, match="no published law is called 'bjorck'; accepted: step-law, deepseek"):
        quantities("bjorck")
    with pytest.raises(ValueError, match="'step-law' has no law of loss, but of lr, batch_tokens; loss is of: kaplan"):
        published("step-law", "loss")


def test_farseer_predicts_the_runs_it_was_fitted_to():
    runs = pd.read_parquet(published_table("scalebench/farseer_train.parquet"))
    told = published("farseer", "loss").predict({"N": runs.N.to_numpy(), "D": runs.D.to_numpy()})
    assert np.abs(told / runs.loss - 1).mean() == pytest.approx(0.00226, abs=5e-5)


def test_chinchilla_s_rounded_constants_have_the_known_misfit_to_its_runs():
    runs = pd.read_csv(published_table("chinchilla_epoch/svg_extracted_data.csv"))
    n, compute = runs["Model Size"].to_numpy(), runs["Training FLOP"].to_numpy()
    kept = runs.loss < np.sort(runs.loss)[-5]
    told = published("chinchilla", "loss").predict({"N": n, "D": compute / 6 / n})
    off = np.abs(np.log(told) - np.log(runs.loss))[kept]
    huber = np.where(off <= 1e-3, off**2 / 2, 1e-3 * (off - 5e-4)).sum()
    assert huber == pytest.approx(0.00412101, rel=2e-3)


def test_step_law_loses_little_on_the_grid_it_was_fitted_to():
    runs = pd.read_parquet(published_table("scalebench/lr_bsz_train.parquet"))
    regrets = []
    for (n, d), cell in runs.groupby(["non_embedding_param_size", "data_size"]):
        known = {"non_embedding": n, "tokens": d}
        lr, batch = (value_at(published("step-law", each), known).value for each in ("lr", "batch_tokens"))
        apart = np.log(cell.lr / lr) ** 2 + np.log(cell.bsz * 2048 / batch) ** 2
        regrets.append(cell.lm_loss[apart.idxmin()] / cell.lm_loss.min() - 1)
    assert np.mean(regrets) == pytest.approx(0.00098, abs=3e-4)
