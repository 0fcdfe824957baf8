"""What the commands that explain and check a parametrisation print, write and refuse."""

import csv

import pytest
import torch

from launch import check_coordinates, explain, main
from launch.coordinates import Coordinate, at_width, recorded, slopes, with_base
from runtime.model.config import ModelConfig
from runtime.model.decoder import Decoder
from runtime.model.initialization import initialize
from tests.presets import SMALL

BASE = {"base_hidden_size": 4, "base_intermediate_size": 8, "base_num_heads": 1, "base_head_dim": 4}
MUP = ["model.parametrization.kind=mup", *(f"model.parametrization.{key}={size}" for key, size in BASE.items())]


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "small.toml"
    path.write_text(SMALL + "[schedule]\nhorizon = '1K'\n")
    return str(path)


def table(text: str) -> dict[str, dict[str, str]]:
    """The rows of a printed table by their first column; columns are two spaces apart."""
    header, *rows = (line.split("  ") for line in text.split("\n\n")[1].splitlines())
    header, *rows = ([cell.strip() for cell in row if cell.strip()] for row in (header, *rows))
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def test_the_table_of_roles_and_multipliers(preset, capsys):
    assert explain.main([preset, "--parametrization", *MUP]) == 0
    text = capsys.readouterr().out
    assert "mup parametrisation" in text and "optim.lr = 0.01" in text and "1 / sqrt(head_dim)" in text
    rows = table(text)
    assert rows["attention_in"] == {
        "modules": "q_proj k_proj v_proj",
        "tensors": "6",
        "parameters": f"{2 * 16 * (16 + 8 + 8):,}",
        "first values": "std 0.01",
        "lr": "0.25",
        "weight decay": "4",
        "eps": "0.25",
        "forward": "1",
    }
    assert (rows["embedding"]["weight decay"], rows["head"]["lr"], rows["final_norm"]["forward"]) == ("0", "1", "0.25")
    assert sum(int(row["parameters"].replace(",", "")) for row in rows.values()) == sum(
        each.numel() for each in Decoder(explain_config(preset)).parameters()
    )


def test_the_scale_of_muons_updates_gives_half_of_the_width_back(preset, capsys):
    assert explain.main([preset, "--parametrization", *MUP, "optim.name=muon"]) == 0
    text = capsys.readouterr().out
    assert "attention_in 0.4," in text and table(text)["attention_in"]["lr"] == "0.25"
    assert explain.main([preset, "--parametrization", *MUP]) == 0
    assert "orthogonal" not in capsys.readouterr().out.split("\n\n")[0]


def explain_config(preset: str) -> ModelConfig:
    from launch.config import compose

    return compose(preset).model


EVERYTHING = [
    'model.tying={ plan = "cycle", loops = 2, relaxation = "lora", own_scales = true, injection = "linear" }',
    'model.streams={ count = 2, quiet = true, backbone = "frozen" }',
]


def test_every_role_of_an_unusual_model_is_explained(preset, capsys):
    assert explain.main([preset, "--parametrization", *EVERYTHING]) == 0
    rows = table(capsys.readouterr().out)
    assert {"relaxation_in", "relaxation_out", "scale", "injection", "prefix", "prefix_bias", "bias"} <= rows.keys()
    assert rows["head"]["lr"] == "-" and rows["prefix"]["lr"] == "1" and rows["prefix_bias"]["first values"] == "-10"
    assert explain.main([preset, "--parametrization", "model.experts={ count = 4 }"]) == 0
    assert table(capsys.readouterr().out)["router_bias"]["lr"] == "-"


