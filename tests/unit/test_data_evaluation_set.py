"""Held-out sets: each target counted once, by any number of ranks making equally many forward passes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.data.evaluation_set import EvaluationSet
from runtime.model.cross_entropy import IGNORE
from tests.token_files import random_documents, write_tokens


def targets_of(batches) -> list[int]:
    return [target for batch in batches for target in batch.targets.flatten().tolist() if target != IGNORE]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(tokens=st.integers(2, 120), seq_len=st.integers(1, 20), size=st.integers(1, 5), micro=st.integers(1, 7))
def test_every_target_is_evaluated_once(tmp_path, tokens, seq_len, size, micro):
    path = write_tokens(tmp_path / "a", [range(tokens)])
    ranks = [list(EvaluationSet(path, seq_len, tokens).batches(rank, size, micro)) for rank in range(size)]
    assert len({len(batches) for batches in ranks}) == 1
    shapes = {part.shape for batches in ranks for batch in batches for part in batch[:2]}
    assert len(shapes) == 1, "one shape, so a compiled model is compiled once"
    assert sorted(targets_of(batch for batches in ranks for batch in batches)) == list(range(1, tokens))
    for batches in ranks:
        for batch in batches:
            valid = batch.targets != IGNORE
            assert (batch.targets == batch.tokens + 1)[valid].all(), "each target follows its token"


def test_no_rank_repeats_a_row_to_fill_up(tmp_path):
    """Five windows on four ranks: two forward passes each, and the surplus rows have no target."""
    evaluation = EvaluationSet(write_tokens(tmp_path / "a", [range(5 * 8 + 1)]), 8, 100)
    counts = [[int((b.targets != IGNORE).sum()) for b in evaluation.batches(rank, 4, 1)] for rank in range(4)]
    assert counts == [[8, 8], [8, 8], [8, 0], [0, 0]]
    assert [len(batch.tokens) for batch in evaluation.batches(0, 4, 99)] == [2], "no wider than a share"


@pytest.mark.parametrize(
    ("limit", "first_tokens"), [(1, [0]), (3, [0, 24, 48]), (9, range(0, 72, 8)), (99, range(0, 73, 8))]
)
def test_a_limit_takes_windows_spread_over_the_set(tmp_path, limit, first_tokens):
    evaluation = EvaluationSet(write_tokens(tmp_path / "a", [range(75)]), 8, 100, max_sequences=limit)
    found = [row[0].item() for batch in evaluation.batches(0, 1, 2) for row in batch.tokens]
    assert found[: evaluation.num_sequences] == [*first_tokens]


def test_targets_across_documents_are_ignored_with_a_document_mask(tmp_path):
    documents = [each for each in random_documents(0, 40) if each]
    path = write_tokens(tmp_path / "a", documents)
    total = sum(map(len, documents))
    assert len(targets_of(EvaluationSet(path, 8, 500).batches(0, 1, 4))) == total - 1
    masked = list(EvaluationSet(path, 8, 500, document_mask=True).batches(0, 1, 4))
    assert len(targets_of(masked)) == total - len(documents)
    ids = [each for batch in masked for each in batch.document_ids.flatten().tolist()]
    owners = [k for k, each in enumerate(documents) for _ in each]
    known = [each for each in ids if each >= 0]
    assert known in (owners, owners[:-1]), "padding belongs to no document"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_batches_for_a_gpu_are_pinned(tmp_path, monkeypatch, on_gpu):
    """So that their copies do not wait; with all that they have, and the targets that are left out."""
    path, pinned = write_tokens(tmp_path / "a", [range(10)]), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batches = list(EvaluationSet(path, 8, 10, document_mask=True).batches(0, 1, 1))
    assert {id(each) for each in pinned} == ({id(each) for batch in batches for each in batch} if on_gpu else set())
    assert sorted(targets_of(batches)) == list(range(1, 10))


@pytest.mark.parametrize(
    ("metadata", "expected"), [({"bytes": 30}, 3.0), ({}, None), ({"bytes": "many"}, None), (None, None)]
)
def test_bytes_per_token_is_known_from_prepare_alone(tmp_path, metadata, expected):
    path = write_tokens(tmp_path / "a", [range(10)], metadata=metadata)
    assert EvaluationSet(path, 4, 10).bytes_per_token == expected


@pytest.mark.parametrize(
    ("documents", "vocab_size", "complaint"),
    [([[1]], 10, r"a\.bin: one token has no target"), ([[1, 12]], 12, r"a\.bin: token id 12 ")],
)
def test_sets_that_cannot_be_evaluated_are_refused(tmp_path, documents, vocab_size, complaint):
    with pytest.raises(ValueError, match=complaint):
        EvaluationSet(write_tokens(tmp_path / "a", documents), 4, vocab_size)
