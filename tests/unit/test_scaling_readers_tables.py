"""Tables with one row a run: which column is which, and what follows from others."""

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from scaling.gates import select
from scaling.optima.cells import outcomes
from scaling.readers import read
from scaling.readers.losses import HELD_OUT, OTHER, PERPLEXITY, PLAIN, SMOOTHED, candidate, preferred
from tests.published import published
from tests.tables import columns, csv

TABLES = [
    (
        "chinchilla_epoch/svg_extracted_data.csv", {}, {}, 245,
        {"total": "Model Size", "flops": "Training FLOP", "loss": "loss", "tokens": "C / (6 N)"},
    ),
    (
        "steplaw/dense_lr_bs_loss.csv", {}, {}, 1911,
        {"loss": "smooth loss", "non_embedding": "N", "tokens": "D", "lr": "lr", "batch_sequences": "bs", "steps": "ti",
         "hidden_size": "h", "num_layers": "numl", "run": "exp_name", "batch_tokens": "batch_sequences * seq_len"},
    ),
    (
        "scalebench/lr_bsz_train.parquet", {}, {"seq_len": 2048}, 2702,
        {"loss": "lm_loss", "non_embedding": "non_embedding_param_size", "tokens": "data_size",
         "batch_sequences": "bsz"},
    ),
    ("scalebench/farseer_train.parquet", {}, {}, 404, {"loss": "loss", "non_embedding": "N", "tokens": "D"}),
    (
        "parscale/parscale_42B_losses.csv", {"loss": "loss_pile"}, {"tokens": "42B"}, 24,
        {"loss": "loss_pile", "non_embedding": "N_nonemb", "streams": "P", "tokens": "constant 42B"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "constants", "rows", "mapping"), TABLES, ids=[each[0] for each in TABLES])
def test_published_tables_read_as_they_are(name, given, constants, rows, mapping):
    table = read([published(name)], columns=given, constants=constants)
    assert len(table) == rows
    assert {ours: table.mapping.get(ours) for ours in mapping} == mapping
    assert np.isfinite(table.numbers("loss")).all() and (table.numbers("tokens") > 1e7).all()


def test_step_law_tells_its_sequence_length_by_its_steps():
    table = read([published("steplaw/dense_lr_bs_loss.csv")])
    assert set(table.numbers("seq_len")) == {2048.0}
    assert any("'smooth loss'; not taken: 'loss'" in note for note in table.notes)
    found = table.frame["loss_kind"].unique().tolist()
    assert found == ["training, smoothed (smooth loss)"]


def test_two_losses_of_one_kind_are_to_be_named():
    with pytest.raises(ValueError, match=r"loss_stack_v2_python, loss_pile"):
        read([published("parscale/parscale_42B_losses.csv")])


def test_a_batch_of_unknown_sequences_stays_unknown_and_says_so():
    table = read([published("scalebench/lr_bsz_train.parquet")])
    assert not table.has("batch_tokens") and any("batch_tokens stays unknown" in note for note in table.notes)


@pytest.mark.parametrize(
    ("name", "tier"),
    [
        ("loss", PLAIN), ("train/loss", PLAIN), ("lm loss", PLAIN), ("L", PLAIN), ("final_loss", PLAIN),
        ("val_loss", HELD_OUT), ("validation/loss", HELD_OUT), ("evalLoss", HELD_OUT), ("c4_val_loss", HELD_OUT),
        ("smooth loss", SMOOTHED), ("loss_smoothed", SMOOTHED), ("loss_pile", OTHER),
        ("loss_at_final_step", PLAIN), ("lossAtLastStep", PLAIN), ("val_loss_final_step", HELD_OUT),
        ("Final Train CE", OTHER), ("ce", PLAIN), ("test_ce", HELD_OUT),
        ("ppl", PERPLEXITY), ("ppl_val", PERPLEXITY), ("wikitext103_ppl", PERPLEXITY), ("c4/perplexity", PERPLEXITY),
        ("ppl_ratio", None), ("loss_step", None), ("final_step", None), ("loss_scale", None),
        ("aux_loss", None), ("loss_std", None), ("z_loss", None), ("l", None), ("lr", None),
    ],
)  # fmt: skip
def test_a_name_tells_what_loss_it_is(name, tier):
    found = candidate(name)
    assert (found and found.tier) == tier


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["loss", "smooth loss"], "smooth loss"), (["train_loss", "val_loss", "c4_val_loss"], "val_loss"),
        (["train_loss", "final_loss"], "final_loss"), (["loss_pile"], "loss_pile"), (["loss", "loss_pile"], "loss"),
        (["test_loss", "val_loss"], "val_loss"), (["train_ppl", "val_ppl"], "val_ppl"), (["loss", "ppl"], "loss"),
        (["a", "b"], None),
    ],
)  # fmt: skip
def test_the_preferred_loss(names, taken):
    loss, others = preferred(names)
    assert (loss and loss.name) == taken
    assert len(others) == max(len([each for each in names if candidate(each)]) - 1, 0)


