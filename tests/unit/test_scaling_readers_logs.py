"""Event files, Weights & Biases exports and text logs as rows of a table."""

import struct

import numpy as np
import pandas as pd
import pytest

from scaling.gates import select
from scaling.readers import read, wandb_exports
from scaling.readers.derived import sizes_in_names
from scaling.readers.event_files import read as read_events

STEPS = 1200


def losses(steps=STEPS, end=2.5, seed=0):
    steps = np.arange(1, steps + 1)
    return end + 4 * (steps**-0.5 - steps[-1] ** -0.5) + 0.03 * np.random.default_rng(seed).normal(size=len(steps))


def record(step, wall_time=1.0, /, *, tensor=False, text=None, **scalars):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.util.tensor_util import make_tensor_proto

    event = Event(step=step, wall_time=wall_time)
    for tag, value in scalars.items():
        if tensor:
            event.summary.value.add(tag=tag, tensor=make_tensor_proto(np.float32(value)))
        else:
            event.summary.value.add(tag=tag, simple_value=value)
    for tag, value in (text or {}).items():
        event.summary.value.add(tag=f"{tag}/text_summary", tensor=make_tensor_proto([value], dtype="string"))
    data = event.SerializeToString()
    return struct.pack("<Q", len(data)) + b"\0\0\0\0" + data + b"\0\0\0\0"


def events(folder, name, records, cut=0):
    folder.mkdir(parents=True, exist_ok=True)
    data = b"".join(records)
    (folder / f"events.out.tfevents.{name}").write_bytes(data[: len(data) - cut])


def test_all_points_of_an_event_file_are_read(tmp_path):
    events(tmp_path / "a", "1", [record(k, loss=2.0) for k in range(12_000)])
    assert len(read_events(tmp_path / "a").series["loss"].steps) == 12_000


@pytest.mark.parametrize("tensor", [False, True])
def test_event_folders_are_runs(tmp_path, tensor):
    for name, end in (("a", 2.5), ("b", 2.4)):
        rows = [record(k, tensor=tensor, **{"train/loss": float(value), "lr": 1e-3 if k < 1000 else 1e-5})
                for k, value in enumerate(losses(end=end), start=1)]  # fmt: skip
        events(tmp_path / name / "tb", "1", [record(0, text={"hidden_size": "768", "seed": "3"}), *rows])
    table = read([tmp_path])
    assert table.numbers("loss") == pytest.approx([2.5, 2.4], abs=0.03)
    assert (table.numbers("loss_error") < 0.02).all()
    found = table.frame.iloc[0]
    assert (found["steps"], found["hidden_size"], found["seed"]) == (STEPS, 768, 3)
    assert found["lr"] == pytest.approx(1e-3) and found["final_lr"] == pytest.approx(1e-5)
    assert found["loss_kind"] == "training, smoothed (train/loss)"


def test_a_resume_in_a_second_event_file_rewrites_steps_and_a_cut_end_is_labelled(tmp_path):
    first = [record(k, 1.0, loss=9.0) for k in range(1, 1001)]
    second = [record(k, 2.0, loss=float(value)) for k, value in enumerate(losses(), start=1) if k > 500]
    events(tmp_path / "a", "0.later", second, cut=5)
    events(tmp_path / "a", "1.sooner", first)
    table = read([tmp_path / "a"])
    found = table.frame.iloc[0]
    assert found["loss"] == pytest.approx(2.5, abs=0.03) and found["steps"] == STEPS - 1
    for label in ("events.out.tfevents.0.later is cut short", "2 event files", "500 steps written again"):
        assert label in found["labels"]


def test_garbage_in_an_event_file_is_labelled(tmp_path):
    events(tmp_path / "a", "1", [record(1, loss=2.0), struct.pack("<Q", 3) + b"\0\0\0\0\xff\xff\xff\0\0\0\0"])
    assert "damaged after 1 events" in read([tmp_path / "a"]).frame["labels"][0]


def test_an_empty_event_file_is_a_labelled_row(tmp_path):
    events(tmp_path / "a", "1", [])
    assert "no loss" in read([tmp_path / "a"]).frame["labels"][0]


