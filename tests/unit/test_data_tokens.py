"""Token files: any Megatron pair is read right, and no damaged one is read at all."""

import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest

from runtime.data import tokens as tokens_module
from runtime.data.preparation.shards import token_dtype
from runtime.data.tokens import TokenFile
from tests.token_files import random_documents, write_tokens


@pytest.fixture(scope="module")
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_reads_what_megatron_wrote(megatron, tmp_path, dtype):
    """Documents of several sequences, empty ones among them, in every integer type."""
    generator = np.random.default_rng(0)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype)
    stream, owners = [], []
    for document in range(40):
        lengths = generator.integers(0, 9, generator.integers(1, 4)).tolist()
        ids = generator.integers(0, 200, sum(lengths))
        builder.add_document(ids, lengths)
        stream += ids.tolist()
        owners += [document] * len(ids)
    builder.finalize(str(tmp_path / "a.idx"))

    file = TokenFile(tmp_path / "a")
    assert (file.num_tokens, file.num_documents, file.metadata) == (len(stream), 40, {})
    for start in range(0, len(stream), 7):
        length = min(25, len(stream) - start)
        assert file.read(start, length).tolist() == stream[start : start + length]
        assert file.document_ids(start, length).tolist() == owners[start : start + length]
    assert file.read(0, 5).dtype == np.int64


def test_megatron_reads_what_we_wrote(megatron, tmp_path):
    documents = random_documents(1, 50)
    write_tokens(tmp_path / "a", documents)
    dataset = megatron.IndexedDataset(str(tmp_path / "a"))
    assert [each.tolist() for each in dataset[0:50]] == documents
    assert dataset.document_indices.tolist() == list(range(51))


@pytest.mark.parametrize("vocab_size", [1, 4096, 65499, 65500, 128256])
def test_token_type_is_megatrons_choice(megatron, vocab_size):
    assert token_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)


def test_megatrons_multimodal_index_is_read(megatron, tmp_path):
    """Its index carries a mode for each sequence after the arrays."""
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), np.uint16, multimodal=True)
    builder.add_document(np.arange(6), [4, 2], [0, 1])
    builder.finalize(str(tmp_path / "a.idx"))
    assert TokenFile(tmp_path / "a").read(0, 6).tolist() == list(range(6))


@pytest.mark.parametrize(("tokens", "seq_len", "windows"), [(9, 4, 2), (8, 4, 1), (5, 4, 1), (4, 4, 0), (1, 1, 0)])
def test_a_window_needs_one_more_target(tmp_path, tokens, seq_len, windows):
    assert TokenFile(write_tokens(tmp_path / "a", [range(tokens)])).windows(seq_len) == windows


def _patch(offset: int, kind: str, *values: int):
    def damage(data: bytes) -> bytes:
        packed = struct.pack(f"<{len(values)}{kind}", *values)
        return data[:offset] + packed + data[offset + len(packed) :]

    return damage


# the index of three documents of 4, 3 and 5 tokens: header 34, lengths 12, pointers 24, documents 32 bytes
DAMAGE = {
    "idx empty": ("idx", lambda data: b""),
    "idx other magic": ("idx", lambda data: b"TNTIDX\0\0\0" + data[9:]),
    "idx cut in the header": ("idx", lambda data: data[:20]),
    "idx cut in the arrays": ("idx", lambda data: data[:-3]),
    "idx longer": ("idx", lambda data: data + b"\0"),
    "idx version": ("idx", _patch(9, "Q", 2)),
    "idx unknown type": ("idx", _patch(17, "B", 200)),
    "idx floating type": ("idx", _patch(17, "B", 7)),
    "idx other width": ("idx", _patch(17, "B", 4)),
    "idx absurd count": ("idx", _patch(18, "Q", 2**63 + 3)),
    "idx no sequences": ("idx", lambda data: data[:18] + struct.pack("<QQq", 0, 1, 0)),
    "idx no documents": ("idx", lambda data: data[:26] + struct.pack("<Q", 0) + data[34:70]),
    "idx negative length": ("idx", _patch(34, "i", 4, -3, 5)),
    "idx wrong length": ("idx", _patch(34, "i", 4, 4, 5)),
    "idx wrong pointer": ("idx", _patch(46, "q", 0, 8, 16)),
    "idx documents out of order": ("idx", _patch(70, "q", 0, 2, 1, 3)),
    "idx documents short": ("idx", _patch(70, "q", 0, 1, 2, 2)),
    "idx all lengths zero": ("idx", lambda data: data[:34] + bytes(36) + data[70:]),
    "bin empty": ("bin", lambda data: b""),
    "bin cut": ("bin", lambda data: data[:-1]),
    "bin longer": ("bin", lambda data: data + b"\0\0"),
    "json not JSON": ("json", lambda data: b"{"),
    "json not text": ("json", lambda data: b"\xff\xfe"),
    "json not a table": ("json", lambda data: b"[]"),
    "json of other data": ("json", lambda data: b'{"fingerprint": "00"}'),
}