@pytest.mark.parametrize(
    ("held_out", "taken"), [(3, "train_loss"), (4, "train_loss"), (5, "val_loss"), (10, "val_loss")]
)
def test_a_held_out_loss_of_less_than_half_of_the_rows_is_not_taken_and_told(tmp_path, held_out, taken):
    table = columns(tmp_path, N=[1e8] * 10, D=[1e9] * 10, lr=range(1, 11), train_loss=[3.0] * 10,
                    val_loss=[2.9] * held_out + [None] * (10 - held_out))  # fmt: skip
    assert table.mapping["loss"] == taken
    told = f"'val_loss' is known of {held_out} rows and 'train_loss' of 10, which is taken"
    assert any(told in note for note in table.notes) == (taken == "train_loss")


@pytest.mark.parametrize("names", [["pile_val_loss", "c4_val_loss"], ["loss_a", "loss_b"], ["a_ppl", "b_ppl"]])
def test_losses_that_only_their_data_tells_apart_are_not_guessed(names):
    with pytest.raises(ValueError, match=f"{names[0]}"):
        preferred(names)


@pytest.mark.parametrize(
    ("name", "values", "column", "expected"),
    [
        ("params_M", [70, 160], "total", [70e6, 160e6]),
        ("Params (B)", [0.07, 1.3], "total", [7e7, 1.3e9]),
        ("Model Size (M params)", [70, 160], "total", [70e6, 160e6]),
        ("params_in_millions", [70, 160], "total", [70e6, 160e6]),
        ("Train tokens (B tokens)", [20, 300], "tokens", [20e9, 300e9]),
        ("tokens in billions", [20, 300], "tokens", [20e9, 300e9]),
        ("model_size", ["70M", "1.3B"], "total", [70e6, 1.3e9]),
        ("non-embedding params", ["1,000,000", "2_000_000"], "non_embedding", [1e6, 2e6]),
        ("config.optim.lr", [1e-3, 2e-3], "lr", [1e-3, 2e-3]),
        ("dense_parameter_count", [1e8, 2e8], "total", [1e8, 2e8]),
        ("total_parameter_count", [1e8, 2e8], "total", [1e8, 2e8]),
        ("N_w_emb", [1e8, 2e8], "total", [1e8, 2e8]),
        ("$N$", [1e8, 2e8], "non_embedding", [1e8, 2e8]),
        ("param", [1e8, 2e8], "total", [1e8, 2e8]),
        ("D_tokens_B", [20, 300], "tokens", [20e9, 300e9]),
        ("Pretraining Data Size (T)", [2.0, 1.4], "tokens", [2e12, 1.4e12]),
        ("train_toks", [2e10, 3e11], "tokens", [2e10, 3e11]),
        ("Training FLOPs (1e21)", [0.5, 2.0], "flops", [5e20, 2e21]),
        ("FLOPs (x10^18)", [0.5, 2.0], "flops", [5e17, 2e18]),
        ("EFLOPs", [0.5, 2.0], "flops", [5e17, 2e18]),
        ("total train ZFLOPs", [0.5, 2.0], "flops", [5e20, 2e21]),
        ("throughput/total_gflops", [3e10, 1e12], "flops", [3e19, 1e21]),
        ("gbsz", [512, 1024], "batch_sequences", [512, 1024]),
        ("peak_lr", [1e-3, 2e-3], "lr", [1e-3, 2e-3]),
        ("batch_size", [524288, 1048576], "batch_tokens", [524288, 1048576]),
        ("compute_pf_days", [1.0, 2.0], "flops", [8.64e19, 17.28e19]),
    ],
)
def test_names_and_units_are_understood(tmp_path, name, values, column, expected):
    base = {"D": [1e10, 2e10], "loss": [3.0, 2.9]} if column != "tokens" else {"loss": [3.0, 2.9]}
    table = columns(tmp_path, **{name: values}, **base)
    assert table.numbers(column) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["TFLOPs", "gflops", "TFLOP/s/GPU", "tokens_evaluated"])
