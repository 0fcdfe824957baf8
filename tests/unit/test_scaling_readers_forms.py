"""Forms that a table of runs comes in: formats and compression, headers and cells, a run a row or several."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest

from scaling.readers import read
from tests.tables import columns, csv


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".tsv"])
def test_other_formats_are_the_same_table(tmp_path, suffix):
    rows = [
        {"N": 1e8, "D": 1e9, "loss": 3.0, "config": {"lr": 1e-3}},
        {"N": 2e8, "D": 1e9, "loss": 2.9, "config": {"lr": 2e-3}},
    ]
    path = tmp_path / f"t{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"N": 3')
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        pd.json_normalize(rows).to_parquet(path)
    else:
        pd.json_normalize(rows).to_csv(path, sep="\t", index=False)
    table = read([path])
    assert table.numbers("non_embedding").tolist() == [1e8, 2e8] and table.numbers("lr").tolist() == [1e-3, 2e-3]


@pytest.mark.parametrize(
    ("name", "text"),
    [("t.csv.gz", "N,D,loss\n1e8,1e9,3\n"),
     ("t.tsv.gz", "N\tD\tloss\n1e8\t1e9\t3\n"), ("t.csv", "N,D,loss\n1e8,1e9,3\n"),
     ("t.jsonl.gz", '{"N": 1e8, "D": 1e9, "loss": 3}\n'), ("t.JSON.GZ", '[{"N": 1e8, "D": 1e9, "loss": 3}]')],
)  # fmt: skip
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_compressed_table_is_the_table(tmp_path, name, text, as_folder):
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    table = read([tmp_path if as_folder else tmp_path / name])
    assert (table.numbers("non_embedding").tolist(), table.numbers("loss").tolist()) == ([1e8], [3.0])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_list_in_a_cell_is_a_text(tmp_path, suffix):
    rows = pd.DataFrame({"N": [1e8, 2e8, 2e8], "D": 1e9, "loss": [3.0, 2.9, 2.9], "betas": [[0.9, 0.95]] * 3})
    path = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, orient="records", lines=suffix == ".jsonl")
    table = read([path])
    assert table.frame["betas"].tolist() == ["[0.9, 0.95]"] * 3
    assert table.frame["labels"].tolist() == [None, None, "duplicate of an earlier row"]


@pytest.mark.parametrize(
    "before",
    ["# params,# tokens,loss", "#params,#tokens,loss", "#exported by a tool\n# params,# tokens,loss",
     "# exported, by a tool\nparams,tokens,loss", "#exported, by, a tool\nparams,tokens,loss",
     "#one\n#two\n\nparams,tokens,loss", "# by a tool\n#params,#tokens,loss"],
)  # fmt: skip
def test_a_line_with_a_hash_is_the_header_where_it_has_the_cells_of_the_rows(tmp_path, before):
    table = read([csv(tmp_path, f"{before}\n1e8,2e9,3\n2e8,2e9,2.9\n")])
    assert (table.numbers("total").tolist(), table.numbers("tokens").tolist()) == ([1e8, 2e8], [2e9, 2e9])


@pytest.mark.parametrize("index", [["N"], ["N", "D"], ["lr"]])
def test_a_named_index_of_a_parquet_table_is_a_column(tmp_path, index):
    frame = pd.DataFrame({"N": [1e8, 2e8], "D": [1e9, 2e9], "lr": [1e-3, 2e-3], "loss": [3.0, 2.9]})
    frame.set_index(index).to_parquet(tmp_path / "t.parquet")
    table = read([tmp_path / "t.parquet"])
    found = table.frame[["non_embedding", "tokens", "lr", "loss"]]
    assert found.to_numpy().tolist() == frame.to_numpy().tolist()


def test_a_folder_of_tables_is_one_table(tmp_path):
    csv(tmp_path, "N,D,loss\n1e8,1e9,3\n", "a.csv")
    csv(tmp_path, "N,tokens,loss\n2e8,1e9,2.9\n", "b.csv")
    table = read([tmp_path])
    assert len(table) == 2 and table.mapping["tokens"] == "D; tokens"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary"),
        (b"\xff\xfe\xfd\xfc garbage", "not UTF-8"),
        (b"", "empty"),
        (gzip.compress(b"N,D,loss\n1e8,1e9,3\n", mtime=0)[:-9], "not a whole gzip file"),
        (b"\x1f\x8b garbage", "not a whole gzip file"),
        (b"N,D,loss\n", "no rows"),
        (b'N,D,loss\n1,2,"3\n', "not a table"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, data, message):
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read([path])
    assert str(path) in str(error.value)


def test_a_broken_line_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"t.jsonl, line 2: .*not a JSON object"):
        read([csv(tmp_path, '{"N": 1}\n{"N": \n{"N": 3}\n', "t.jsonl")])


def test_a_thousand_columns_are_read(tmp_path):
    names = ["N", "D", "loss", *(f"config.option-{k}" for k in range(1000))]
    text = "\n".join([",".join(names), *(",".join([f"{n}e8", "1e9", "3", *["x"] * 1000]) for n in (1, 2))])
    table = read([csv(tmp_path, text)])
    assert len(table) == 2 and table.frame.shape[1] > 1000 and table.numbers("loss").tolist() == [3, 3]


def test_a_table_of_one_point_and_markup_is_a_row(tmp_path):
    table = read([csv(tmp_path, 'name,N,D,loss\n"<img src=x onerror=alert(1)>",1e8,1e9,3\n')])
    assert table.frame["run"].tolist() == ["<img src=x onerror=alert(1)>"]


def test_a_table_of_runs_with_their_last_step_is_no_log(tmp_path):
    table = columns(tmp_path, step=[100, 200, 300], N=[1e8, 2e8, 4e8], D=[1e9] * 3, loss=[3.0, 2.9, 2.8])
    assert table.numbers("loss").tolist() == [3.0, 2.9, 2.8]
    table = columns(tmp_path, run=["a", "b", "c"], step=[100, 200, 300], D=[1e9] * 3, loss=[3.0, 2.9, 2.8])
    assert len(table) == 3 and table.numbers("loss").tolist() == [3.0, 2.9, 2.8]


RATES = np.geomspace(1e-4, 1e-2, 8)


@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        ([1.2e8], {"step": 5000}),
        ([1.2e8], {"step": [5000, 4000, 3000, 5000, 5000, 2000, 5000, 1000]}),
        ([1.2e8], {"step": [1000, 1000, 2000, 2000, 3000, 3000, 4000, 4000]}),
        ([1.2e8, 3e8, 8e8], {"step": 5000, "batch_size": 512}),
        ([1.2e8, 3e8, 8e8], {"_step": 5000}),
    ],
    ids=["one step", "stopped early", "two a step", "families", "families of an export"],
)
def test_a_sweep_with_a_column_of_steps_is_a_run_a_row(tmp_path, sizes, more):
    parts = [{"name": f"size {n:g}", "params": n, "D": 2.5e9, "lr": RATES, **more, "loss": 3 + RATES} for n in sizes]
    pd.concat([pd.DataFrame(each) for each in parts]).to_csv(tmp_path / "t.csv", index=False)
    table = read([tmp_path / "t.csv"])
    assert table.numbers("lr").tolist() == pytest.approx([*RATES] * len(sizes))
    assert table.numbers("loss").tolist() == pytest.approx([*(3 + RATES)] * len(sizes))


def test_a_sweep_of_seeds_at_one_step_is_a_run_a_row(tmp_path):
    table = columns(tmp_path, params=[1e8] * 4, step=[10, 10, 20, 20], D=[1e9] * 4, seed=[0, 1] * 2,
                    loss=[3.0, 3.1, 2.9, 2.8])  # fmt: skip
    assert len(table) == 4


@pytest.mark.parametrize(("loss", "given"), [("final_loss", {}), ("loss", {"run": ""}), ("end loss", {"run": "model"})])
def test_losses_at_the_end_of_branches_are_a_run_a_row(tmp_path, loss, given):
    rows = {"model": ["a"] * 3 + ["b"] * 3, "run_name": ["a"] * 3 + ["b"] * 3, "params": [1e8] * 3 + [2e8] * 3}
    path = tmp_path / "t.csv"
    frame = pd.DataFrame(rows | {"step": [10, 20, 30] * 2, "D": [1e9, 2e9, 3e9] * 2, loss: np.linspace(3, 2, 6)})
    frame.to_csv(path, index=False)
    table = read([path], columns=given)
    assert table.numbers("loss").tolist() == np.linspace(3, 2, 6).tolist()
    assert table.numbers("tokens").tolist() == [1e9, 2e9, 3e9] * 2


ROWS = [{"params": 1e8, "tokens": 2e9, "loss": 3.0}, {"params": 2e8, "tokens": 2e9, "loss": 2.9}]
FRAME = pd.DataFrame(ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.json", FRAME.to_json()), ("t.json", FRAME.to_json(orient="split")),
        ("t.json", FRAME.to_json(orient="index")),
        ("t.json", FRAME.to_json(orient="table")), ("t.json", json.dumps({"date": "today", "seeds": 3, "runs": ROWS})),
        ("t.json", FRAME.to_json(orient="records", lines=True)), ("t.jsonl", json.dumps(ROWS, indent=1)),
        ("t.txt", json.dumps(ROWS)), ("t.txt", FRAME.to_json(orient="records", lines=True)),
        ("t.txt", FRAME.to_string(index=False)), ("t.csv", "Our runs\n" + FRAME.to_csv(index=False)),
        ("t.csv", "sep=;\n" + FRAME.to_csv(index=False, sep=";")),
        ("t.csv", "params,tokens,loss\n~100M,2B,**3.0**\n200M,2B,2.9 (0.01)\n"),
    ],
)  # fmt: skip
def test_tables_in_other_forms_are_the_same_table(tmp_path, name, text):
    table = read([csv(tmp_path, text, name)])
    assert table.frame[["total", "tokens", "loss"]].to_numpy().tolist() == FRAME.to_numpy().tolist()


def test_a_run_with_a_list_of_objects_is_a_run(tmp_path):
    table = read([csv(tmp_path, json.dumps(ROWS[0] | {"history": [{"step": 1, "loss": 9.0}]}), "t.json")])
    assert table.numbers("loss").tolist() == [3.0]


def test_results_on_several_sets_are_a_loss_each(tmp_path):
    sets = (["a/pile.tar"], 3.0), (["b/c4.tar", "b/more.tar"], 2.5)
    results = [{"loss": loss, "tokens": 7, "loss_lower_95": 1.0, "task": "lm", "data": data} for data, loss in sets]
    path = csv(tmp_path, json.dumps({"params": 1e8, "tokens": 2e9, "results": results}), "t.json")
    with pytest.raises(ValueError, match=r"several losses.*results.a/pile.tar.loss, results.b/c4.tar, b/more.tar.loss"):
        read([path])
    table = read([path], columns={"loss": "results.b/c4.tar, b/more.tar.loss"})
    assert table.frame[["total", "tokens", "loss"]].to_numpy().tolist() == [[1e8, 2e9, 2.5]]


def test_the_last_iteration_tells_the_length_of_sequences(tmp_path):
    table = columns(tmp_path, N=[1e8, 2e8], lr=[1e-3, 2e-3], gbsz=[16, 32], iteration=[20000, 10000],
                    train_tokens=[1310720000] * 2, loss=[3.0, 2.9])  # fmt: skip
    assert table.numbers("batch_tokens").tolist() == [16 * 4096, 32 * 4096]