def test_tables_and_logs_beside_runs_are_told(tmp_path):
    events(tmp_path / "runs" / "a", "1", [record(1, loss=2.0)])
    (tmp_path / "grid.csv").write_text("N,D,loss\n1e8,1e9,3\n")
    (tmp_path / "notes.txt").write_text("no log")
    (tmp_path / "settings.json").write_text("{}")
    log(tmp_path, megatron(1, 100))
    table = read([tmp_path])
    assert len(table) == 1
    told = [note for note in table.notes if "not read" in note]
    assert len(told) == 1 and told[0].startswith("2 tables or logs beside runs") and "grid.csv" in told[0]
    table = read([tmp_path, tmp_path / "grid.csv", tmp_path / "train.log"])
    assert len(table) == 3 and not any("not read" in note for note in table.notes)


def test_what_does_not_tell_how_a_run_ended_says_so_once(tmp_path):
    for name in "ab":
        events(tmp_path / name, "1", [record(1, loss=2.0)])
    table = read([tmp_path])
    assert table.frame["status"].tolist() == ["finished"] * 2
    assert sum("do not tell how a run ended" in each for each in table.notes) == 1
    assert not any("how a run ended" in each for each in read([log(tmp_path, megatron(1, 100))]).notes)


def test_an_export_with_a_column_of_states_tells_how_a_run_ended(tmp_path):
    states = {"x": "finished", "y": "crashed", "z": "running"}
    frames = [pd.DataFrame({"run": run, "state": state, "_step": range(9), "loss": 3.0, "seed": k})
              for k, (run, state) in enumerate(states.items())]  # fmt: skip
    pd.concat(frames).to_csv(tmp_path / "t.csv", index=False)
    table = read([tmp_path / "t.csv"])
    assert table.frame["status"].tolist() == ["finished", "killed", "running"]
    assert not any("how a run ended" in each for each in table.notes)


def test_copies_of_event_folders_and_logs_are_labelled(tmp_path):
    for name, loss in (("a", 2.0), ("b", 2.0), ("c", 2.1)):
        events(tmp_path / name, "1", [record(1, loss=loss)])
    for name in ("x.log", "y.log"):
        (tmp_path / name).write_text(megatron(1, 100))
    table = read([tmp_path / each for each in ("a", "b", "c", "x.log", "y.log")])
    copies = table.frame["labels"].str.extract("(duplicate of .*)")[0].fillna("").tolist()
    assert copies == ["", f"duplicate of {tmp_path / 'a'}", "", "", f"duplicate of {tmp_path / 'x.log'}"]


def test_runs_without_a_loss_beside_a_table_are_an_error_that_names_both(tmp_path):
    events(tmp_path / "a", "1", [])
    (tmp_path / "grid.csv").write_text("N,D,loss\n1e8,1e9,3\n")
    with pytest.raises(ValueError, match=r"/a: no run has a loss.*not read.*grid\.csv"):
        select(read([tmp_path]))


def test_of_a_perplexity_that_is_asked_for_the_logarithm_is_smoothed(tmp_path):
    rows = [record(k, **{"loss": 9.0, "val_ppl": float(np.exp(value))}) for k, value in enumerate(losses(), start=1)]
    events(tmp_path / "a", "1", rows)
    table = read([tmp_path / "a"], columns={"loss": "val_ppl"})
    assert table.numbers("loss") == pytest.approx([2.5], abs=0.03) and table.mapping["loss"] == "smooth of ln(val_ppl)"


def test_our_own_event_files_have_tokens_on_their_axis(tmp_path):
    rows = [record(k * 1024, loss=float(value), step=k, sequences=k, segment=0, batch_tokens=1024)
            for k, value in enumerate(losses(), start=1)]  # fmt: skip
    rows.append(record(STEPS * 1024, **{"evaluations/heldout/loss": 2.6, "evaluations/code/loss": 2.9}))
    events(tmp_path / "a", "1", rows)
    found = read([tmp_path / "a"]).frame.iloc[0]
    assert (found["tokens"], found["steps"], found["batch_tokens"]) == (STEPS * 1024, STEPS, 1024)
    assert found["loss"] == pytest.approx(2.6) and "the first of 2 sets" in found["labels"]
    found = read([tmp_path / "a"], columns={"loss": "evaluations/code/loss"}).frame.iloc[0]
    assert found["loss"] == pytest.approx(2.9)