def test_what_is_of_a_second_or_of_an_evaluation_is_not_the_runs(tmp_path, name):
    table = columns(tmp_path, **{name: [3.5e5, 3.6e5]}, params=[1e8, 2e8], loss=[3.0, 2.9])
    assert not table.has("flops") and not table.has("tokens")


@pytest.mark.parametrize("name", ["tokens/param", "token_param_ratio", "Tokens per parameter"])
def test_a_ratio_of_any_name_tells_tokens(tmp_path, name):
    table = columns(tmp_path, **{"params": [1e8, 2e8], name: [20, 40], "loss": [3.0, 2.9]})
    assert table.numbers("tokens").tolist() == [2e9, 8e9]


@pytest.mark.parametrize("other", ["N_no_emb", "non-embedding params"])
def test_n_is_all_parameters_beside_those_without_embeddings(tmp_path, other):
    table = columns(tmp_path, **{"N": [1e8, 2e8], other: [8e7, 1.7e8]}, D=[1e9, 2e9], loss=[3.0, 2.9])
    assert (table.mapping["total"], table.mapping["non_embedding"]) == ("N", other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"params": [0.07, 1.3], "D": [1e9, 2e9]}, r"'params' lies about .*total=\"params \* 1e9\""),
        ({"N": [1e8, 2e8], "D": [1.0, 20.0]}, r"'D' lies about"),
        ({"params_M": [7e7, 1.3e9], "D": [1e9, 2e9]}, "no unit"),
    ],
)
def test_a_unit_that_is_not_certain_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        columns(tmp_path, **values, loss=[3.0, 2.9])


@pytest.mark.parametrize(("d", "origin"), [([1024, 2048], "C / (6 N)"), ([2e10, 4e10], "d")], ids=["a width", "tokens"])
def test_a_small_d_is_tokens_where_it_can_be(tmp_path, d, origin):
    table = columns(tmp_path, N=[1e8, 2e8], d=d, C=[6e18, 12e18], loss=[3.0, 2.9])
    assert table.mapping["tokens"] == origin
    assert table.numbers("tokens").tolist() == ([1e10, 1e10] if d[0] < 1e6 else d)


@pytest.mark.parametrize(
    ("names", "run"),
    [
        (["x", "x", "x", "y", "y", "y"], None),
        (["x", "y", "z", "x", "y", "z"], "experiment"),
        (["a", "b", "c", "d", "e", "f"], "experiment"),
    ],
    ids=["of several sizes", "of one size each", "of one run each"],
)
def test_a_name_of_runs_of_several_sizes_is_no_name_of_a_run(tmp_path, names, run):
    table = columns(tmp_path, experiment=names, N=[1e8, 2e8, 4e8] * 2, D=[1e9] * 3 + [2e9] * 3, loss=[3.0] * 6)
    assert table.mapping.get("run") == run and table.frame["run"].nunique() == (6 if run is None else len(set(names)))
    assert ("experiment" in table.frame) == any("'experiment' names" in note for note in table.notes) == (run is None)


def test_another_name_is_taken_then(tmp_path):
    table = columns(tmp_path, name=["x"] * 2, id=["a", "b"], N=[1e8, 2e8], D=[1e9] * 2, loss=[3.0] * 2)
    assert table.frame["run"].tolist() == ["a", "b"]


