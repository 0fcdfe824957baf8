"""One shard of a preparation: documents in, a small token file for each split out."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from runtime.data import tokenizer as bpe
from runtime.data.index import write_index
from runtime.data.preparation.documents import Piece, read

SPLITS = ("train", "heldout")
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Shard:
    """A unit of work. It is finished when `folder` exists; until then everything is in a temporary beside it."""

    folder: str
    pieces: tuple[Piece, ...]
    tokenizer: str
    end: int
    vocab_size: int
    seed: int
    holdout: float
    """A document is held out where `chance` of its text is at most this."""


def chance(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the text and the seed: equal documents fall on one side."""
    digest = blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:7], "little") / 2**56


def token_dtype(vocab_size: int) -> np.dtype:
    """As megatron-core's `DType.optimal_dtype`, whose import would cost each worker seconds."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def tokenize(shard: Shard) -> dict[str, Any]:
    """Tokenize a shard into its folder and return its summary, as `summary` reads it."""
    temporary = Path(f"{shard.folder}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    counts = {split: np.zeros(shard.vocab_size, np.int64) for split in SPLITS}
    totals = {split: Counter[str]() for split in SPLITS}
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    tally: Counter[str] = Counter()
    lowest = 1.0
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(temporary / f"{split}.bin", "wb")) for split in SPLITS}
        for text, ids in _encoded(shard, tally):
            place = chance(text, shard.seed)
            lowest = min(lowest, place)
            split = "heldout" if place <= shard.holdout else "train"
            files[split].write(ids.tobytes())
            lengths[split].append(len(ids))
            np.add.at(counts[split], ids, 1)
            totals[split].update(documents=1, tokens=len(ids), bytes=len(text.encode()))
    for split in SPLITS:
        write_index(str(temporary / f"{split}.idx"), token_dtype(shard.vocab_size), np.array(lengths[split], np.int64))
    np.savez(temporary / "counts.npz", **counts)
    outcome = {"lowest": lowest, "tally": tally, "splits": totals}
    (temporary / "summary.json").write_text(json.dumps(outcome))
    shutil.rmtree(shard.folder, ignore_errors=True)
    temporary.rename(shard.folder)
    return outcome


def summary(shard: Shard) -> dict[str, Any] | None:
    """What a finished shard holds, None if it is not finished."""
    try:
        return json.loads(Path(shard.folder, "summary.json").read_text())
    except (OSError, ValueError):
        return None


def token_counts(shards: Iterable[Shard], split: str) -> np.ndarray:
    """How often each id occurs in a split of these shards: [vocab_size] int64."""
    return sum(np.load(Path(shard.folder, "counts.npz"))[split] for shard in shards)


def unigram_loss(train: np.ndarray, heldout: np.ndarray) -> float:
    """Nats per token of the held-out counts under the unigram model of the train counts, add-one smoothed."""
    log_probability = np.log(train + 1) - np.log(train.sum() + len(train))
    return float(-(heldout * log_probability).sum() / heldout.sum())


def _encoded(shard: Shard, tally: Counter[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(text, ids with the end of the document appended) of every document."""
    tokenizer, dtype = _load(shard.tokenizer), token_dtype(shard.vocab_size)
    for texts in _batches(text for piece in shard.pieces for text in read(piece, tally)):
        try:
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"the tokenizer cannot encode this text: {error}") from None
        for text, encoding in zip(texts, encodings, strict=True):
            yield text, np.array([*encoding.ids, shard.end], dtype)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_load = lru_cache(maxsize=1)(bpe.load)
