"""Folding into a plain decoder: equal logits, the same bits where nothing is folded, and what no plain one computes."""

import pytest
import torch

from runtime.checkpoint import hugging_face, megatron, native
from runtime.checkpoint.interchange import Weights
from runtime.model.decoder import Decoder
from runtime.model.folding import to_dense
from tests.growing import config, random_decoder, random_tokens, weights

OWN = {"plan": "middle_cycle", "loops": 2, "own_norms": True, "own_scales": True}
MUP = {
    "kind": "completep",
    "base_hidden_size": 8,
    "base_intermediate_size": 20,
    "base_num_heads": 2,
    "base_head_dim": 2,
    "base_num_layers": 3,
    "embedding_multiplier": 3.0,
    "output_multiplier": 1.7,
}
CASES = {
    "cycle_reverse": {"tying": {"plan": "cycle_reverse", "loops": 3}},
    "a list": {"tying": {"plan": (0, 0, 1, 0, 1, 1)}},
    "LoRA": {"tying": OWN | {"relaxation": "lora", "rank": 3, "ranks": {"q_proj": 2, "down_proj": 0}}},
    "MiSS with a remainder": {"tying": OWN | {"relaxation": "miss", "rank": 5}, "num_kv_heads": 2},
    "CompleteP": {"parametrization": MUP, "tying": OWN, "tie_embeddings": True},
    "CompleteP, qk norm": {"parametrization": MUP, "qk_norm": True},
    "layer norm": {"norm": "layernorm", "parametrization": MUP},
    "experts": {"experts": {"count": 3}, "tying": OWN, "parametrization": MUP},
}


def dense(decoder: Decoder) -> Decoder:
    model, tensors = to_dense(decoder.config, weights(decoder))
    plain = Decoder(model).double()
    plain.load_state_dict(tensors)
    return plain


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_stay(options):
    decoder = random_decoder(config(num_layers=6, **options))
    plain = dense(decoder)
    kept = {key: each for key, each in options.items() if key not in ("tying", "parametrization")}
    assert plain.config == config(num_layers=6, **kept)
    found, wanted = (each(random_tokens()) for each in (plain, decoder))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11 * float(wanted.abs().max()))


def test_norm_scaling_goes_into_the_gains():
    """Whose divisors are float64 in the forward, whatever the stream is."""
    decoder = random_decoder(config(num_layers=6, norm_scaling="depth", init="normal", tying=OWN))
    found, wanted = (each(random_tokens()) for each in (dense(decoder), decoder))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11 * float(wanted.abs().max()))


def test_a_plain_decoder_stays_as_it_is():
    decoder = random_decoder(config())
    before = weights(decoder)
    model, tensors = to_dense(decoder.config, before)
    assert model == decoder.config
    assert tensors.keys() == before.keys() and all(tensors[name] is before[name] for name in before)


CYCLE = {"plan": "cycle", "loops": 2}
REFUSED = {
    "streams": ({"streams": {"count": 2}}, "model.streams.count = 2"),
    "streams of a tied model": ({"streams": {"count": 2}, "tying": CYCLE}, "model.streams.count = 2"),
    "sandwich norms": ({"sandwich_norm": "branch"}, "model.sandwich_norm = 'branch'"),
    "injection": ({"tying": CYCLE | {"injection": "add"}}, 'model.tying.injection = "add"'),
    "experts with a bias": ({"experts": {"count": 4}}, 'model.experts.balance = "bias"'),
    "experts that are not normalised": (
        {"experts": {"count": 4, "balance": "none", "normalize": False}},
        "model.experts.normalize = false",
    ),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_no_other_format_has_is_refused(options, words):
    decoder = random_decoder(config(**options))
    at_rest = Weights(decoder.config, weights(decoder), seq_len=8)
    with pytest.raises(ValueError, match=words):
        hugging_face.to_hugging_face(at_rest)
    with pytest.raises(ValueError, match="model.experts.count = 4" if "experts" in options else words):
        megatron.to_megatron(at_rest)


@pytest.mark.parametrize("options", [CASES["LoRA"], {"streams": {"count": 2}}, CASES["experts"]], ids=str)
def test_our_own_format_keeps_everything(options, tmp_path):
    decoder = random_decoder(config(num_layers=6, **options)).float()
    native.write(Weights(decoder.config, weights(decoder), seq_len=8), str(tmp_path / "run"), "a test")
    read = native.read(tmp_path / "run")
    assert read.config == decoder.config
    assert all(torch.equal(read.tensors[name], each) for name, each in weights(decoder).items())
    assert read.tensors.keys() == weights(decoder).keys()
