"""From a table to an analysis: a known truth comes back, what is asked for is used, and what cannot be told is said."""

import numpy as np
import pandas as pd
import pytest

from scaling import decisions
from scaling.analysis import analyse, best_of_cells, constants
from scaling.clusters import clusters_of
from scaling.laws import find
from scaling.results import Analysis
from scaling.table import RunTable, tidy
from tests import analyses

TARGET = {"N": 3e9, "D": 4e11}


def losses(rows: int = 4, **columns) -> RunTable:
    """Runs of a Chinchilla truth over a square of N and D, without learning rates."""
    random = np.random.default_rng(1)
    size, data = (each.ravel() for each in np.meshgrid(np.geomspace(5e7, 2e9, rows), np.geomspace(1e9, 1e11, rows)))
    loss = (1.7 + 400 * size**-0.34 + 410 * data**-0.28) * np.exp(0.001 * random.standard_normal(len(size)))
    frame = pd.DataFrame({"total": size, "tokens": data, "flops": 6 * size * data, "loss": loss, **columns})
    return RunTable(tidy(frame))


@pytest.fixture(scope="module")
def grid() -> Analysis:
    return analyse(
        analyses.table(), laws=["chinchilla"], targets=[TARGET, {"C": 1e22}, {"N": 7e10, "D": 1e13}], replicates=60
    )


def test_the_laws_of_a_known_grid_come_back(grid):
    rate, batch, loss = (grid.best(name) for name in ("lr", "batch_tokens", "loss"))
    assert rate.law == "step_law_lr"
    assert rate.parameters["a"].value == pytest.approx(-0.7, abs=0.05)
    assert rate.parameters["b"].value == pytest.approx(0.3, abs=0.05)
    assert batch.parameters["b"].value == pytest.approx(0.571, abs=0.08)
    x = {"N": np.array([3e9]), "D": np.array([4e11])}
    assert loss.predict(x)[0] == pytest.approx(1.7 + 400 * 3e9**-0.34 + 410 * 4e11**-0.28, rel=0.01)


def test_loss_laws_are_fitted_to_the_best_run_of_each_cell(grid):
    frame = grid.table.frame
    wanted = frame[grid.used].groupby(["non_embedding", "tokens"])["loss"].idxmin()
    assert sorted(grid.fitted) == sorted(wanted)
    assert grid.fits[0].rows == len(wanted) == 16


def test_runs_that_diverged_or_say_nothing_are_left_out_and_counted(grid):
    assert grid.used.sum() == len(grid.table) - 2
    assert "diverged" in {each.code for each in grid.gates}


def test_a_proposal_has_the_truth_in_its_interval_and_its_plateau(grid):
    found = grid.decisions[0]
    truth = {"lr": 1.8 * 3e9**-0.7 * 4e11**0.3, "batch_tokens": 0.58 * 4e11**0.571}
    for name, value in truth.items():
        assert found.proposal[name].low <= value <= found.proposal[name].high
        assert found.plateau[name].low <= value <= found.plateau[name].high
    assert 0 <= found.regret < 0.002
    assert found.extrapolation == pytest.approx(6 * 3e9 * 4e11 / np.nanmax(grid.table.numbers("flops")), rel=0.01)


def test_compute_alone_is_split_between_parameters_and_tokens(grid):
    found = grid.decisions[1].proposal
    size, data = found["N"].value, found["D"].value
    assert 6 * size * data == pytest.approx(1e22, rel=1e-3)
    share = (0.34 * 400 / (0.28 * 410)) ** (1 / 0.62) * (1e22 / 6) ** (0.28 / 0.62)
    assert size == pytest.approx(share, rel=0.6)
    assert found["N"].low < size < found["N"].high


def test_a_target_far_beyond_the_runs_is_refused_with_its_factor(grid):
    found = grid.decisions[2]
    assert found.proposal == {}
    assert found.extrapolation > 1000
    assert any(each.code == "extrapolation" and each.level == "failure" for each in found.verdicts)


def test_a_target_far_beyond_the_runs_is_proposed_with_a_warning_when_asked_for(grid):
    found = decisions.decide({"N": 7e10, "D": 1e13}, grid.fits, grid.bowls, far=True)
    assert {"lr", "batch_tokens", "loss"} <= set(found.proposal)
    assert {each.level for each in found.verdicts if each.code == "extrapolation"} == {"warning"}


@pytest.mark.parametrize(
    "target, words",
    [
        ({"N": 7e9}, "two of N, D and C"),
        ({"N": 7e9, "D": 1e12, "C": 1e22}, "two of them tell the third"),
        ({"C": -1.0}, "C = -1"),
        ({"C": float("nan")}, "C = nan"),
        ({}, "nothing"),
    ],
)
def test_a_target_that_says_too_little_or_too_much_is_refused(target, words):
    with pytest.raises(ValueError, match=words):
        analyse(losses(), targets=[target])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"laws": ["chinchila"]}, "chinchila"),
        ({"laws": ["lr = m * tokens^-a"]}, "needs lr"),
        ({"laws": ["loss = c * hidden_size^-a"]}, "hidden_size"),
        ({"size": "active"}, "active"),
        ({"loss_kind": "held-out"}, "held-out"),
    ],
)
def test_what_the_runs_do_not_have_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        analyse(losses(), replicates=0, **options)