def test_a_mapping_overrides_and_scales(tmp_path):
    path = csv(tmp_path, "size,D,loss,other\n0.07,1e9,3,2.5\n1.3,2e9,2.9,2.4\n")
    table = read([path], columns={"active": "size * 1e9", "total": "", "loss": "other"})
    assert table.numbers("active").tolist() == pytest.approx([7e7, 1.3e9]) and not table.has("total")
    assert table.numbers("loss").tolist() == [2.5, 2.4] and table.mapping["active"] == "size * 1e9"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"columns": {"los": "loss"}}, r"'los' is not a column.*did you mean loss"),
        ({"columns": {"loss": "lss"}}, r"'lss'.*not there; it has: loss"),
        ({"columns": {"lr": "text"}}, r"'text'.*holds no numbers"),
        ({"constants": {"seq_len": "many"}}, r"seq_len = 'many' is not a number"),
        ({"constants": {"tokens": "5B"}}, r"tokens = 5B is known of every run"),
        ({"constants": {"context": 5}}, "not a column"),
        ({"constants": {"seq_len": 0}}, r"seq_len = 0; accepted: 1 to 1e\+08"),
        ({"constants": {"lr": "-1"}}, r"lr = -1; accepted: 1e-12 to 1000"),
    ],
)
def test_mistakes_in_the_mapping_are_named(tmp_path, given, message):
    path = csv(tmp_path, "N,D,loss,text\n1e8,1e9,3,a\n2e8,2e9,2.9,b\n")
    with pytest.raises(ValueError, match=message):
        read([path], **given)


def test_columns_follow_from_others(tmp_path):
    table = columns(tmp_path, N=[1e8, 2e8], steps=[1000, 2000], batch_size=[256, 512], seq_len=[1024, 1024],
                    flops_per_token=[7e8, 14e8], loss=[3.0, 2.9])  # fmt: skip
    assert table.numbers("batch_tokens").tolist() == [256 * 1024, 512 * 1024]
    assert table.numbers("tokens").tolist() == [256 * 1024 * 1000, 512 * 1024 * 2000]
    assert table.numbers("flops") == pytest.approx(table.numbers("tokens") * [7e8, 14e8])
    assert table.mapping["flops"] == "flops_per_token * tokens" and table.frame["labels"].isna().all()


def test_a_rule_of_thumb_is_told(tmp_path):
    table = columns(tmp_path, params=[1e8, 2e8], C=[6e18, 12e18], loss=[3.0, 2.9])
    assert table.numbers("tokens").tolist() == [1e10, 1e10] and table.mapping["tokens"] == "C / (6 N)"
    assert table.frame["labels"].tolist() == ["tokens = C / (6 N)"] * 2
    table = columns(tmp_path, params=[1e8, 2e8], D=[1e10, 1e10], loss=[3.0, 2.9])
    assert table.mapping["flops"] == "6 N D" and table.numbers("flops").tolist() == [6e18, 12e18]


def test_epochs_tell_unique_tokens_and_a_ratio_tells_tokens(tmp_path):
    table = columns(tmp_path, params=[1e8, 2e8], tokens_per_param=[20, 40], epochs=[1, 4], loss=[3.0, 2.9])
    assert table.numbers("tokens").tolist() == [2e9, 8e9] and table.numbers("unique_tokens").tolist() == [2e9, 2e9]


