"""Numbers that a configuration leaves to a law: what they come to, what is recorded, and what is refused."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from launch import explain, pretrain
from launch.auto import columns_of, round_batch, round_rate, told
from launch.config import compose, dump
from launch.growth_config import segments
from runtime.model.counts import count, flops_per_token
from runtime.observe.identity import identity
from scaling.laws_file import write
from scaling.results import Analysis, Verdict
from scaling.table import RunTable
from tests.fits import batch_fit, fit, rate_fit

AUTO = """
[run]
name = "auto"
dir = "{folder}/runs"
[model]
num_layers = 12
hidden_size = 768
intermediate_size = 2048
num_heads = 12
vocab_size = 32000
[data]
seq_len = 2048
sources = [{{ path = "nowhere" }}]
[batch]
sequences = "auto"
[optim]
lr = "auto"
[schedule]
horizon = "5B"
[law]
source = "step-law"
"""


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "auto.toml"
    path.write_text(AUTO.format(folder=tmp_path))
    return path


def write_laws(path, *fits):
    write(path, Analysis(RunTable(pd.DataFrame()), np.empty(0, dtype=bool), (), fits))
    return path


def test_step_law_gives_the_published_rate_and_batch(preset):
    config = compose(preset)
    n = count(config.model).non_embedding
    assert config.optim.lr == pytest.approx(1.79 * n**-0.713 * 5e9**0.307, rel=5e-3)
    assert config.batch.sequences * 2048 == pytest.approx(0.58 * 5e9**0.571, rel=0.04)


def test_deepseek_counts_compute_without_the_head(preset):
    config = compose(preset, ["law.source=deepseek", "law.far=true"])
    d, layers, horizon = 768, 12, 5e9
    n = count(config.model).non_embedding
    compute = (6 * (n - (2 * layers + 1) * d) + 12 * layers * d * 2048) * horizon  # norms are not multiplied with
    assert config.optim.lr == pytest.approx(0.3118 * compute**-0.125, rel=5e-3)
    assert config.batch.sequences * 2048 == pytest.approx(0.292 * compute**0.3271, rel=0.04)


def test_the_resolved_configuration_has_the_numbers_and_composes_without_the_law(preset, tmp_path):
    config = compose(preset)
    (tmp_path / "resolved.toml").write_text(dump(config).replace("step-law", "gone"))
    again = compose(tmp_path / "resolved.toml")
    assert (again.optim.lr, again.batch.sequences) == (config.optim.lr, config.batch.sequences)
    assert again.law_record is None


def test_one_key_may_be_a_number(preset):
    config = compose(preset, ["optim.lr=0.5"])
    assert config.optim.lr == 0.5 and list(config.law_record["values"]) == ["batch.sequences"]


def test_a_law_of_the_batch_sees_the_rounded_batch(preset, tmp_path):
    square_root = fit("lr = c * B^b", {"c": 1e-6, "b": 0.5})
    path = write_laws(tmp_path / "laws.json", square_root, batch_fit())
    config = compose(preset, [f"law.source={path}"])
    assert config.optim.lr == pytest.approx(1e-6 * math.sqrt(config.batch.sequences * 2048), rel=5e-3)


def test_the_weight_decay_gives_the_timescale_of_a_publication(preset):
    config = compose(
        preset, ["optim.weight_decay=auto", "law.source=power-lines", "optim.lr=0.003", "batch.sequences=512"]
    )
    timescale = 1.084 * (5e9 / count(config.model).total) ** -0.527
    assert config.optim.weight_decay == pytest.approx(512 * 2048 / (0.003 * timescale * 5e9), rel=5e-3)
    assert any(
        "weight decay = batch / (learning rate * timescale * tokens)" in each for each in told(config.law_record)
    )
    assert "the law was measured with Adam under mup parametrisation" in " ".join(told(config.law_record))


def test_the_weight_decay_follows_the_rate_and_the_batch_of_the_same_laws(preset, tmp_path):
    timescale = fit("weight_decay_timescale", {"c": 1.084, "b": -0.527})
    path = write_laws(tmp_path / "laws.json", timescale, rate_fit(), batch_fit())
    config = compose(preset, [f"law.source={path}", "optim.weight_decay=auto"])
    per_parameter = 5e9 / count(config.model).non_embedding
    steps = 5e9 / (config.batch.sequences * 2048)
    expected = 1 / (config.optim.lr * 1.084 * per_parameter**-0.527 * steps)
    assert config.optim.weight_decay == pytest.approx(expected, rel=5e-3)
    record = config.law_record["values"]["optim.weight_decay"]
    assert record["interval"][0] < record["exact"] < record["interval"][1]


def test_warnings_of_a_law_are_recorded(preset, tmp_path):
    few = Verdict("warning", "few_cells", "5 cells for 3 coordinates")
    path = write_laws(tmp_path / "laws.json", replace(rate_fit(), verdicts=(few,)), batch_fit())
    values = compose(preset, [f"law.source={path}"]).law_record["values"]
    assert "law of lr (step_law_lr): 5 cells for 3 coordinates" in values["optim.lr"]["warnings"]
    assert not any("5 cells" in each for each in values["batch.sequences"]["warnings"])


def test_a_law_of_a_file_is_recorded_with_its_interval(preset, tmp_path):
    path = write_laws(tmp_path / "laws.json", rate_fit(), batch_fit())
    record = compose(preset, [f"law.source={tmp_path}"]).law_record
    rate = record["values"]["optim.lr"]
    assert record["source"] == str(path)
    assert rate["interval"][0] < rate["exact"] < rate["interval"][1]
    assert rate["formula"] == "lr = c * N^a * D^b" and rate["constants"]["a"] == -0.713
    assert rate["inputs"].keys() == {"N", "D"} and rate["value"] == round_rate(rate["exact"])
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_an_unknown_interval_is_null_and_told(preset):
    record = compose(preset, ["law.source=porian", "law.far=true"]).law_record
    assert record["values"]["optim.lr"]["interval"] is None
    assert any("no interval is known" in line for line in told(record))


@pytest.mark.parametrize("processes", [1, 2, 6, 8, 24, 64])
@pytest.mark.parametrize("micro", [None, 1, 3, 4])
@pytest.mark.parametrize("wanted", [30, 97, 1000, 4321])
def test_a_batch_is_one_that_the_mesh_and_the_micro_batch_carry(preset, processes, micro, wanted):
    changes = ["batch.sequences=64"] + ([f"batch.micro_sequences={micro}"] if micro else [])
    config = compose(preset, changes)
    sequences = round_batch(wanted * 2048, config, processes)
    assert sequences % processes == 0
    if processes * (micro or 1) <= wanted:
        assert sequences % (processes * (micro or 1)) == 0
    if wanted >= 16 * processes * (micro or 1):
        assert sequences == pytest.approx(wanted, rel=0.032)


def test_tensor_parallel_ranks_share_a_batch(preset):
    config = compose(preset, ["batch.sequences=64", "parallel.tensor=4"])
    assert round_batch(6 * 2048, config, 8) == 6
    assert round_batch(7 * 2048, compose(preset, ["batch.sequences=64"]), 8) == 8


def test_torchrun_s_processes_are_known(preset, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "7")
    assert compose(preset).batch.sequences % 7 == 0
    assert compose(preset, processes=11).batch.sequences % 11 == 0


def run_folder(tmp_path, text):
    folder = tmp_path / "runs" / "auto"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(text)
    return folder


def test_a_run_that_exists_keeps_its_numbers_whatever_the_law_says_by_now(preset, tmp_path):
    path = write_laws(tmp_path / "laws.json", rate_fit(), batch_fit())
    config = compose(preset, [f"law.source={path}"])
    run_folder(tmp_path, dump(config))
    for now in ("deepseek", path, tmp_path / "gone.json"):
        if now == path:
            write_laws(path, fit("step_law_lr", {"c": 99.0, "a": -0.5, "b": 0.0}))
        again = compose(preset, [f"law.source={now}"])
        assert (again.optim.lr, again.batch.sequences) == (config.optim.lr, config.batch.sequences)
    assert "as in" in told(again.law_record)[0]


@pytest.mark.parametrize("overrides", [(), ("optim.weight_decay=auto",)])
def test_run_json_keeps_the_law_while_the_numbers_are_its_own(preset, tmp_path, overrides):
    timescale = fit("weight_decay_timescale", {"c": 1.084, "b": -0.527})
    path = write_laws(tmp_path / "laws.json", timescale, rate_fit(), batch_fit())
    config = compose(preset, [f"law.source={path}", *overrides])
    first = identity(segments(config)[0], sources=[], law=config.law_record)
    assert first["law"]["values"]["optim.lr"]["value"] == config.optim.lr
    resumed = identity(segments(config)[0], sources=[], previous=first, law={"recorded": "config.toml", "values": {}})
    assert resumed["law"] == first["law"]
    other = compose(preset, ["optim.lr=0.25", "batch.sequences=64", "optim.weight_decay=0.3"])
    assert "law" not in identity(segments(other)[0], sources=[], previous=first)


REFUSED = {
    "no source": (["law.source="], "needs law.source: a laws file, or one of step-law, deepseek, porian"),
    "no law": (["law.source=nowhere"], "'nowhere' is neither a laws file nor a published law; accepted: step-law"),
    "no quantity": (["law.source=chinchilla"], "chinchilla has no law of batch_tokens; these have: step-law, deepseek"),
    "no timescale": (
        ["optim.weight_decay=auto", "optim.lr=0.1", "batch.sequences=64"],
        'optim.weight_decay = "auto": step-law has no law of timescale; these have: power-lines',
    ),
    "too far": (["schedule.horizon=100T"], "batch.sequences: .* times the most .*; law.far = true takes it"),
    "growth": (['growth=[{operator="stack", at="1B"}]'], "a law is of one shape, and this run grows"),
    "no value": (
        ["law.source=kaplan", "batch.sequences=64", "model.hidden_size=76800", "model.num_layers=90"],
        "optim.lr: law 'kaplan_lr' has no value at N",
    ),
    "another mistake": (["model.num_layers=-1"], "model.num_layers: input should be greater than 0"),
    "unknown key": (["law.sauce=1"], "unknown key law.sauce; did you mean source"),
    "a number": (["law.source=3"], "needs law.source"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_resolved_is_refused(preset, capsys, case):
    overrides, said = REFUSED[case]
    if overrides == ["law.source="]:
        preset.write_text(preset.read_text().replace('source = "step-law"', ""))
        overrides = []
    assert pretrain.main([str(preset), *overrides]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (preset.parent / "runs").exists()


def test_without_a_horizon_there_is_no_d(preset):
    tokens = "[evaluation]\nevery = 1\n[checkpoint]\nevery = 1\n[law]"
    text = preset.read_text().replace('horizon = "5B"', 'warmup = 0\nkind = "constant"').replace("[law]", tokens)
    preset.write_text(text)
    with pytest.raises(ValueError, match=r"batch.sequences: .* needs tokens, which is not known here; give schedule"):
        compose(preset)


def test_a_law_that_is_not_identified_is_refused(preset, tmp_path):
    path = write_laws(tmp_path / "laws.json", rate_fit(level="failure"), batch_fit())
    with pytest.raises(ValueError, match=r"the law of lr \(step_law_lr\) is not identified by its data: made by hand"):
        compose(preset, [f"law.source={path}"])


def test_a_timescale_of_far_smaller_runs_is_refused_unless_asked_for(preset, tmp_path):
    timescale = fit("weight_decay_timescale", {"c": 1.084, "b": -0.527}, largest=1e15)
    path = write_laws(tmp_path / "laws.json", timescale)
    given = [f"law.source={path}", "optim.weight_decay=auto", "optim.lr=0.003", "batch.sequences=64"]
    with pytest.raises(ValueError, match=r"optim.weight_decay: .* times the most .*; law.far = true takes it"):
        compose(preset, given)
    assert compose(preset, [*given, "law.far=true"]).optim.weight_decay > 0


def test_a_timescale_of_a_run_without_an_end_is_refused(preset, tmp_path):
    path = write_laws(tmp_path / "laws.json", fit("timescale = c * N^a", {"c": 1.0, "a": -0.1}))
    tokens = "[evaluation]\nevery = 1\n[checkpoint]\nevery = 1\n[law]"
    text = preset.read_text().replace('horizon = "5B"', 'warmup = 0\nkind = "constant"').replace("[law]", tokens)
    preset.write_text(text)
    given = [f"law.source={path}", "optim.weight_decay=auto", "optim.lr=0.003", "batch.sequences=64"]
    with pytest.raises(ValueError, match=r"optim.weight_decay: it needs the tokens of the run; give schedule.horizon"):
        compose(preset, given)


def test_far_extrapolation_is_taken_where_it_is_asked_for_with_a_warning(preset):
    record = compose(preset, ["schedule.horizon=100T", "law.far=true"]).law_record
    assert "times the most" in record["values"]["optim.lr"]["warnings"][0]


def test_another_optimizer_or_parametrisation_is_warned_of(preset):
    record = compose(preset, ["model.parametrization.kind=mup"]).law_record
    assert any("under mup" in line for line in record["values"]["optim.lr"]["warnings"])
    assert not compose(preset).law_record["values"]["optim.lr"]["warnings"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["schedule.horizon=10M"], "D = 1e+07 is outside of what was fitted, 2e+09 to 1e+11"),
        (["model.experts.count=8"], "measured on dense models, and this one has 8 experts"),
    ],
    ids=["far below", "experts"],
)
def test_what_a_published_law_was_not_measured_on_is_warned_of_once(preset, changed, words):
    record = compose(preset, changed).law_record
    assert all(any(words in each for each in value["warnings"]) for value in record["values"].values())
    assert sum(words in line for line in told(record)) == 1


def test_the_law_is_said_by_explain_and_by_a_dry_run(preset, capsys):
    assert explain.main([str(preset)]) == 0
    said = capsys.readouterr().out
    assert "optim.lr = " in said and "by step-law" in said and "95 % interval" in said and "2503.04715" in said


def test_columns_of_a_configuration_are_those_of_its_model_and_horizon(preset):
    config = compose(preset)
    known = columns_of(config)
    assert known["tokens"] == 5e9 and known["batch_tokens"] == config.batch.sequences * 2048
    assert known["flops"] == 5e9 * flops_per_token(config.model, 2048)
    assert known["flops"] - known["flops_without_head"] == 6 * 768 * 32000 * 5e9


def test_draws_are_not_needed(preset, tmp_path):
    path = write_laws(tmp_path / "laws.json", replace(rate_fit(), draws=np.empty((0, 3))), batch_fit())
    assert compose(preset, [f"law.source={path}"]).law_record["values"]["optim.lr"]["interval"] is None
