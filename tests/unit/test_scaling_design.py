"""A belief about optima, and the design of the next runs: on synthetic truths, and replayed on the Step Law grid."""

from functools import cache
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from benchmarks.scaling_design import SPENDING, grid, replay
from scaling.design import belief, next_runs, of_one_training
from scaling.design.bowl import LOCAL, SHARED, Points, evaluate, linex, reach
from scaling.design.choice import design, target_factor
from scaling.design.proposals import worthwhile
from scaling.design.runs import read
from scaling.table import RunTable, tidy
from tests.published import published

TRUTH = {"c": -6.0, "a": -0.6, "b": 0.3, "c_B": 12.0, "a_B": 0.0, "b_B": 0.5}
SHAPE = {"ln_h_p": np.log(0.02), "ln_h_q": np.log(0.012), "r": 0.3, "k_p": 1.0, "k_q": 0.2}
CENTRE = np.log(1e8), np.log(4e9)
CELLS = [(5e7, 1e9), (5e7, 4e9), (1e8, 2e9), (1e8, 8e9), (2e8, 2e9), (2e8, 8e9)]
TARGET = (1.6e9, 6e10)


def features(N, D) -> tuple[np.ndarray, np.ndarray]:
    return np.log(np.atleast_1d(N)) - CENTRE[0], np.log(np.atleast_1d(D)) - CENTRE[1]


def true_optimum(N: float, D: float) -> tuple[float, float]:
    (n,), (d,) = features(N, D)
    t = TRUTH
    return np.exp(t["c"] + t["a"] * n + t["b"] * d), np.exp(t["c_B"] + t["a_B"] * n + t["b_B"] * d)


def true_excess(N, D, lr, batch_tokens) -> np.ndarray:
    shared = np.array([(TRUTH | SHAPE)[name] for name in SHARED])
    points = Points(*features(N, D), np.log(np.atleast_1d(lr)), np.log(np.atleast_1d(batch_tokens)))
    return evaluate(shared, np.zeros((len(points.n), len(LOCAL))), points)[0]


def measured(frame: pd.DataFrame, generator: np.random.Generator, noise: float = 0.001) -> pd.DataFrame:
    excess = true_excess(frame["non_embedding"], frame["tokens"], frame["lr"], frame["batch_tokens"])
    level = np.log(1.7 + 400 / frame["non_embedding"] ** 0.34 + 400 / frame["tokens"] ** 0.28)
    return frame.assign(loss=np.exp(level + excess + noise * generator.standard_normal(len(frame))))


def sweep(cells=CELLS, rates=(-1.4, -0.7, 0.0, 0.7, 1.4), batches=(-1.4, 0.0, 1.4)) -> pd.DataFrame:
    """Runs at these ln distances from the true optimum of each cell."""
    rows = []
    for N, D in cells:
        lr, batch = true_optimum(N, D)
        rows += [(N, D, lr * np.exp(u), batch * np.exp(v)) for u in rates for v in batches]
    return pd.DataFrame(rows, columns=["non_embedding", "tokens", "lr", "batch_tokens"])


@cache
def swept() -> pd.DataFrame:
    return measured(sweep(), np.random.default_rng(0))


@pytest.mark.parametrize("k", [-1.2, 1e-4, 0.4, 1.5])
def test_slopes_and_inverse_of_a_bowl_agree_with_its_values(k):
    z, step = np.linspace(-3, 3, 13), 1e-5
    value, slope, by_k = linex(z, k)
    np.testing.assert_allclose(slope, (linex(z + step, k)[0] - linex(z - step, k)[0]) / (2 * step), atol=1e-7)
    np.testing.assert_allclose(by_k, (linex(z, k + step)[0] - linex(z, k - step)[0]) / (2 * step), atol=1e-7)
    for side in (-1, 1):
        there = reach(np.array([0.01, 0.3]), k, side)
        assert np.all(there * side > 0)
        np.testing.assert_allclose(linex(there, k)[0], [0.01, 0.3], rtol=1e-3)
    assert value.min() == 0.0