def coordinates(preset, folder, *arguments: str) -> int:
    return check_coordinates.main([preset, "--seq-len", "8", "--seeds", "1", "--out", str(folder), *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give --widths or --depths"),
        (("--widths", "16"), "--widths 16: accepted: two or more"),
        (("--widths", "16,20"), "num_kv_heads 2 x 20 / 16 is not whole"),
        (("--depths", "3,4", 'model.tying={ plan = "cycle", loops = 2 }'), "--depths 3,4: loops 2"),
        (("--depths", "2,4", "--steps", "0"), "--steps 0 is not positive"),
        (("--depths", "2,4", "model.parametrization.kind=best"), "model.parametrization.kind"),
    ],
)
def test_bad_input_is_one_line_and_code_2(preset, tmp_path, capsys, arguments, words):
    assert coordinates(preset, tmp_path / "out", *arguments) == 2
    message = capsys.readouterr().err
    assert words in message and message.startswith("error: ") and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tokens-per-second", "0"), "--tokens-per-second 0 is not positive"),
        (("--tokens", "many"), "--tokens: 'many' is not a token count"),
        (("--processes", "3"), "3"),
        (("--plot", "/nowhere/plot.png"), "cannot write /nowhere/plot.png"),
        (("schedule.horizon=none",), "schedule.horizon"),
    ],
)
def test_what_cannot_be_explained(preset, capsys, arguments, words):
    assert explain.main([preset, *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and words in message


def test_explain_without_a_file(capsys):
    assert explain.main(["nowhere.toml", "--parametrization"]) == 2 and "nowhere.toml" in capsys.readouterr().err


def test_both_are_verbs():
    assert {"explain", "check_coordinates"} <= main.VERBS.keys()


WIDTHS = ("--widths", "16,32,64", "--steps", "2", "--lr", "0.003")


def test_the_check_tells_parametrisations_apart(preset, tmp_path, capsys):
    assert coordinates(preset, tmp_path, *WIDTHS, "model.parametrization.kind=mup") == 0
    assert "transfers over width" in capsys.readouterr().out
    with (tmp_path / "coordinates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["axis"], row["size"]) for row in rows} == {("width", size) for size in ("16", "32", "64")}
    assert {row["step"] for row in rows} == {"0", "1", "2"}
    assert {row["depth"] for row in rows if row["output"] == "attention.q_proj"} == {"0", "1"}
    assert (tmp_path / "coordinates.png").stat().st_size > 10_000
    assert coordinates(preset, tmp_path, *WIDTHS) == check_coordinates.NOT_TRANSFERRING
    assert "does not transfer over width: after 2 steps beyond 0.3: attention.q_proj" in capsys.readouterr().out


def test_over_depths_completep_transfers_and_the_standard_one_does_not(preset, tmp_path, capsys):
    depths = ("--depths", "2,4,8", "--steps", "2", "--lr", "0.03")
    assert coordinates(preset, tmp_path, *depths, "model.parametrization.kind=completep") == 0
    assert "transfers over depth: every slope" in capsys.readouterr().out
    assert coordinates(preset, tmp_path, *depths) == check_coordinates.NOT_TRANSFERRING
    assert "block" in capsys.readouterr().out.rpartition("beyond 0.3: ")[2]


def test_each_use_of_a_reused_block_is_recorded():
    tying = {"plan": "cycle", "loops": 3, "own_norms": True}
    model = ModelConfig(num_layers=6, hidden_size=8, intermediate_size=8, num_heads=2, vocab_size=11, tying=tying)
    found = recorded(Decoder(model), torch.arange(8).view(2, 4))
    for output in ("attention.q_proj", "feed_forward.down_proj", "feed_forward_norm", "block", "attention_logits"):
        assert [depth for name, depth in found if name == output] == list(range(6)), output
    assert {name for name, depth in found if depth is None} == {"embedding", "norm", "logits"}
    assert not torch.equal(found["block", 0], found["block", 2])


def test_each_injection_is_recorded_and_parameters_that_are_handed_out_are_not():
    model = ModelConfig(
        num_layers=4,
        hidden_size=8,
        intermediate_size=8,
        num_heads=2,
        vocab_size=11,
        norm_scaling="depth",
        init="normal",
        tying={"plan": "cycle", "loops": 2, "own_norms": True, "relaxation": "lora", "injection": "linear"},
        streams={"count": 2, "prefix_tokens": 3},
    )
    decoder = Decoder(model)
    initialize(decoder, 0)
    found = recorded(decoder, torch.arange(8).view(2, 4))
    assert [depth for name, depth in found if name == "injection"] == [0, 2]
    assert not torch.equal(found["injection", 0], found["injection", 2])
    assert not any(name.startswith("depths") or name.endswith("prefix") for name, _ in found)
    assert not any(value.requires_grad for value in found.values())


OF_DEPTHS = {
    "LoRA": 'model.tying={ plan = "cycle", loops = 2, relaxation = "lora", rank = 4 }',
    "streams": "model.streams={ count = 2, prefix_tokens = 4 }",
    "prefixes of blocks": 'model.streams={ count = 2, prefix_tokens = 4, prefix = "block" }',
}


@pytest.mark.parametrize("option", OF_DEPTHS.values(), ids=OF_DEPTHS)
@pytest.mark.filterwarnings("error")
def test_what_belongs_to_depths_transfers_under_mup(preset, tmp_path, option):
    assert coordinates(preset, tmp_path, *WIDTHS, "model.parametrization.kind=mup", option) == 0


def test_the_check_looks_inside_experts(preset, tmp_path, capsys):
    experts = "model.experts={ count = 3 }"
    assert coordinates(preset, tmp_path, *WIDTHS, "model.parametrization.kind=mup", experts) == 0
    assert coordinates(preset, tmp_path, *WIDTHS, experts) == check_coordinates.NOT_TRANSFERRING
    beyond = capsys.readouterr().out.rpartition("beyond 0.3: ")[2]
    assert all(f"feed_forward.{each}" in beyond for each in ("router", "experts.gate_proj", "experts.down_proj"))


def test_slopes_are_those_of_the_logarithms():
    rows = [
        Coordinate(size, seed, 0, "norm", depth, (1 + seed) * size**0.5, 0.0)
        for size in (2, 4, 16)
        for seed in range(2)
        for depth in range(3)
    ]
    assert slopes(rows) == {("norm", 0): pytest.approx(0.5)}


def test_the_base_is_the_smallest_unless_one_is_given():
    options = {"kind": "mup", **BASE}
    model = ModelConfig(
        num_layers=1, hidden_size=8, intermediate_size=16, num_heads=2, vocab_size=9, parametrization=options
    )
    first, second = with_base([at_width(model, width) for width in (8, 16)])
    assert first.parametrization == second.parametrization
    assert (second.parametrization.base_hidden_size, second.parametrization.base_intermediate_size) == (4, 8)
    assert (second.num_heads, second.head_dim, second.intermediate_size) == (4, 4, 32)
    assert at_width(model, 16, "head_dim").head_dim == 8