def test_a_long_export_is_sparse_and_may_hold_many_runs(tmp_path):
    frames = []
    for run, end in (("x", 2.5), ("y", 2.3)):
        frame = pd.DataFrame({"run": run, "_step": np.arange(1, STEPS + 1), "train/loss": losses(end=end)})
        frame.loc[frame["_step"] % 2 == 0, "train/loss"] = np.nan
        frame["val/loss"] = np.where(frame["_step"] % 400 == 0, end + 0.1, np.nan)
        frame["n_params"], frame["tokens"] = 1e8, frame["_step"] * 4096
        frames.append(frame)
    path = tmp_path / "history.csv"
    pd.concat(frames).to_csv(path, index=False)
    table = read([path])
    assert table.frame["run"].tolist() == ["x", "y"] and table.numbers("loss") == pytest.approx([2.6, 2.4])
    assert table.numbers("total").tolist() == [1e8] * 2 and table.numbers("tokens").tolist() == [STEPS * 4096] * 2
    assert table.frame["loss_kind"][0] == "held-out (val/loss)"


def test_the_column_that_names_the_runs_of_an_export_may_be_given(tmp_path):
    frame = pd.DataFrame({"_step": np.arange(1, STEPS + 1), "loss": losses()})
    path = tmp_path / "history.csv"
    pd.concat([frame.assign(hyper=each) for each in (0, 1)]).to_csv(path, index=False)
    table = read([path], columns={"run": "hyper"})
    assert table.frame["run"].tolist() == ["0", "1"] and table.numbers("steps").tolist() == [STEPS] * 2
    assert any("logged steps of 2 runs" in note for note in table.notes)