def test_laws_and_optima_are_recovered_within_their_intervals():
    found = belief(swept(), "non_embedding")
    sd = np.sqrt(np.diag(found.covariance))
    for name in ("a", "b", "a_B", "b_B", "r"):
        at = SHARED.index(name)
        assert abs(found.mean[at] - (TRUTH | SHAPE)[name]) < 3 * sd[at], name
    assert (
        0.0004 < found.noise < 0.0015
    )  # the share of it that is given to misfit, which this truth has none of, is lost
    decision = found.decide(*TARGET)
    chosen = {name: decision.proposal[name].value for name in ("lr", "batch_tokens")}
    assert true_excess(*TARGET, chosen["lr"], chosen["batch_tokens"])[0] < 0.002
    for name, truth in zip(("lr", "batch_tokens"), true_optimum(*TARGET), strict=True):
        assert decision.proposal[name].low < truth < decision.proposal[name].high
        assert decision.plateau[name].low < decision.plateau[name].high
    assert [each.code for each in decision.verdicts] == ["extrapolation"]


def test_an_outlier_hardly_moves_a_decision():
    spoilt = swept().copy()
    spoilt.loc[7, "loss"] *= 1.3
    clean, moved = (belief(each, "non_embedding").decide(2e8, 8e9).proposal for each in (swept(), spoilt))
    for name in ("lr", "batch_tokens"):
        assert abs(np.log(moved[name].value / clean[name].value)) < 0.05


def test_expected_regret_is_the_mean_excess_over_the_posterior():
    N, D = (np.array([each]) for each in TARGET)
    known = belief(swept(), "non_embedding").including(N, D)
    (vertex,), (by,), ((h_p, h_q),) = known.optimum(N, D)
    r, k_p, k_q = known.shared[8:]
    decided = known.decide(*TARGET)
    at = np.log([decided.proposal[name].value for name in ("lr", "batch_tokens")])
    draws = np.random.default_rng(0).multivariate_normal(vertex, by @ known.covariance @ by.T, 200_000)
    q = at[1] - draws[:, 1]
    p = at[0] - draws[:, 0] - r * q
    regret = np.mean(h_p * linex(p, k_p)[0] + h_q * linex(q, k_q)[0])
    assert decided.regret == pytest.approx(regret, rel=0.03)


def test_conditioning_on_runs_is_the_posterior_of_a_linear_model():
    found = belief(swept(), "non_embedding")
    runs = read(sweep([(4e8, 8e9)]), "non_embedding")
    N, D = (np.array([each]) for each in TARGET)
    state = design(found, runs, N, D)
    for run in (0, 7, 11):
        state.condition(run)
    known = found.including(np.r_[N, runs.N], np.r_[D, runs.D])
    values, at, noise = known.sensitivities(runs)
    full = np.zeros((len(runs), len(known.mean)))
    np.put_along_axis(full, at, values, axis=1)
    chosen, sd = full[[0, 7, 11]], noise[[0, 7, 11]]
    exact = np.linalg.inv(np.linalg.inv(known.covariance) + chosen.T @ (chosen / sd[:, None] ** 2))
    factor = target_factor(known, N, D)
    assert state.regret == pytest.approx(np.trace(factor @ exact @ factor.T), rel=1e-6)


@pytest.mark.parametrize(("count", "budget"), [(1, 1e20), (6, 1e20), (50, 4e19), (3, 1e18)])
def test_count_and_budget_are_kept_and_every_run_is_new(count, budget):
    proposals = next_runs(swept(), "non_embedding", [TARGET], count=count, budget_flops=budget)
    assert 1 <= len(proposals) <= count
    assert sum(each.flops for each in proposals) <= budget
    settings = [(each.N, each.D, each.lr, each.batch_tokens) for each in proposals]
    assert len(set(settings)) == len(settings)
    for before, after in pairwise(proposals):
        assert after.regret_before == before.regret_after
    assert all(each.regret_after < each.regret_before for each in proposals)
    assert proposals == next_runs(swept(), "non_embedding", [TARGET], count=count, budget_flops=budget)


