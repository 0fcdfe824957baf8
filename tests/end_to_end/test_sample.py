"""Sampling: the cache changes nothing, seeds repeat, text streams whole characters, bad input is refused."""

import itertools

import pytest
import torch

from launch.sample import main, open_model, sample_lines, text_pieces
from runtime.checkpoint import hugging_face
from runtime.checkpoint.interchange import load_tokenizer
from runtime.model.decoder import Decoder
from runtime.model.generation import Sampling, generate
from tests.end_to_end.checkpoints import NAME, small_tokenizer, small_weights, write_run

TOKENIZER = small_tokenizer()
PROMPTS = ["def add(", "naïve 日本", ""]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    weights = small_weights(tokenizer=TOKENIZER)
    average = small_weights(seed=1)
    return str(write_run(tmp_path_factory.mktemp("runs") / "run", weights, average))


def decoder_of(**options):
    weights = small_weights(**options)
    decoder = Decoder(weights.config)
    decoder.load_state_dict(weights.tensors)
    return decoder


def ids(decoder, prompt, tokens, sampling, seed=0, **options):
    return list(generate(decoder, prompt, tokens, sampling, torch.Generator().manual_seed(seed), **options))


OPTIONS = {
    "grouped queries": {},
    "qk norm": {"qk_norm": True},
    "tied": {"tie_embeddings": True},
    "layer norm": {"norm": "layernorm"},
}


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0, top_k=20, top_p=0.9)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("prompt", [[5], list(range(1, 40))], ids=["one token", "39 tokens"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_cache_changes_nothing(options, prompt, sampling):
    decoder = decoder_of(**options)
    cached = ids(decoder, prompt, 60, sampling)
    assert cached == ids(decoder, prompt, 60, sampling, use_cache=False)
    assert len(set(cached)) > 3, "the comparison says nothing about a constant"


def test_greedy_takes_the_most_probable_token():
    decoder = decoder_of()
    tokens = [3, 1, 4]
    for token in ids(decoder, tokens, 10, Sampling(0)):
        with torch.no_grad():
            assert token == int(decoder(torch.tensor([tokens]))[0, -1].argmax())
        tokens = [*tokens, token]


def test_seeds_repeat_and_differ(run):
    first, again, other = (sample_lines(run, PROMPTS, max_tokens=30, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert sample_lines(run, PROMPTS[1:], max_tokens=30, seed=1) == first[1:], "prompts do not disturb each other"


def test_a_hugging_face_folder_samples_as_its_source(run, tmp_path):
    weights = open_model(run)
    hugging_face.write(small_weights(tokenizer=TOKENIZER), tmp_path)
    assert weights.end_of_text == 0
    greedy = {"max_tokens": 20, "temperature": 0}
    assert sample_lines(str(tmp_path), PROMPTS[:2], **greedy) == sample_lines(run, PROMPTS[:2], **greedy)


def test_the_average_can_be_sampled(run):
    lines = [sample_lines(run, PROMPTS[:1], max_tokens=20, temperature=0, weights=each) for each in ("model", "ema")]
    assert lines[0] != lines[1]


def test_generation_ends_before_the_stop_token_and_inside_the_tokenizers_vocabulary():
    decoder = decoder_of()
    free = ids(decoder, [5], 40, Sampling(1.0))
    stop = free[7]
    assert ids(decoder, [5], 40, Sampling(1.0), stop=(stop,)) == free[: free.index(stop)]
    assert max(ids(decoder, [5], 40, Sampling(5.0), vocab_size=17)) < 17 < max(free)


LOGITS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
DRAWS = {
    "all": (Sampling(1.0), {0, 1, 2, 3, 4}),
    "greedy": (Sampling(0), {0}),
    "top 2": (Sampling(1.0, top_k=2), {0, 1}),
    "more than there are": (Sampling(1.0, top_k=9), {0, 1, 2, 3, 4}),
    "nucleus of 0.6": (Sampling(1.0, top_p=0.6), {0, 1}),
    "nucleus of the first": (Sampling(1.0, top_p=1e-9), {0}),
    "nucleus of all": (Sampling(1.0, top_p=1.0), {0, 1, 2, 3, 4}),
    "nucleus within the top 2": (Sampling(1.0, top_k=2, top_p=0.7), {0}),
    "nearly greedy": (Sampling(1e-9), {0}),
}


@pytest.mark.parametrize("sampling, expected", DRAWS.values(), ids=DRAWS)
def test_draws_come_from_the_kept_tokens(sampling, expected):
    generator = torch.Generator().manual_seed(0)
    assert {sampling.draw(LOGITS, generator) for _ in range(400)} == expected


def test_draws_follow_the_temperature():
    generator = torch.Generator().manual_seed(0)
    drawn = [Sampling(2.0).draw(LOGITS, generator) for _ in range(4000)]
    frequencies = torch.bincount(torch.tensor(drawn)) / 4000
    torch.testing.assert_close(frequencies, (LOGITS / 2).softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("text", ["日本語 🙂🙂 naïve — €", "def f():\n    return 1\n", "𝄞"])
def test_pieces_join_to_the_text_and_split_no_character(text):
    tokenizer = load_tokenizer(TOKENIZER, "tokenizer")
    tokens = tokenizer.encode(text).ids
    assert len(tokens) > 1
    for cut in range(len(text) // 2):
        prompt = tokenizer.encode(text[:cut]).ids
        rest = tokenizer.encode(text[cut:]).ids
        pieces = list(text_pieces(tokenizer, prompt, iter(rest)))
        assert "".join(pieces) == text[cut:]
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_character_are_shown_at_the_end_and_do_not_pile_up():
    tokenizer = load_tokenizer(TOKENIZER, "tokenizer")
    start = tokenizer.token_to_id("ð")  # byte F0, the first of four
    assert "".join(text_pieces(tokenizer, [], iter([start]))) == "\ufffd"
    stream = text_pieces(tokenizer, [], itertools.repeat(start))
    assert "\ufffd" in next(stream) + next(stream)


def test_the_command_prints_each_prompt_with_its_continuation(run, capsys):
    arguments = [f"{run}/checkpoints/{NAME}", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--max-tokens", "20"]
    assert main([*arguments, "--seed", "3", "--temperature", "1.1", "--top-k", "50", "--top-p", "0.95"]) == 0
    lines = sample_lines(run, PROMPTS[:2], max_tokens=20, seed=3, temperature=1.1, top_k=50, top_p=0.95)
    assert capsys.readouterr().out == "\n\n".join(lines) + "\n"
    assert all(
        line.startswith(prompt) and len(line) > len(prompt) for line, prompt in zip(lines, PROMPTS, strict=False)
    )


REFUSALS = {
    "no such checkpoint": (["nothing"], "nothing does not exist"),
    "negative temperature": (["{run}", "--temperature", "-1"], "temperature -1"),
    "temperature not a number": (["{run}", "--temperature", "nan"], "temperature nan"),
    "top-k of none": (["{run}", "--top-k", "0"], "top-k 0"),
    "top-p past one": (["{run}", "--top-p", "1.5"], "top-p 1.5"),
    "no tokens": (["{run}", "--max-tokens", "0"], "--max-tokens 0"),
    "no average": (["{plain}", "--weights", "ema"], "no ema weights"),
    "no tokenizer": (["{plain}", "--prompt", "a"], "has no tokenizer; give one with --tokenizer"),
    "no such tokenizer": (["{plain}", "--tokenizer", "none.json"], "none.json"),
    "no such device": (["{run}", "--device", "abacus"], "--device abacus"),
    "a vocabulary too small": (["{narrow}", "--prompt", "日本"], "the model's vocabulary has 20"),
    "diverged": (["{diverged}", "--prompt", "a"], "not finite"),
}


@pytest.fixture(scope="module")
def others(tmp_path_factory, run):
    folder = tmp_path_factory.mktemp("others")
    diverged = small_weights(tokenizer=TOKENIZER)
    diverged.tensors["norm.weight"][0] = float("nan")
    return {
        "run": run,
        "plain": write_run(folder / "plain", small_weights()),
        "narrow": write_run(folder / "narrow", small_weights(tokenizer=TOKENIZER, vocab_size=20)),
        "diverged": write_run(folder / "diverged", diverged),
    }


@pytest.mark.parametrize("arguments, message", REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_one_line(arguments, message, others, capsys):
    assert main([each.format(**others) for each in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
