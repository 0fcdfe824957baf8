"""Tokenizers: any text survives, and a tokenizer.json means the same wherever it lies."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.data import tokenizer as bpe

TEXTS = ["def add(left, right):\n    return left + right\n" * 20, "Grüße, 世界! 🌱\n" * 20]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.train(TEXTS, 280).save(str(path))
    return path


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=100, deadline=None)
def test_any_text_survives(saved, text):
    tokenizer = bpe.load(saved)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert bpe.end_of_document(tokenizer) not in ids


def test_the_end_token_written_in_a_document_is_text(saved):
    tokenizer = bpe.load(saved)
    text = f"a{bpe.END_OF_TEXT}b"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert bpe.end_of_document(tokenizer) == 0 and 0 not in ids
    assert tokenizer.decode(ids) == text


def test_training_is_repeatable_and_of_the_size_asked_for(saved, tmp_path):
    bpe.train(TEXTS, 280).save(str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_bytes() == saved.read_bytes()
    assert bpe.vocabulary_size(bpe.load(saved)) == 280
    with pytest.raises(ValueError, match="256 is too small"):
        bpe.train(TEXTS, 256)


def test_documents_are_never_truncated_or_padded(saved, tmp_path):
    content = json.loads(saved.read_text())
    content["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": bpe.END_OF_TEXT,
    }  # fmt: skip
    (tmp_path / "limited.json").write_text(json.dumps(content))
    limited = bpe.load(tmp_path / "limited.json")
    for text in ("x", "left right " * 9):
        assert limited.encode(text).ids == bpe.load(saved).encode(text).ids


def test_fingerprint_is_of_the_content(saved, tmp_path):
    content = json.loads(saved.read_text())
    (tmp_path / "compact.json").write_text(json.dumps(dict(reversed(content.items()))))
    assert bpe.fingerprint(tmp_path / "compact.json") == bpe.fingerprint(saved)
    content["model"]["merges"].pop()
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert bpe.fingerprint(tmp_path / "other.json") != bpe.fingerprint(saved)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"}}', None])
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: ") as refusal:
        bpe.load(path)
    assert type(refusal.value) is ValueError


def test_the_end_of_a_document_is_found_by_name(saved):
    tokenizer = bpe.load(saved)
    assert bpe.end_of_document(tokenizer, "A") == tokenizer.token_to_id("A")
    with pytest.raises(ValueError, match="'<nothing>'; name one of its tokens"):
        bpe.end_of_document(tokenizer, "<nothing>")