@pytest.mark.parametrize(("suffix", "damage"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused_by_name(tmp_path, suffix, damage):
    prefix = write_tokens(tmp_path / "a", [range(4), range(3), range(5)], metadata={})
    TokenFile(prefix)
    path = Path(f"{prefix}.{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.(idx|bin|json)") as refusal:
        TokenFile(prefix)
    assert type(refusal.value) is ValueError


@pytest.mark.parametrize("suffix", ["idx", "bin"])
@pytest.mark.parametrize("replacement", ["nothing", "a folder"])
def test_a_missing_half_is_named(tmp_path, suffix, replacement):
    path = Path(write_tokens(tmp_path / "a", [range(4)]) + f".{suffix}")
    path.unlink()
    if replacement == "a folder":
        path.mkdir()
    with pytest.raises(ValueError, match=rf"a\.{suffix}: cannot be read"):
        TokenFile(tmp_path / "a")


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_every_flipped_byte_is_caught_beside_metadata(tmp_path, suffix):
    """And without metadata the pair is refused or still consistent, whatever the byte."""
    prefix = write_tokens(tmp_path / "a", random_documents(2, 6))
    fingerprint = TokenFile(prefix).fingerprint
    path, metadata = Path(f"{prefix}.{suffix}"), Path(f"{prefix}.json")
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x41]) + good[position + 1 :])
        metadata.unlink(missing_ok=True)
        try:
            file = TokenFile(prefix)
            file.read(0, file.num_tokens)
            file.document_ids(0, file.num_tokens)
        except ValueError as error:
            assert type(error) is ValueError
        metadata.write_text(f'{{"fingerprint": "{fingerprint}"}}')
        with pytest.raises(ValueError, match=r"a\."):
            TokenFile(prefix)


def test_fingerprint_is_of_the_content_alone(tmp_path):
    documents = random_documents(3, 20)
    prefix = write_tokens(tmp_path / "a", documents)
    shutil.copytree(tmp_path, tmp_path / "moved")
    fingerprint = TokenFile(prefix).fingerprint
    assert TokenFile(tmp_path / "moved" / "a").fingerprint == fingerprint
    one_document = write_tokens(tmp_path / "b", [[token for each in documents for token in each]])
    other_token = write_tokens(tmp_path / "c", [*documents[:-1], [7, *documents[-1][1:]]])
    assert len({fingerprint, TokenFile(one_document).fingerprint, TokenFile(other_token).fingerprint}) == 3


def test_a_large_file_is_sampled_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "_WHOLE", 1000)
    monkeypatch.setattr(tokens_module, "_BLOCK", 16)
    monkeypatch.setattr(tokens_module, "_BLOCKS", 5)
    ids = np.arange(1001) % 7
    seen = []
    for place in (None, 0, 255, 502, 1000, 100):
        changed = ids.copy()
        if place is not None:
            changed[place] = 9
        seen.append(TokenFile(write_tokens(tmp_path / "a", [changed])).fingerprint)
    assert len(set(seen[:5])) == 5
    assert seen[5] == seen[0], "a change between the blocks is not seen: that is the price of a quick start"


@pytest.mark.parametrize(
    ("documents", "dtype", "metadata", "complaint"),
    [
        ([[1, 2, 300]], "<u2", None, r"a\.bin: token id 300 "),
        ([[1, -2, 3]], "<i4", None, r"a\.bin: token id -2 "),
        ([[1, 2, 3]], "<u2", {"vocab_size": 301}, r"a\.json: tokenized with a vocabulary of 301"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(tmp_path, documents, dtype, metadata, complaint):
    file = TokenFile(write_tokens(tmp_path / "a", documents, dtype, metadata))
    with pytest.raises(ValueError, match=complaint):
        file.check_vocabulary(300)


def test_ids_inside_the_vocabulary_pass(tmp_path):
    TokenFile(write_tokens(tmp_path / "a", [[0, 299]], metadata={"vocab_size": 300})).check_vocabulary(300)


def test_a_file_cut_short_while_open_is_an_error(tmp_path):
    file = TokenFile(write_tokens(tmp_path / "a", [range(100)]))
    with open(file.path + ".bin", "r+b") as stream:
        stream.truncate(50)
    assert file.read(0, 25).tolist() == list(range(25))
    with pytest.raises(ValueError, match=r"a\.bin: cut short"):
        file.read(20, 20)