def test_statuses_are_those_of_others_too(tmp_path):
    table = columns(tmp_path, N=[1e8] * 5, D=[1e9] * 5, State=["finished", "crashed", "running", "failed", None],
                    loss=[3.0, 2.9, 3.1, 3.2, 2.8])  # fmt: skip
    assert table.frame["status"].tolist() == ["finished", "killed", "running", "killed", "finished"]
    table = columns(tmp_path, N=[1e8] * 3, D=[1e9] * 3, diverged=[False, True, False], loss=[3.0, 9.0, float("inf")])
    assert table.frame["status"].tolist() == ["finished", "diverged", "diverged"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "N,D,lr,loss\n1e8,1e9,1,3\n1e8,1e9,2,\n1e8,1e9,3,nan\n1e8,1e9,4,inf\n"),
        ("t.csv", "N,D,lr,perplexity\n1e8,1e9,1,20\n1e8,1e9,2,\n1e8,1e9,3,NaN\n1e8,1e9,4,inf\n"),
        (
            "t.jsonl",
            "".join(
                f'{{"N": 1e8, "D": 1e9, "loss": {loss}, "state": NaN}}\n' for loss in ("3.0", "null", "NaN", "Infinity")
            ),
        ),
    ],
    ids=["csv", "perplexity", "json lines"],
)
def test_a_loss_diverged_where_it_is_written_as_no_number_and_not_where_it_is_empty(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    table = read([tmp_path / name])
    assert table.frame["status"].tolist() == ["finished", "finished", "diverged", "diverged"]
    assert "no-loss" in {each.code for each in select(table)[1]}
    assert outcomes(table.frame)[1].tolist() == [False, False, True, True]


@pytest.mark.parametrize("given", [{}, {"loss": "c4_ppl"}])
def test_of_a_perplexity_the_logarithm_is_the_loss(tmp_path, given):
    path = csv(tmp_path, "N,D,c4_ppl\n1e8,1e9,20\n2e8,1e9,10\n2e8,2e9,diverged\n")
    table = read([path], columns=given)
    assert table.numbers("loss") == pytest.approx([np.log(20), np.log(10), np.nan], nan_ok=True)
    assert table.mapping["loss"] == "ln(c4_ppl)" and table.frame["status"].tolist() == [*["finished"] * 2, "diverged"]


@pytest.mark.parametrize("expression", ["y", "y * 2", "y / 2"])
def test_a_loss_that_was_named_diverged_where_it_is_written_so(tmp_path, expression):
    (tmp_path / "t.csv").write_text("N,D,y\n1e8,1e9,3\n1e8,2e9,\n1e8,3e9,nan\n")
    table = read([tmp_path / "t.csv"], columns={"loss": expression})
    assert table.frame["status"].tolist() == ["finished", "finished", "diverged"]


def test_parquet_tells_nan_from_null(tmp_path):
    loss = pa.array([3.0, None, float("nan")], from_pandas=False)
    parquet.write_table(pa.table({"N": [1e8] * 3, "D": [1e9] * 3, "loss": loss}), tmp_path / "t.parquet")
    assert read([tmp_path / "t.parquet"]).frame["status"].tolist() == ["finished", "finished", "diverged"]


@pytest.mark.parametrize(
    ("cell", "status"),
    [("diverged", "diverged"), ("NaN", "diverged"), ("inf", "diverged"), ("OOM", "killed"), ("-", "finished"),
     ("—", "finished"), ("n/a", "finished"), ("", "finished")],
)  # fmt: skip
def test_a_word_for_a_loss_that_is_not_there_is_of_its_row_alone(tmp_path, cell, status):
    losses = [cell if k % 2 else f"{3 + k / 100}" for k in range(12)]
    table = columns(tmp_path, N=[1e8] * 12, D=[1e9] * 12, lr=range(1, 13), loss=losses)
    assert table.frame["status"].tolist() == ["finished", status] * 6
    assert np.isfinite(table.numbers("loss")).tolist() == [True, False] * 6


@pytest.mark.parametrize(
    ("cell", "number"),
    [("3.21 ± 0.01", 3.21), ("3.21+-0.01", 3.21), ("3.21 +/- 1e-2", 3.21), (" 1,234.5 ", 1234.5), ("1_000", 1000),
     ("-1.5e3", -1500)],
)  # fmt: skip
def test_a_cell_is_a_number_with_commas_or_a_margin(tmp_path, cell, number):
    assert columns(tmp_path, N=[1e8] * 2, D=[1e9] * 2, loss=[3.0, cell]).numbers("loss")[1] == number


@pytest.mark.parametrize(
    ("text", "losses"),
    [
        ("N;D;loss\n100000000;1e9;3,9039\n200000000;1e9;3,6879\n", [3.9039, 3.6879]),
        ("N\tD\tloss\n1,0e8\t1e9\t3,904\n2,0e8\t1e9\t3,688\n", [3.904, 3.688]),
        ("N;D;loss\n1e8;1e9;3,9039\n2e8;1e9;diverged\n", [3.9039, np.nan]),
        ("N;D;loss\n1e8;1e9;3,9 ± 0,1\n2e8;1e9;3,7 ± 0,1\n", [3.9, 3.7]),
        ("N;D;loss\n100,000,000;1e9;3.9\n200,000,000;1e9;3.7\n", [3.9, 3.7]),
        ("N\tD\tloss\n100,000\t1e9\t3.9\n200,000\t1e9\t3.7\n", [3.9, 3.7]),
    ],
    ids=["semicolons", "tabs", "beside a word", "with margins", "thousands", "one comma a number"],
)
def test_a_comma_is_a_decimal_one_where_nothing_else_is(tmp_path, text, losses):
    table = read([csv(tmp_path, text)])
    assert table.numbers("loss") == pytest.approx(losses, nan_ok=True)
    assert (table.numbers("non_embedding") >= 1e5).all()


def test_a_comma_that_parts_no_thousands_is_no_number(tmp_path):
    with pytest.raises(ValueError, match=r"'loss' is no column of numbers \('3,9039' in row 1"):
        read([csv(tmp_path, 'N,D,loss\n1e8,1e9,"3,9039"\n2e8,1e9,"3,6879"\n')])


def test_cells_without_a_number_are_told(tmp_path):
    losses = ["3.0"] * 19 + ["see text"]
    table = columns(tmp_path, N=[1e8] * 20, D=[1e9] * 20, lr=range(1, 21), loss=losses)
    assert np.isfinite(table.numbers("loss")).sum() == 19
    assert any("'loss', taken for loss, holds 'see text' in row 20, no number in 1 of 20" in each
               for each in table.notes)  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"N": [1e8] * 4, "loss": ["3.0", "2.9?", "2.8", "2,71"]}, r"'loss' is no column .*'2\.9\?' in row 2.* 2 of 4"),
        ({"N": [1e8] * 4, "loss": ["a", "b", "c", "d"]}, r"'loss' is no column of numbers \('a' in row 1"),
        ({"params": ["1e8", "1e8?", "2e8", "3e8"], "loss": [3.0] * 4}, r"'params' .*'1e8\?' in row 2.* 1 of 4 cells"),
    ],
)
def test_a_column_that_is_spoiled_by_texts_is_refused_with_one_of_them(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        columns(tmp_path, D=[1e9] * 4, **values)


def test_a_column_of_texts_with_a_name_of_ours_is_told(tmp_path):
    table = columns(tmp_path, N=[1e8] * 2, D=[1e9] * 2, context=["short", "long"], loss=[3.0, 2.9])
    assert any("'context' is not taken for seq_len: it holds 'short' in row 1" in each for each in table.notes)


def test_rows_that_are_there_twice_and_odd_losses_are_labelled(tmp_path):
    table = columns(tmp_path, N=[1e8, 1e8, 2e8], D=[1e9, 1e9, 1e9], loss=[3.0, 3.0, -1.0])
    assert table.frame["labels"].tolist() == [None, "duplicate of an earlier row", "the loss is -1"]


def test_rows_that_two_tables_have_count_once(tmp_path):
    a = csv(tmp_path, "N,D,loss\n100000000,1e9,3\n200000000,1e9,2.9\n", "a.csv")
    b = csv(tmp_path, "N,D,loss\n100000000,1e9,3\n200000000,1e9,2.9\n", "b.csv")
    c = csv(tmp_path, "N,D,loss\n2.0e8,1e9,2.9\n4.0e8,1e9,2.8\n", "c.csv")
    table = read([a, b, c])
    labels = [None, None, *[f"duplicate of {a}"] * 2, f"duplicate of a row of {a}", None]
    assert table.frame["labels"].tolist() == labels
    assert table.frame["run"].tolist() == ["a:1", "a:2", "b:1", "b:2", "c:1", "c:2"]
    assert select(table)[0].tolist() == [each is None for each in labels]


def test_runs_of_two_tables_that_differ_in_a_name_are_two(tmp_path):
    paths = [csv(tmp_path, f"run,N,D,loss\n{name},1e8,1e9,3\n", f"{name}.csv") for name in "ab"]
    assert read(paths).frame["labels"].tolist() == [None, None]
