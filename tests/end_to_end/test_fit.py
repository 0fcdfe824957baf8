"""The command fit: its exit codes, its files, whole or not at all; and published tables as they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from launch import fit, main
from scaling import laws_file
from scaling.report import figures, html
from tests.published import published

ROOT = Path(__file__).parents[2]
HEAD = "params,tokens,loss\n"


def write_losses(path: Path, ratio: float | None = None, **columns) -> Path:
    """A table of 25 runs of a Chinchilla truth; with `ratio` tokens are so many for each parameter."""
    random = np.random.default_rng(0)
    size, data = (each.ravel() for each in np.meshgrid(np.geomspace(5e7, 2e9, 5), np.geomspace(1e9, 1e11, 5)))
    data = data if ratio is None else ratio * size
    loss = (1.7 + 400 * size**-0.34 + 410 * data**-0.28) * np.exp(0.002 * random.standard_normal(len(size)))
    pd.DataFrame({"params": size, "tokens": data, "final": loss, **columns}).to_csv(path, index=False)
    return path


def run(*arguments: object) -> int:
    return fit.main([*map(str, arguments), "--replicates", "30"])


def files(folder: Path) -> set[str]:
    return {str(each.relative_to(folder)) for each in folder.rglob("*")}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp("fit")
    table = write_losses(folder / "runs.csv", name=[f"<b>bold</b> {row}" for row in range(25)])
    code = run(
        table, "--columns", "loss=final", "--law", "chinchilla", "--target", "N=3B,D=60B", "--out", folder / "out"
    )
    return code, folder


def test_a_table_becomes_laws_a_report_and_plots(results):
    code, folder = results
    assert code == 0
    assert files(folder) == {
        "runs.csv", "out", "out/laws.json", "out/report.html", "out/plots", "out/plots/losses.png",
        "out/plots/residuals.png", "out/plots/held_out.png", "out/plots/bootstrap.png",
    }  # fmt: skip
    found = laws_file.read(folder / "out" / "laws.json")
    assert found.best("loss").law == "chinchilla" and found.best("loss").rows == 25
    assert found.provenance["options"]["targets"] == [{"N": 3e9, "D": 6e10}]
    assert "chinchilla" in found.provenance["command"]
    assert found.decisions[0].proposal["loss"].value == pytest.approx(
        1.7 + 400 * 3e9**-0.34 + 410 * 6e10**-0.28, rel=0.02
    )
    page = (folder / "out" / "report.html").read_text()
    assert "<b>bold</b>" not in page and "&lt;b&gt;bold&lt;/b&gt;" in page


def test_earlier_results_are_replaced(results):
    _, folder = results
    before = (folder / "out" / "laws.json").read_text()
    code = run(folder / "runs.csv", "--columns", "loss=final", "--law", "chinchilla_tied", "--out", folder / "out")
    assert code == 0
    assert json.loads((folder / "out" / "laws.json").read_text())["fits"][0]["law"] == "chinchilla_tied"
    assert before != (folder / "out" / "laws.json").read_text()
    assert {each.name for each in folder.iterdir()} == {"runs.csv", "out"}


def test_results_are_written_whole_or_not_at_all(results, monkeypatch):
    _, folder = results
    before = files(folder), (folder / "out" / "laws.json").read_text()

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html, "page", fails)
    code = run(folder / "runs.csv", "--columns", "loss=final", "--law", "chinchilla", "--out", folder / "out")
    assert code == 2
    assert (files(folder), (folder / "out" / "laws.json").read_text()) == before


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["missing.csv"], "missing.csv"),
        (["runs.csv", "--law", "nonsense"], "nonsense"),
        (["runs.csv", "--law", "lr = m * tokens^-a"], "lr"),
        (["runs.csv", "--target", "N=7B"], "two of N, D and C"),
        (["runs.csv", "--target", "N=seven,D=1T"], "'seven' is not a number"),
        (["runs.csv", "--target", "N"], "NAME=VALUE"),
        (["runs.csv", "--columns", "loss=absent"], "absent"),
        (["runs.csv", "--size", "active"], "active"),
        (["runs.csv", "--replicates", "-1"], "--replicates -1"),
        (["runs.csv", "--out", "full"], "something else"),
        (["runs.csv", "--out", "runs.csv"], "it is a file"),
    ],
)
def test_bad_input_has_code_2_one_message_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_losses(tmp_path / "runs.csv")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    before = files(tmp_path)
    given = arguments if "--out" in arguments else [*arguments, "--out", "out"]
    given = given if "--columns" in given else [*given, "--columns", "loss=final"]
    assert fit.main(given) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0]
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    ["", "a\n", HEAD, f"{HEAD}1e8,1e9,nan\n1e8,2e9,inf\n", f"{HEAD}1e8,1e9,-3\n"],
    ids=["empty", "one cell", "no rows", "no finite loss", "negative loss"],
)  # fmt: skip
def test_tables_of_nothing_have_code_2(tmp_path, capsys, content):
    (tmp_path / "runs.csv").write_text(content)
    assert run(tmp_path / "runs.csv", "--out", tmp_path / "out") == 2
    assert "error: " in capsys.readouterr().err
    assert files(tmp_path) == {"runs.csv"}


def test_a_column_with_an_empty_name_is_left_out(tmp_path, capsys):
    table = write_losses(tmp_path / "runs.csv", status="failed")
    arguments = (table, "--columns", "loss=final", "--law", "chinchilla", "--out", tmp_path / "out")
    assert run(*arguments) == 2 and "killed" in capsys.readouterr().err
    assert run(*arguments[:3], "status=", *arguments[3:]) == 0


def test_a_law_that_is_not_identified_has_code_3_and_its_report(tmp_path, capsys):
    table = write_losses(tmp_path / "runs.csv", ratio=20)
    assert run(table, "--columns", "loss=final", "--law", "chinchilla", "--out", tmp_path / "out") == 3
    assert "not told by these runs: the law chinchilla" in capsys.readouterr().err
    assert "not identified" in (tmp_path / "out" / "report.html").read_text()
    assert not laws_file.read(tmp_path / "out" / "laws.json").best("loss").identified


def write_optima(path: Path, **columns) -> Path:
    """A table of 30 optima, or other measurements, without losses; columns are functions of N and D."""
    size, data = (each.ravel() for each in np.meshgrid(np.geomspace(5e7, 2e9, 6), np.geomspace(1e9, 1e11, 5)))
    frame = pd.DataFrame({"N": size, "D": data} | {name: of(size, data) for name, of in columns.items()})
    noise = np.exp(0.02 * np.random.default_rng(3).standard_normal((len(frame), len(columns))))
    frame[list(columns)] *= noise
    frame.to_csv(path, index=False)
    return path


RATE = {"lr": lambda n, d: 1.8 * n**-0.7 * d**0.3, "batch_tokens": lambda n, d: 0.6 * d**0.57}
MEASURED = {
    "rate": (RATE, "step_law_lr", {"a": -0.7, "b": 0.3}),
    "batch": (RATE, "step_law_batch", {"b": 0.57}),
    "critical batch": ({"CBS": lambda n, d: 20 * d**0.46}, "critical_batch_data", {"b": 0.46}),
    "timescale": ({"tau_epoch": lambda n, d: 1.08 * (d / n) ** -0.5}, "weight_decay_timescale", {"b": -0.5}),
    "timescale of its parts": (
        RATE | {"weight_decay": lambda n, d: 1 / 3 * (d / n) ** 0.5 * d**-0.73 * n**0.7},
        "weight_decay_timescale",
        {"b": -0.5},
    ),
}


@pytest.mark.parametrize("case", MEASURED)
def test_optima_and_measurements_need_no_losses(tmp_path, case):
    columns, law, truth = MEASURED[case]
    assert run(write_optima(tmp_path / "runs.csv", **columns), "--law", law, "--out", tmp_path / "out") == 0
    (found,) = laws_file.read(tmp_path / "out" / "laws.json").fits
    assert found.law == law and found.rows == 30
    for name, value in truth.items():
        assert found.parameters[name].value == pytest.approx(value, abs=0.02)


def test_the_critical_batch_is_a_law_of_measured_losses_too(tmp_path):
    columns = {
        "loss": lambda n, d: 1.7 + 4e4 * n**-0.5,
        "b_crit": lambda n, d: 2e8 * (1.7 + 4e4 * n**-0.5) ** (-1 / 0.21),
    }
    table = write_optima(tmp_path / "runs.csv", **columns)
    assert run(table, "--law", "critical_batch_loss", "--out", tmp_path / "out") == 0
    found = laws_file.read(tmp_path / "out" / "laws.json").best("critical_batch")
    assert found.parameters["alpha"].low < 0.21 < found.parameters["alpha"].high


def test_a_law_of_a_swept_timescale_is_of_the_best_runs(tmp_path):
    table = write_optima(tmp_path / "runs.csv", **RATE)
    at = np.tile(np.geomspace(0.25, 4, 5), 30)
    frame = pd.read_csv(table).loc[np.repeat(np.arange(30), 5)].reset_index(drop=True)
    frame["tau"] = at * 1.08 * (frame["D"] / frame["N"]) ** -0.5
    frame["weight_decay"] = frame["batch_tokens"] / (frame["lr"] * frame["D"] * frame.pop("tau"))
    frame["loss"] = (1.7 + 400 * frame["N"] ** -0.34 + 410 * frame["D"] ** -0.28) * (1 + 0.01 * np.log(at) ** 2)
    frame.to_csv(table, index=False)
    assert run(table, "--law", "weight_decay_timescale", "--out", tmp_path / "out") == 0
    found = laws_file.read(tmp_path / "out" / "laws.json").best("timescale")
    assert found.rows == 30 and found.parameters["c"].value == pytest.approx(1.08, rel=1e-3)
    assert found.parameters["b"].value == pytest.approx(-0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("law", "words"),
    [([], "no run has a loss"), (["--law", "chinchilla"], "no run has a loss"),
     (["--law", "critical_batch_loss"], "no run has a loss"), (["--law", "step_law_lr"], "no loss says which is")],
)  # fmt: skip
def test_rows_without_losses_that_are_no_optima_have_code_2(tmp_path, capsys, law, words):
    frame = pd.read_csv(write_optima(tmp_path / "runs.csv", **RATE))
    pd.concat([frame, frame.assign(lr=8 * frame["lr"])]).to_csv(tmp_path / "runs.csv", index=False)
    assert run(tmp_path / "runs.csv", *law, "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_sweep_of_rates_with_batches_unknown_is_fitted_though_runs_diverged(tmp_path):
    frame = pd.read_csv(swept(tmp_path / "runs.csv"))
    frame.drop(columns="batch_tokens").to_csv(tmp_path / "runs.csv", index=False)
    assert run(tmp_path / "runs.csv", "--law", "step_law_lr", "--out", tmp_path / "out") in (0, 3)
    assert laws_file.read(tmp_path / "out" / "laws.json").best("lr") is not None


def swept(path: Path, diverged: bool = True) -> Path:
    """Four cells over six rates, of which the highest diverged."""
    cells = [(size, data, lr) for size in (1e8, 4e8) for data in (2e9, 8e9) for lr in np.geomspace(1e-3, 3.2e-2, 6)]
    frame = pd.DataFrame(cells, columns=["params", "tokens", "lr"]).assign(batch_tokens=1e6)
    at = np.log(frame["lr"] / 0.006 * (frame["params"] / 1e8) ** 0.5)
    loss = (1.7 + 400 * frame["params"] ** -0.34 + 410 * frame["tokens"] ** -0.28) * np.exp(0.01 * at**2)
    frame["loss"] = loss.where((at < 1.2) | (not diverged), np.nan)
    frame["status"] = np.where(frame["loss"].isna(), "diverged", "finished")
    frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("law", ["max_lr = c * N^a", "stable_lr"])
@pytest.mark.parametrize("diverged", [True, False])
def test_a_law_of_the_stable_rate_is_fitted_or_said_to_be_untold(tmp_path, capsys, law, diverged):
    code = run(swept(tmp_path / "runs.csv", diverged), "--law", law, "--out", tmp_path / "out")
    fitted = [each for each in laws_file.read(tmp_path / "out" / "laws.json").fits if each.quantity == "max_lr"]
    said = [each for each in capsys.readouterr().err.splitlines() if each.startswith("not told by these runs: ")]
    if diverged:
        assert code == 0 and [each.law for each in fitted] == [law] and not said
        assert fitted[0].parameters["a"].high < 0
    else:
        assert (
            code == 3
            and not fitted
            and said
            == [f"not told by these runs: the law {law}: of the runs that tell a rate none diverged, or all did"]
        )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss", [2.5, 1e300])
def test_losses_that_tell_nothing_are_fitted_without_a_word_of_numpy(tmp_path, loss):
    frame = pd.read_csv(write_losses(tmp_path / "runs.csv")).assign(final=loss)
    frame.to_csv(tmp_path / "runs.csv", index=False)
    run(tmp_path / "runs.csv", "--columns", "loss=final", "--out", tmp_path / "out")
    assert not laws_file.read(tmp_path / "out" / "laws.json").best("loss").identified


@pytest.mark.parametrize("content", ["1e8,1e9,3\n", ",,3\n,,2.9\n"], ids=["one point", "no size or tokens"])
def test_where_no_law_has_a_fit_the_code_is_3(tmp_path, capsys, content):
    (tmp_path / "runs.csv").write_text(HEAD + content)
    assert run(tmp_path / "runs.csv", "--out", tmp_path / "out") == 3
    assert "not told by these runs: any law, as none has a fit: " in capsys.readouterr().err
    assert laws_file.read(tmp_path / "out" / "laws.json").fits == ()


def test_a_law_of_the_rate_that_runs_do_not_tell_has_code_3_where_it_was_asked_for(tmp_path, capsys):
    table = write_losses(tmp_path / "runs.csv", lr=np.geomspace(1e-3, 1e-2, 25))
    frame = pd.read_csv(table)  # swept, but in too few cells for the law's three coordinates
    swept = [frame.iloc[[0, 24]].assign(lr=lr, final=2.5 + (np.log(lr) + 6) ** 2) for lr in np.geomspace(1e-3, 6e-3, 6)]
    pd.concat(swept).to_csv(table, index=False)
    options = [table, "--columns", "loss=final", "--out", tmp_path / "out"]
    assert run(*options, "--law", "step_law_lr") == 3
    said = [each for each in capsys.readouterr().err.splitlines() if each.startswith("not told by these runs: ")]
    assert len(said) == 1 and "the law step_law_lr" in said[0] and "2 cells cannot tell 3 coordinates" in said[0]
    assert run(*options) == 3
    assert "any law, as none has a fit: " in capsys.readouterr().err


def test_a_target_too_far_has_code_3_and_with_far_0(tmp_path):
    table = write_losses(tmp_path / "runs.csv")
    options = [table, "--columns", "loss=final", "--law", "chinchilla_tied", "--target", "C=1e23"]
    assert run(*options, "--out", tmp_path / "near") == 3
    assert run(*options, "--out", tmp_path / "far", "--far") == 0
    assert laws_file.read(tmp_path / "near" / "laws.json").decisions[0].proposal == {}
    assert "N" in laws_file.read(tmp_path / "far" / "laws.json").decisions[0].proposal


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    table = write_losses(tmp_path / "runs.csv")
    for name in ("one", "two"):
        assert run(table, "--columns", "loss=final", "--law", "chinchilla", "--out", tmp_path / name) == 0
    one, two = (json.loads((tmp_path / name / "laws.json").read_text()) for name in ("one", "two"))
    assert one["fits"] == two["fits"]


@pytest.mark.parametrize("text, value", [("7B", 7e9), ("1.4T", 1.4e12), ("1e21", 1e21), ("2_000", 2000.0)])
def test_amounts_are_read_with_their_unit(text, value):
    assert fit.target(f"C={text}") == {"C": value}


def test_the_verb_is_known_and_its_help_is_light():
    assert "fit" in main.VERBS
    command = "import sys; from launch import fit; fit.parser().format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"numpy", "pandas", "scipy", "matplotlib", "torch"} & set(loaded.stdout.split())


PUBLISHED = {
    "chinchilla": ("chinchilla_epoch/svg_extracted_data.csv", ["--law", "chinchilla"], {"loss"}),
    "farseer": ("scalebench/farseer_train.parquet", ["--law", "chinchilla", "farseer"], {"loss"}),
    "streams": (
        "parscale/parscale_42B_losses.csv",
        ["--columns", "loss=loss_pile", "--set", "tokens=42B", "--law", "parscale"],
        {"loss"},
    ),
    "grid": ("scalebench/lr_bsz_train.parquet", ["--set", "seq_len=2048"], {"loss", "lr", "batch_tokens"}),
    "step law": ("steplaw/dense_lr_bs_loss.csv", ["--set", "seq_len=2048"], {"loss", "lr", "batch_tokens"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables_are_fitted_as_they_are(tmp_path, name):
    table, options, quantities = PUBLISHED[name]
    assert run(published(table), *options, "--out", tmp_path / "out") in (0, 3)
    found = laws_file.read(tmp_path / "out" / "laws.json")
    assert quantities <= {fit.quantity for fit in found.fits}
    assert (
        {"losses.png", "residuals.png"}
        <= set(os.listdir(tmp_path / "out" / "plots"))
        <= {f"{each}.png" for each in figures.PLOTS}
    )