def test_tokens_that_follow_parameters_leave_the_law_unidentified():
    table = losses()
    frame = table.frame.assign(tokens=20 * table.frame["total"])
    found = analyse(RunTable(tidy(frame)), laws=["chinchilla"], replicates=20)
    assert not found.best("loss").identified


ALIKE = {
    "size_only": ({"total": np.geomspace(1e7, 3e9, 12), "tokens": 1e10}, {"alpha": 0.34, "E": 1.7 + 410 * 1e10**-0.28}),
    "data_only": ({"total": 1e8, "tokens": np.geomspace(1e9, 3e11, 12)}, {"beta": 0.28, "E": 1.7 + 400 * 1e8**-0.34}),
}


@pytest.mark.parametrize("law", ALIKE)
def test_where_only_one_of_size_and_data_varies_the_other_is_in_the_floor(law):
    columns, truth = ALIKE[law]
    frame = pd.DataFrame(columns)
    noise = np.exp(5e-4 * np.random.default_rng(0).standard_normal(len(frame)))
    loss = (1.7 + 400 * frame["total"] ** -0.34 + 410 * frame["tokens"] ** -0.28) * noise
    size, tokens = float(frame["total"].max()), float(frame["tokens"].max())
    targets = [{"N": size, "D": tokens}, {"N": size / 2, "D": tokens / 2}, {"C": 6 * size * tokens}]
    found = analyse(RunTable(tidy(frame.assign(loss=loss))), targets=targets, replicates=60)
    fit = found.fits[0]
    assert fit.law == law and fit.identified and f"largest {find(law).inputs[0]}" in {h.split for h in found.held_out}
    assert [each.code for each in fit.verdicts if each.level == "warning"] == ["alike"]
    for name, value in truth.items():
        assert fit.parameters[name].low <= value <= fit.parameters[name].high
    assert found.decisions[0].proposal["loss"].value == pytest.approx(loss.min(), rel=5e-3)
    other, split = found.decisions[1:]
    assert "loss" not in other.proposal and "not_told" in {each.code for each in other.verdicts}
    assert not split.proposal


@pytest.mark.parametrize(("law", "column"), [("size_only", "tokens"), ("data_only", "total")])
def test_a_law_of_one_input_is_refused_where_the_other_varies_too(law, column):
    with pytest.raises(ValueError, match=f"law '{law}' is of runs of equal {column}"):
        analyse(losses(), laws=[law], replicates=0)


def test_one_run_gives_an_analysis_without_laws():
    found = analyse(losses().where(np.arange(16) == 3))
    assert found.fits == () and found.decisions == ()
    assert any(each.level != "ok" for each in found.gates)


def test_a_table_without_a_finished_run_is_refused():
    table = losses(status=["diverged"] * 16)
    with pytest.raises(ValueError, match="none of the 16 runs"):
        analyse(table)


def test_a_rate_that_does_not_vary_within_cells_is_taken_to_be_the_best():
    table = losses()
    rate = 2.0 * table.numbers("total") ** -0.6 * table.numbers("tokens") ** 0.2
    found = analyse(losses(lr=rate), laws=["chinchilla", "lr = m * total^-a * tokens^b"], replicates=20)
    law = found.best("lr")
    assert law.parameters["a"].value == pytest.approx(0.6, abs=0.01)
    assert law.identified and "taken_for_best" in {each.code for each in law.verdicts}


def test_of_a_cell_the_best_run_counts_and_of_repetitions_all():
    frame = pd.DataFrame({
        "total": [1e8] * 5, "tokens": [1e9] * 3 + [2e9] * 2, "lr": [1e-3, 2e-3, 4e-3, 1e-3, 1e-3],
        "loss": [3.1, 3.0, 3.2, 2.9, 2.91],
    })  # fmt: skip
    assert best_of_cells(RunTable(tidy(frame)), "total").tolist() == [False, True, False, True, True]


@pytest.mark.parametrize(
    ("column", "kept"),
    [("weight_decay", 1), ("warmup_tokens", 1), ("num_layers", 1), ("active", 2), ("streams", 2), ("unique_tokens", 2)],
)
def test_a_law_of_loss_is_of_the_best_training_of_each_model_and_data(column, kept):
    frame = pd.DataFrame({"total": 1e8, "tokens": 1e9, "lr": [1e-3, 2e-3] * 2, column: [4.0, 4.0, 8.0, 8.0],
                          "loss": [3.0, 3.1, 3.2, 3.3]})  # fmt: skip
    assert best_of_cells(RunTable(tidy(frame)), "total").sum() == kept


def test_what_all_runs_have_equal_holds_for_a_target_too():
    found = constants(losses(seq_len=2048.0, weight_decay=np.linspace(0, 0.1, 16), seed=1.0))
    assert found == {"seq_len": 2048.0}


def test_runs_that_go_on_from_one_ancestor_are_one_cluster():
    frame = pd.DataFrame(
        {"run": ["a", "b", "c", "d", "e"], "parent": [None, "a", "b", None, "gone"], "loss": [1.0] * 5}
    )
    found = clusters_of(RunTable(tidy(frame)))
    assert found.tolist() == [0, 0, 0, 1, 2]


def test_rows_of_one_name_are_one_run_only_if_they_are_of_one_size():
    frame = pd.DataFrame({"run": ["x"] * 4, "total": [1e8, 1e8, 2e8, 2e8], "tokens": [1e9, 2e9] * 2, "loss": [1.0] * 4})
    assert clusters_of(RunTable(tidy(frame))).tolist() == [0, 0, 1, 1]