def test_nothing_is_proposed_where_nothing_is_affordable():
    assert next_runs(swept(), "non_embedding", [TARGET], count=4, budget_flops=1e15) == []


@pytest.mark.parametrize(
    ("regrets", "kept"),
    [([], 0), ([1, 0.999, 0.998], 0), ([1, 1, 0.5], 2), ([1, 0.5, 0.5, 0.499], 1), ([1, 0.9, 0.898, 0.88], 3)],
    ids=["none", "all for nothing", "a run that prepares", "nothing at the end", "little by little"],
)
def test_runs_end_where_the_rest_is_worth_nothing(regrets, kept):
    picked = [(index, *pair) for index, pair in enumerate(pairwise(regrets))]
    assert worthwhile(picked) == picked[:kept]


@pytest.mark.parametrize(
    ("rates", "side"), [((-2.8, -2.1, -1.4, -0.7), "lr above"), ((0.4, 0.8, 1.2, 1.6), "lr below")]
)
def test_a_grid_with_its_optimum_beyond_the_edge_is_extended_on_that_side(rates, side):
    table = measured(sweep(rates=rates), np.random.default_rng(1))
    found = belief(table, "non_embedding")
    assert all(side in beyond for beyond in found.edges().values())
    assert len(found.edges()) == len(CELLS)
    assert "edge" in [each.code for each in found.decide(*CELLS[0]).verdicts]
    proposals = next_runs(table, "non_embedding", CELLS, count=6, budget_flops=1e20)
    tried = table.groupby(["non_embedding", "tokens"])["lr"].agg(["min", "max"])
    inside = [each for each in proposals if (each.N, each.D) in tried.index]
    assert inside
    if side == "lr above":
        assert any(each.lr > tried.loc[(each.N, each.D), "max"] for each in inside)
    else:
        assert any(each.lr < tried.loc[(each.N, each.D), "min"] for each in inside)


def test_rounds_of_proposals_lower_the_true_regret():
    generator = np.random.default_rng(2)
    table = measured(sweep(CELLS[:2], rates=(-1.0, -0.5), batches=(0.5, 1.0)), generator)
    regrets = []
    for _ in range(4):
        found = belief(table, "non_embedding").decide(*TARGET)
        regrets.append(true_excess(*TARGET, *(found.proposal[name].value for name in ("lr", "batch_tokens")))[0])
        proposals = next_runs(table, "non_embedding", [TARGET], count=8, budget_flops=1.5e20)
        rows = pd.DataFrame([(each.N, each.D, each.lr, each.batch_tokens) for each in proposals])
        rows.columns = ["non_embedding", "tokens", "lr", "batch_tokens"]
        table = pd.concat([table, measured(rows, generator)], ignore_index=True)
    assert regrets[-1] < 0.003
    assert regrets[-1] < regrets[0] / 2


def test_proposals_and_decisions_keep_below_the_rates_that_diverged():
    table = swept().assign(status="finished")
    optimum = table[["non_embedding", "tokens"]].apply(lambda row: true_optimum(*row)[0], axis=1)
    high = table["lr"] > 1.5 * optimum
    table.loc[high, "status"] = "diverged"
    found = belief(table, "non_embedding")
    assert len(found.runs.where(found.runs.measured)) == int((~high).sum())
    limit = found.stable()
    assert np.isfinite(limit)
    proposals = next_runs(table, "non_embedding", [TARGET], count=8, budget_flops=1e20)
    frame = pd.DataFrame([(each.N, each.D, each.lr, each.batch_tokens) for each in proposals])
    frame.columns = ["non_embedding", "tokens", "lr", "batch_tokens"]
    assert (found.place(read(frame, "non_embedding"))[:, 0] <= limit + 1e-9).all()