def test_rows_of_one_step_and_a_resume_are_a_log_still(tmp_path):
    steps = np.repeat([*range(1, 801), *range(700, STEPS + 1)], 2)
    frame = pd.DataFrame({"step": steps, "lr": 1e-3, "loss": np.repeat(losses(len(steps) // 2), 2)})
    frame.loc[1::2, "loss"] = np.nan
    frame.to_csv(tmp_path / "log.csv", index=False)
    assert read([tmp_path / "log.csv"]).numbers("steps").tolist() == [STEPS]


def test_a_wide_export_has_a_run_a_column(tmp_path):
    frame = pd.DataFrame({"Step": np.arange(1, STEPS + 1)})
    for run, end in (("big - lr 1e-3", 2.5), ("<b>small</b>", 2.9)):
        for bound in ("", "__MIN", "__MAX"):
            frame[f"{run} - train/loss{bound}"] = losses(end=end) + {"": 0, "__MIN": -5, "__MAX": 5}[bound]
    frame.loc[1000:, "<b>small</b> - train/loss"] = np.nan
    path = tmp_path / "chart.csv"
    frame.to_csv(path, index=False)
    table = read([path], constants={"batch_tokens": 4096})
    assert table.frame["run"].tolist() == ["big - lr 1e-3", "<b>small</b>"]
    assert table.numbers("steps").tolist() == [STEPS, 1000]
    assert table.numbers("loss")[0] == pytest.approx(2.5, abs=0.03)
    assert table.numbers("tokens").tolist() == [STEPS * 4096, 1000 * 4096]


def chart(path, axis="Step", bounds=("", "__MIN", "__MAX"), **metrics):
    """Of two runs, as Weights & Biases exports it."""
    frame = pd.DataFrame({axis: np.arange(1, STEPS + 1)})
    for metric, values in metrics.items():
        for run, factor in (("small-70M", 1.0), ("large-1.4B", 0.9)):
            for bound in bounds:
                frame[f"{run} - {metric.replace('__', '/')}{bound}"] = np.asarray(values) * factor
    frame.to_csv(path, index=False)
    return path


def test_charts_of_the_same_runs_are_one_run_each(tmp_path):
    chart(tmp_path / "loss.csv", train__loss=losses())
    chart(tmp_path / "lr.csv", bounds=("",), lr=np.full(STEPS, 1e-3))
    chart(tmp_path / "tokens.csv", tokens=4096.0 * np.arange(1, STEPS + 1))
    (tmp_path / "other").mkdir()
    chart(tmp_path / "other" / "lr.csv", lr=np.full(STEPS, 2e-3))
    chart(tmp_path / "copy.csv", lr=np.full(STEPS, 2e-3))
    names = ("loss", "lr", "tokens", "other/lr", "copy")
    table = read([tmp_path / f"{name}.csv" for name in names])
    runs = table.frame[table.frame["run"] == "small-70M"]
    assert runs["loss"].notna().tolist() == [True, False, False]
    assert runs["lr"].tolist() == [1e-3, 2e-3, 2e-3] and runs["tokens"].iloc[0] == STEPS * 4096
    assert "joined with its chart in lr.csv; joined with its chart in tokens.csv" in runs["labels"].iloc[0]
    assert "duplicate of" in runs["labels"].iloc[2]  # other/lr.csv, as copy.csv


def test_an_equal_chart_makes_no_equal_runs_and_equal_losses_do(tmp_path):
    for folder, end in (("a", 2.5), ("b", 2.3)):
        (tmp_path / folder).mkdir()
        chart(tmp_path / folder / "loss.csv", train__loss=losses(end=end))
        chart(tmp_path / folder / "lr.csv", lr=np.full(STEPS, 1e-3))
    (tmp_path / "c").mkdir()
    chart(tmp_path / "c" / "again.csv", train__loss=losses(end=2.3))
    chart(tmp_path / "c" / "norm.csv", grad_norm=np.ones(STEPS))
    table = read(
        [tmp_path / name for name in ("a/lr.csv", "a/loss.csv", "b/lr.csv", "b/loss.csv", "c/norm.csv", "c/again.csv")]
    )
    copies = table.frame["labels"].str.contains("duplicate").tolist()
    assert copies == [False] * 4 + [True] * 2 and select(table)[0].tolist() == [True] * 4 + [False] * 2


def test_charts_that_end_elsewhere_are_of_other_runs(tmp_path):
    chart(tmp_path / "loss.csv", train__loss=losses())
    frame = pd.read_csv(tmp_path / "loss.csv")
    frame["Step"] *= 100
    frame.columns = [name.replace("train/loss", "lr") for name in frame.columns]
    frame.to_csv(tmp_path / "lr.csv", index=False)
    table = read([tmp_path / "loss.csv", tmp_path / "lr.csv"])
    assert sorted(table.numbers("steps")) == [STEPS] * 2 + [100 * STEPS] * 2


@pytest.mark.parametrize(
    "names", [("tokens", "params - total", "loss - final"), ("step", "train - loss", "val - loss")]
)
def test_columns_of_common_words_are_no_chart(names):
    assert not wandb_exports.is_wide(list(names))
    assert wandb_exports.is_wide([names[0], "wise-owl-7 - train/loss"])


def test_a_chart_without_bounds_has_a_run_a_column(tmp_path):
    table = read([chart(tmp_path / "chart.csv", bounds=("",), train__loss=losses())])
    assert table.frame["run"].tolist() == ["small-70M", "large-1.4B"]
    assert table.numbers("steps").tolist() == [STEPS] * 2


def test_a_size_that_no_logger_tells_is_that_of_the_run_s_name(tmp_path):
    path = chart(tmp_path / "chart.csv", train__loss=losses())
    table = read([path])
    assert table.numbers("total").tolist() == [7e7, 1.4e9] and table.mapping["total"] == "size in the name of run"
    assert any("'small-70M'" in note for note in table.notes)
    assert not read([path], columns={"total": ""}).has("total")
    assert not read([path], constants={"non_embedding": 5e6}).has("total")


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (("pythia-70m", "pythia-1.4b-deduped"), [7e7, 1.4e9]),
        (("70M-10B", "160M-10B"), None),
        (("a", "70M"), None),
        (("10B tokens", "20B Tok"), None),
        (("data-10B", "D=20B"), None),
        (("batch_2M", "lr1e-3-2M"), None),
        (("7_0B", "1_4B"), None),
        (("1,400M", "2,800M"), None),
        (("int 8b", "int-4b"), None),
        (("x-1000M", "x-2000M"), None),  # these are the tokens
        (("d12_124M", "llama-7B-2T"), [1.24e8, 7e9]),
        (("deduped-70m", "DataDecide-c4-150M"), [7e7, 1.5e8]),
        (("model-2", "model-3"), None),
    ],
)
def test_sizes_in_names_are_taken_where_each_has_one(tmp_path, names, sizes):
    frame = pd.DataFrame({"model": names, "tokens": [1e9, 2e9], "loss": [3.0, 2.8]})
    frame.to_csv(tmp_path / "table.csv", index=False)
    table = read([tmp_path / "table.csv"])
    assert (table.numbers("total").tolist() if table.has("total") else None) == sizes


ARGUMENTS = """\
------------------------ arguments ------------------------
  adam_beta1 ...................................... 0.9
  ffn_hidden_size ................................. 2048
  global_batch_size ............................... 64
  hidden_size ..................................... 512
  lr .............................................. 0.001
  lr_decay_style .................................. cosine
  min_lr .......................................... 1e-05
  num_attention_heads ............................. 8
  num_experts ..................................... None
  num_layers ...................................... 8
  seed ............................................ 1234
  seq_length ...................................... 1024
  swiglu .......................................... False
  weight_decay .................................... 0.1
-------------------- end of arguments ---------------------
"""


def megatron(first, last, *, total=STEPS, loss=None, nans=0):
    lines = []
    for k, value in enumerate(losses(), start=1):
        if first <= k <= last:
            lines.append(
                f"[default0]: [2026-01-01 00:00:00] iteration {k:8d}/{total:8d} | consumed samples: {k * 64:12d} | "
                f"elapsed time per iteration (ms): 100.0 | learning rate: {1e-3 if k < 600 else 1e-5:.3E} | "
                f"global batch size:    64 | lm loss: {value if loss is None else loss:.6E} | loss scale: 1.0 | "
                f"grad norm: 0.5 | number of skipped iterations:   0 | number of nan iterations:   {nans} |\n"
            )
    return "".join(lines)


def log(tmp_path, text):
    path = tmp_path / "train.log"
    path.write_text(text)
    return path


def test_a_megatron_log_is_a_run(tmp_path):
    table = read([log(tmp_path, ARGUMENTS + megatron(1, STEPS))])
    found = table.frame.iloc[0]
    expected = {"status": "finished", "hidden_size": 512, "num_layers": 8, "seq_len": 1024, "steps": STEPS, "lr": 1e-3,
                "final_lr": 1e-5, "batch_sequences": 64, "batch_tokens": 64 * 1024, "tokens": STEPS * 64 * 1024,
                "seed": 1234, "weight_decay": 0.1, "schedule": "cosine", "beta1": 0.9,
                "non_embedding": 8 * (4 * 512 * 512 + 2 * 512 * 2048)}  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["loss"] == pytest.approx(2.5, abs=0.03) and found["loss_kind"] == "training, smoothed (lm loss)"


def test_validation_at_the_end_is_the_loss_of_a_megatron_log(tmp_path):
    end = f" validation loss at iteration {STEPS} | lm loss value: 2.610000E+00 | lm loss PPL: 1.0E+01 |\n"
    found = read([log(tmp_path, megatron(1, STEPS) + end)]).frame.iloc[0]
    assert found["loss"] == 2.61 and found["loss_kind"] == "held-out (validation lm loss)"


@pytest.mark.parametrize(
    ("text", "status", "steps"),
    [
        (megatron(1, 800), "killed", 800),
        (megatron(1, 800, loss=9.0) + megatron(601, STEPS), "finished", STEPS),
        (megatron(1, 800, nans=1), "diverged", 800),
        (megatron(1, 800, loss=float("nan")), "diverged", 800),
        (megatron(1, STEPS) + " iteration     1201/    12", "finished", STEPS),
    ],
)
def test_resumed_killed_and_diverged_logs_are_told(tmp_path, text, status, steps):
    import os

    path = log(tmp_path, ARGUMENTS + text)
    os.utime(path, (1e9, 1e9))
    found = read([path]).frame.iloc[0]
    assert (found["status"], found["steps"]) == (status, steps)
    assert status == "diverged" or found["loss"] < 3
    assert ("200 steps written again" in (found["labels"] or "")) == (text.count("iteration      700/") == 2)


def test_a_series_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"loss=vloss; it has: .*lm loss"):
        read([log(tmp_path, megatron(1, 100))], columns={"loss": "vloss"})


def test_a_run_without_the_series_that_is_asked_for_is_labelled(tmp_path):
    first = pd.DataFrame({"run": "x", "_step": np.arange(1, 101), "loss": 3.0, "lr": np.linspace(1, 0, 100)})
    first["val"] = np.where(first["_step"] % 10 == 0, 2.9, np.nan)
    first["rate"] = 2 * first["lr"]
    second = first.assign(run="y", val=np.nan, rate=np.nan)
    pd.concat([first, second]).to_csv(tmp_path / "t.csv", index=False)
    table = read([tmp_path / "t.csv"], columns={"loss": "val", "final_lr": "rate"})
    assert table.numbers("loss") == pytest.approx([2.9, np.nan], nan_ok=True)
    assert table.numbers("final_lr") == pytest.approx([0.0, np.nan], nan_ok=True)
    assert table.frame["labels"].tolist() == [None, "no 'val' for loss; no 'rate' for final_lr"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tokens", [[None, None], [np.nan, 0.0], ["", 2e9], [2e9, np.nan]])
def test_sizes_in_names_need_no_known_tokens(tokens):
    frame, mapping = pd.DataFrame({"run": ["x-70m", "y-1b"], "tokens": pd.Series(tokens, dtype=object)}), {}
    assert sizes_in_names(frame, mapping, set()) and frame["total"].tolist() == [7e7, 1e9]
