"""The loader: the same global batch for any world size and micro-batch, read ahead, with errors passed on."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.data.loader import Batch, Loader
from runtime.data.mixture import MixtureHistory
from runtime.data.order import GlobalOrder
from runtime.data.tokens import TokenFile
from runtime.model.cross_entropy import IGNORE
from tests.token_files import random_documents, write_tokens

SEQ_LEN = 16


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    return [TokenFile(write_tokens(folder / name, random_documents(k, 60 + 40 * k))) for k, name in enumerate("ab")]


@pytest.fixture
def order(sources):
    return GlobalOrder([(sources[0], 1), (sources[1], 3)], seed=5, seq_len=SEQ_LEN)


@pytest.fixture
def open_loader():
    """Loaders that are closed when the test ends."""
    opened = []

    def open_one(*arguments, **options) -> Loader:
        opened.append(Loader(*arguments, **options))
        return opened[-1]

    yield open_one
    for loader in opened:
        loader.close()


def joined(micro_batches: list[Batch]) -> Batch:
    return Batch(*(None if part[0] is None else torch.cat(part) for part in zip(*micro_batches, strict=True)))


def same(one: Batch, other: Batch) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    first=st.integers(0, 500),
    share=st.integers(1, 6),
    size=st.integers(1, 5),
    micro=st.integers(1, 8),
    mask=st.booleans(),
)
def test_the_global_batch_does_not_depend_on_the_mesh(order, first, share, size, micro, mask):
    sequences = share * size
    whole = Loader(order, SEQ_LEN, vocab_size=500, document_mask=mask, prefetch=0)
    (expected,) = whole.batch(first, sequences)
    ranks = []
    for rank in range(size):
        loader = Loader(order, SEQ_LEN, rank, size, 500, mask, prefetch=1)
        ranks.append(loader.batch(first, sequences, micro))
        loader.close()
    whole.close()
    assert {tuple(len(batch.tokens) for batch in each) for each in ranks} == {
        tuple(min(micro, share - k) for k in range(0, share, micro))
    }
    assert same(joined([joined(each) for each in ranks]), expected)


def test_rows_are_the_samples_of_the_order(order, open_loader):
    (batch,) = open_loader(order, SEQ_LEN, vocab_size=500).batch(7, 20)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.document_ids is None
    for row, sample in enumerate(order.samples(7, 20)):
        window = order.sources[sample.source].read(sample.window * SEQ_LEN, SEQ_LEN + 1)
        assert batch.tokens[row].tolist() == window[:-1].tolist()
        assert batch.targets[row].tolist() == window[1:].tolist()


def test_with_a_document_mask_only_targets_across_documents_are_ignored(order, open_loader):
    (plain,) = open_loader(order, SEQ_LEN, vocab_size=500).batch(0, 30)
    (masked,) = open_loader(order, SEQ_LEN, vocab_size=500, document_mask=True).batch(0, 30)
    assert torch.equal(plain.tokens, masked.tokens)
    for row, sample in enumerate(order.samples(0, 30)):
        owners = order.sources[sample.source].document_ids(sample.window * SEQ_LEN, SEQ_LEN + 1)
        assert masked.document_ids[row].tolist() == owners[:-1].tolist()
        opens = torch.from_numpy(np.diff(owners) != 0)
        assert torch.equal(masked.targets[row], torch.where(opens, IGNORE, plain.targets[row]))
    assert (masked.targets == IGNORE).any() and (masked.targets != IGNORE).any()


def test_batches_follow_a_mixture_change(sources, open_loader):
    history = MixtureHistory([(sources[0], 1)], 5, SEQ_LEN)
    (before,) = open_loader(history, SEQ_LEN, vocab_size=500).batch(0, 12)
    history.change(8, [(sources[1], 1)])
    (after,) = open_loader(history, SEQ_LEN, vocab_size=500).batch(0, 12)
    assert torch.equal(before.tokens[:8], after.tokens[:8])
    window = sources[1].read(history.sample(8).window * SEQ_LEN, SEQ_LEN)
    assert after.tokens[8].tolist() == window.tolist()


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_any_request_is_served_right_whatever_was_read_ahead(order, open_loader, prefetch):
    loader = open_loader(order, SEQ_LEN, 1, 2, 500, prefetch=prefetch)
    for first, sequences, micro in [(0, 4, 1), (4, 4, 1), (8, 8, 2), (8, 8, 2), (16, 8, 4), (2, 4, 2), (6, 4, None)]:
        fresh = open_loader(order, SEQ_LEN, 1, 2, 500, prefetch=0)
        served, expected = loader.batch(first, sequences, micro), fresh.batch(first, sequences, micro)
        assert len(served) == len(expected)
        assert all(same(one, other) for one, other in zip(served, expected, strict=True))


def test_the_next_batches_are_read_ahead(tmp_path, open_loader):
    """Batches 1 and 2 are there although the file has since been cut to nothing; batch 3 names the file."""
    file = TokenFile(write_tokens(tmp_path / "a", [range(400)]))
    loader = open_loader(GlobalOrder([(file, 1)], 0, SEQ_LEN), SEQ_LEN, vocab_size=400, prefetch=2)
    loader.batch(0, 2)
    for waiting in list(loader._pending.values()):
        waiting.result()
    with open(file.path + ".bin", "r+b") as stream:
        stream.truncate(0)
    loader.batch(2, 2)
    loader.batch(4, 2)
    with pytest.raises(ValueError, match=r"a\.bin: cut short"):
        loader.batch(6, 2)
    with pytest.raises(ValueError, match=r"a\.bin: cut short"):
        loader.batch(8, 2)


def test_an_id_outside_the_vocabulary_is_refused_at_once(sources, order):
    with pytest.raises(ValueError, match=r"[ab]\.bin: token id 499 is not in the vocabulary \(0 to 498\)"):
        Loader(order, SEQ_LEN, vocab_size=499)


def test_an_id_that_only_reading_finds_is_refused_then(tmp_path, open_loader, monkeypatch):
    file = TokenFile(write_tokens(tmp_path / "a", [[1] * 30 + [77] * 30], metadata={"vocab_size": 50}))
    monkeypatch.setattr(file, "check_vocabulary", lambda vocab_size: None)
    loader = open_loader(GlobalOrder([(file, 1)], 0, SEQ_LEN), SEQ_LEN, vocab_size=50)
    with pytest.raises(ValueError, match=r"a\.bin: token id 77 "):
        loader.batch(0, 3)


def test_a_batch_that_ranks_cannot_share_is_refused(order, open_loader):
    with pytest.raises(ValueError, match="7 sequences cannot be shared evenly by 2 data ranks"):
        open_loader(order, SEQ_LEN, 0, 2, 500).batch(0, 7)


def test_reading_on_after_close_is_an_error(order):
    loader = Loader(order, SEQ_LEN, vocab_size=500)
    loader.batch(0, 2)
    loader.close()
    with pytest.raises(RuntimeError):
        loader.batch(100, 2)