def test_a_rate_above_the_frontier_is_not_decided():
    table = swept().assign(status="finished")
    optimum = table[["non_embedding", "tokens"]].apply(lambda row: true_optimum(*row)[0], axis=1)
    table.loc[table["lr"] > 0.9 * optimum, "status"] = "diverged"
    decision = belief(table, "non_embedding").decide(*CELLS[0])
    assert "frontier" in [each.code for each in decision.verdicts]
    assert decision.proposal["lr"].value < 0.9 * true_optimum(*CELLS[0])[0]


def test_one_diverged_run_among_many_that_finished_is_no_frontier():
    table = swept().assign(status="finished")
    table.loc[table["lr"].idxmin(), "status"] = "diverged"
    assert belief(table, "non_embedding").stable() == np.inf


def test_runs_that_are_running_count_as_made():
    first = next_runs(swept(), "non_embedding", [TARGET], count=3, budget_flops=1e20)
    made = pd.DataFrame([(each.N, each.D, each.lr, each.batch_tokens) for each in first])
    made.columns = ["non_embedding", "tokens", "lr", "batch_tokens"]
    table = pd.concat([swept().assign(status="finished"), made.assign(status="running")], ignore_index=True)
    second = next_runs(table, "non_embedding", [TARGET], count=3, budget_flops=1e20)
    assert second[0].regret_before == pytest.approx(first[-1].regret_after, rel=1e-3)
    assert not {(each.N, each.D, each.lr, each.batch_tokens) for each in first} & {
        (each.N, each.D, each.lr, each.batch_tokens) for each in second
    }


def test_tokens_that_differ_by_a_batch_are_one_cell():
    table = swept()
    table = table.assign(tokens=table["tokens"] * (1 + 0.001 * np.arange(len(table)) / len(table)))
    assert len(belief(table, "non_embedding").N) == len(CELLS)


def test_of_one_size_and_length_the_runs_of_one_training_are_learnt_from():
    frame = swept().assign(weight_decay=0.1, schedule="cosine", status="finished")
    other = frame.iloc[: len(frame) // 2].assign(weight_decay=0.3, loss=lambda each: 1.1 * each["loss"])
    part = other.groupby(["non_embedding", "tokens"]).head(4)
    mixed = RunTable(tidy(pd.concat([part, frame], ignore_index=True)))
    assert of_one_training(mixed, "non_embedding").tolist() == [False] * len(part) + [True] * len(frame)
    assert of_one_training(RunTable(tidy(frame.drop(columns="weight_decay"))), "non_embedding").all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": [(-1.0, 1e9)]}, "targets"),
        ({"targets": []}, "targets"),
        ({"count": 0}, "count 0"),
        ({"budget_flops": float("nan")}, "budget_flops"),
        ({"table": pd.DataFrame({"lr": [1e-3]})}, "missing"),
        ({"table": sweep()}, "no finished run"),
    ],
)
def test_bad_input_is_named(change, message):
    asked = {"table": swept(), "size": "non_embedding", "targets": [TARGET], "count": 2, "budget_flops": 1e20} | change
    with pytest.raises(ValueError, match=message):
        next_runs(**asked)


def test_the_step_law_grid_is_decided_within_a_fifth_of_a_percent():
    runs = grid(published("scalebench/lr_bsz_train.parquet"))
    larger = replay(runs, "larger", "regret", 0, SPENDING[:6]).iloc[-1]
    assert larger["spent"] <= SPENDING[5]
    assert larger[["nearest", "linear"]].max() < 0.002
    whole = replay(runs, "larger", "cheapest first", 0, SPENDING[-1:]).iloc[-1]
    assert whole[["nearest", "linear", "laws"]].max() < 0.002
