"""`convert` from the command line: every direction, what it refuses, and that it leaves nothing behind then."""

import json
import os
import random
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest
import torch

from launch.convert import main
from runtime.checkpoint import formats, hugging_face
from runtime.checkpoint.store import CheckpointStore
from runtime.checkpoint.unsharded import open_unsharded
from runtime.config import StartConfig
from runtime.data.tokenizer import END_OF_TEXT
from runtime.model.config import ModelConfig
from runtime.model.decoder import Decoder
from runtime.state import TrainState
from tests.end_to_end.checkpoints import NAME, small_tokenizer, small_weights, write_run

TOKENS = torch.arange(34).view(2, 17) * 13 % 300
TOKENIZER = small_tokenizer()


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", small_weights(tokenizer=TOKENIZER), ema=small_weights(seed=1))


@torch.no_grad()
def logits(weights):
    decoder = Decoder(weights.config)
    decoder.load_state_dict(weights.tensors)
    return decoder(TOKENS)


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("source", ["{}", "{}/", f"{{}}/checkpoints/{NAME}", "{}/checkpoints", "file://{}"])
def test_a_run_a_checkpoint_and_a_url_convert_alike(source, run, tmp_path, capsys):
    assert main([source.format(run), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    assert same(hugging_face.read(tmp_path / "hf").tensors, small_weights().tensors)


def test_huggingface_export_generates_text_by_its_own_tokenizer(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert main([str(run), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    text = "def add(naïve): 日本語 🙂\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == END_OF_TEXT
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 64
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, logits(small_weights()), atol=1e-4, rtol=1e-4)
    greedy = model.generate(TOKENS[:1], max_new_tokens=5, do_sample=False)
    assert greedy.shape[1] > TOKENS.shape[1]


@pytest.mark.parametrize("there", ["huggingface", "megatron"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "tie_embeddings": True}], ids=["plain", "qk norm, tied"])
def test_out_and_back_is_the_same_model_at_clock_zero(there, options, tmp_path):
    weights = small_weights(tokenizer=TOKENIZER, **options)
    write_run(tmp_path / "run", weights)
    assert main([str(tmp_path / "run"), str(tmp_path / "there"), "--to", there]) == 0
    assert formats.detect(tmp_path / "there") == there
    assert main([str(tmp_path / "there"), str(tmp_path / "back"), "--to", "meristem"]) == 0
    tensors, state = open_unsharded(tmp_path / "back")
    assert same(tensors, {f"model.{name}": each for name, each in weights.tensors.items()})
    assert state["model"] == weights.config.model_dump(mode="json")
    assert state["tokenizer"]["json"] == TOKENIZER
    assert TrainState.from_json(state["train"]).clock.tokens == 0
    back = formats.read(tmp_path / "back")
    assert (back.seq_len, back.end_of_text) == (64, 0)


def test_an_imported_checkpoint_loads_through_the_store(tmp_path):
    """As `start.from` with `start.carry = "weights"` does: in place, into another decoder's parameters."""
    folder = tmp_path / "hf"
    folder.mkdir()
    hugging_face.write(small_weights(), folder)
    assert main([str(folder), str(tmp_path / "imported"), "--to", "meristem"]) == 0
    store = CheckpointStore(str(tmp_path / "imported" / "checkpoints"), read_only=True)
    decoder = Decoder(small_weights().config)
    store.load(store.newest(), {f"model.{name}": each.detach() for name, each in decoder.named_parameters()})
    store.close()
    with torch.no_grad():
        assert torch.equal(decoder(TOKENS), logits(small_weights()))


def test_an_import_prints_the_sections_that_train_from_it(run, tmp_path, capsys):
    assert main([str(run), str(tmp_path / "imported"), "--to", "meristem"]) == 0
    summary, _, preset = capsys.readouterr().out.partition("\n\n")
    assert "23,736 parameters" in summary
    sections = tomllib.loads(preset)
    assert ModelConfig(**sections["model"]) == small_weights().config
    assert StartConfig(**sections["start"]) == StartConfig(from_=str(tmp_path / "imported"), carry="weights")


def test_one_foreign_format_converts_to_the_other(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    hugging_face.write(small_weights(), folder)
    assert main([str(folder), str(tmp_path / "megatron"), "--to", "megatron", "--spec", "transformer-engine"]) == 0
    assert json.loads((tmp_path / "megatron/megatron.json").read_text())["padded_vocab_size"] == 384
    assert same(formats.read(tmp_path / "megatron").tensors, small_weights().tensors)


def test_the_average_is_exported_when_asked_for(run, tmp_path):
    assert main([str(run), str(tmp_path / "hf"), "--to", "huggingface", "--weights", "ema"]) == 0
    assert same(hugging_face.read(tmp_path / "hf").tensors, small_weights(seed=1).tensors)


def test_layer_norm_becomes_rmsnorm_and_the_function_stays(tmp_path):
    weights = small_weights(norm="layernorm", tie_embeddings=True)
    write_run(tmp_path / "run", weights)
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "meristem", "--norm", "rmsnorm"]) == 0
    folded = formats.read(tmp_path / "out")
    assert folded.config.norm == "rmsnorm" and not folded.config.tie_embeddings
    torch.testing.assert_close(logits(folded), logits(weights), atol=1e-4, rtol=1e-4)


def test_import_to_a_url(run):
    import fsspec

    assert main([str(run), "memory://imported", "--to", "meristem"]) == 0
    assert same(formats.read("memory://imported").tensors, small_weights().tensors)
    assert main([str(run), "memory://imported", "--to", "meristem"]) == 2
    fsspec.filesystem("memory").rm("/imported", recursive=True)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


REFUSALS = {
    "no source": (lambda run: None, ["nothing", "--to", "huggingface"], "nothing does not exist"),
    "empty folder": (
        lambda run: (run.parent / "e").mkdir(),
        ["e", "--to", "megatron"],
        "there is no complete checkpoint",
    ),
    "existing out": (lambda run: (run.parent / "out").mkdir(), ["run", "--to", "huggingface"], "out exists"),
    "existing out file": (lambda run: (run.parent / "out").write_text(""), ["run", "--to", "meristem"], "out exists"),
    "no average": (
        lambda run: write_run(run.parent / "plain", small_weights()),
        ["plain", "--to", "huggingface", "--weights", "ema"],
        "holds no ema weights",
    ),
    "unknown length": (
        lambda run: write_run(run.parent / "plain", replace(small_weights(), seq_len=None)),
        ["plain", "--to", "huggingface"],
        "give --seq-len",
    ),
    "damaged state": (
        lambda run: _flip(run / "checkpoints" / NAME / "state.json"),
        ["run", "--to", "huggingface"],
        "state.json is damaged",
    ),
    "other version": (lambda run: _save_state(run, format=99), ["run", "--to", "megatron"], "format 99"),
    "broken shape": (
        lambda run: _save_state(run, model={"num_layers": "many"}),
        ["run", "--to", "huggingface"],
        "num_layers",
    ),
    "half precision here": (
        lambda run: None,
        ["run", "--to", "meristem", "--dtype", "bfloat16"],
        "--dtype bfloat16",
    ),
    "spec elsewhere": (lambda run: None, ["run", "--to", "huggingface", "--spec", "local"], "--spec"),
    "bad multiple": (lambda run: None, ["run", "--to", "megatron", "--vocab-multiple", "0"], "--vocab-multiple 0"),
    "no such tokenizer": (lambda run: None, ["run", "--to", "megatron", "--tokenizer", "none.json"], "none.json"),
    "not a tokenizer": (
        lambda run: (run.parent / "bad.json").write_text("{}"),
        ["run", "--to", "megatron", "--tokenizer", "bad.json"],
        "bad.json is not a tokenizer.json",
    ),
    "tokenizer too large": (
        lambda run: write_run(run.parent / "narrow", small_weights(tokenizer=TOKENIZER, vocab_size=200)),
        ["narrow", "--to", "megatron", "--tokenizer", "tokenizer.json"],
        "tokens, and the model's vocabulary 200",
    ),
    "unknown protocol": (lambda run: None, ["nowhere://x", "--to", "huggingface"], "nowhere"),
}


def _save_state(run, **changes):
    """One more checkpoint, intact, of a state that is not ours."""
    weights = small_weights()
    state = {"format": 1, "model": weights.config.model_dump(mode="json")} | changes
    store = CheckpointStore(str(run / "checkpoints"))
    tensors = {f"model.{name}": each for name, each in weights.tensors.items()}
    store.save("tokens-2048-segment-0", tensors, state, asynchronous=False)
    assert store.close()


@pytest.mark.parametrize("prepare, arguments, message", REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_one_line_and_leaves_nothing(prepare, arguments, message, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "damaged" in message:
        arguments = [f"run/checkpoints/{NAME}", *arguments[1:]]
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    prepare(run)
    before = sorted(os.listdir(tmp_path))
    assert main([arguments[0], "out", *arguments[1:]]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
    assert message in captured.err
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("to", ["huggingface", "megatron"])
def test_a_byte_changed_anywhere_is_refused_or_harmless(to, run, tmp_path):
    """Never another error than ValueError, with one line; 40 changes in every file of a foreign folder."""
    assert main([str(run), str(tmp_path / "there"), "--to", to]) == 0
    draw = random.Random(0)
    refused = 0
    for path in sorted(each for each in (tmp_path / "there").rglob("*") if each.is_file()):
        whole = path.read_bytes()
        for _ in range(40):
            at = draw.randrange(min(len(whole), 3000))
            junk = draw.choice(
                [b"", b"null", b"-1", b"[]", b"1e999", b"\xff", bytes([whole[at] ^ 1 << draw.randrange(8)])]
            )
            path.write_bytes(whole[:at] + junk + (whole[at + max(1, len(junk)) :] if draw.random() < 0.7 else b""))
            try:
                formats.read(tmp_path / "there")
            except ValueError as error:
                refused += 1
                assert "\n" not in str(error)
        path.write_bytes(whole)
    assert refused > 100


def test_a_failing_write_leaves_no_folder(run, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runtime.checkpoint.tensor_files.save_file", full)
    assert main([str(run), str(tmp_path / "out"), "--to", "huggingface"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run"]


def test_the_script_runs_as_a_module_and_explains_itself(run, tmp_path):
    command = [sys.executable, "-m", "launch.convert"]
    assert "--to" in subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    failed = subprocess.run([*command, "none", "out", "--to", "megatron"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and failed.stderr == "error: none does not exist\n"
