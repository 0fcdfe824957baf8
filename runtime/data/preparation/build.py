"""A whole preparation: train the tokenizer, tokenize shards in parallel, merge, publish."""

import fcntl
import gc
import json
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from runtime.data import tokenizer as bpe
from runtime.data.preparation import documents, shards
from runtime.data.preparation.documents import Piece, Selection
from runtime.data.preparation.shards import SPLITS, Shard
from runtime.data.tokens import TokenFile

_RECORD = "preparation.json"
_SHARD_BYTES = (4 << 20, 256 << 20)
_SHARDS = 256
_PACKAGES = ("megatron-core", "tokenizers", "numpy")


@dataclass(frozen=True)
class Options:
    """What decides the result. Neither the number of workers nor the output folder does."""

    selection: Selection
    tokenizer: str | None = None
    """A `tokenizer.json`; None trains one."""
    vocab_size: int = 4096
    train_bytes: int = 16 << 20
    """Text that a new tokenizer is trained on."""
    end_of_document: str | None = None
    holdout: float = 0.0
    """Share of the documents that go to the held-out pair."""
    seed: int = 0


Report = Callable[[str], None]
Advance = Callable[[int, int], None]


class Preparation:
    """Text to token files under `out`. The same options on the same input continue what was interrupted, and do
    nothing where it is finished. ValueError for bad input, found before or after the start: nothing is left then."""

    def __init__(self, options: Options, out: str | os.PathLike[str], overwrite: bool = False):
        self.options, self.out, self.overwrite = options, Path(out), overwrite
        self.pieces = documents.find(options.selection, outside=self.out.resolve())
        self.key = _key(options, self.pieces)
        self._work = self.out / f".preparation-{self.key}"
        if options.tokenizer is not None:
            bpe.end_of_document(bpe.load(options.tokenizer), options.end_of_document)

    @property
    def total_bytes(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def finished(self) -> dict[str, Any] | None:
        """The record of this same preparation if `out` holds it whole."""
        try:
            record = json.loads((self.out / _RECORD).read_text())
            intact = all((self.out / name).stat().st_size == size for name, size in record["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return record if record.get("key") == self.key and intact else None

    def run(self, workers: int, report: Report, advance: Advance) -> dict[str, Any]:
        """Do what is left to do and return the record. `advance` is told bytes done and bytes in all."""
        with _sole_writer(self.out):
            present = [name for name in self._targets() if (self.out / name).exists()]
            if present and not (self._work.exists() or self.overwrite):
                raise ValueError(
                    f"{self.out}: holds {', '.join(present)} of another preparation; --overwrite replaces it"
                )
            try:
                self._work.mkdir(exist_ok=True)
                tokenizer = self._tokenizer(report)
                pending = self._shards(tokenizer)
                results = self._tokenize(pending, workers, report, advance)
                results = self._hold_out_something(pending, results, report)
                record = self._publish(pending, results, report)
            except ValueError:
                shutil.rmtree(self._work)
                raise
            for leftover in self.out.glob(".preparation-*"):  # ours, and of options since given up
                shutil.rmtree(leftover)
        return record

    def _targets(self) -> list[str]:
        splits = SPLITS if self.options.holdout else SPLITS[:1]
        return [f"{split}.{suffix}" for split in splits for suffix in ("bin", "idx", "json")] + ["tokenizer.json"]

    def _tokenizer(self, report: Report) -> str:
        path = self._work / "tokenizer.json"
        if path.exists():
            return str(path)
        temporary = path.with_suffix(".tmp")
        if self.options.tokenizer is not None:
            shutil.copyfile(self.options.tokenizer, temporary)
        else:
            report(f"training a byte-level BPE of {self.options.vocab_size:,} tokens")
            trained = bpe.train(self._sample(), self.options.vocab_size)
            if (size := bpe.vocabulary_size(trained)) < self.options.vocab_size:
                report(f"the text has pairs for a vocabulary of {size:,} only")
            trained.save(str(temporary))
        temporary.replace(path)
        return str(path)

    def _sample(self) -> Iterator[str]:
        """Text for the tokenizer from pieces all over the input, without what is held out."""
        options = self.options
        spread = sorted(self.pieces, key=lambda piece: shards.chance(f"{piece.path}:{piece.start}", options.seed))
        for text in documents.read_some(spread, options.train_bytes):
            if shards.chance(text, options.seed) > options.holdout:
                yield text

    def _shards(self, tokenizer_path: str) -> list[Shard]:
        """Consecutive pieces in shards of a size that depends on the input alone, so any `workers` give one result."""
        target = min(max(self.total_bytes // _SHARDS, _SHARD_BYTES[0]), _SHARD_BYTES[1])
        groups: list[list[Piece]] = [[]]
        for piece in self.pieces:
            if groups[-1] and sum(each.size for each in groups[-1]) + piece.size > target:
                groups.append([])
            groups[-1].append(piece)
        tokenizer = bpe.load(tokenizer_path)
        end, vocab_size = bpe.end_of_document(tokenizer, self.options.end_of_document), bpe.vocabulary_size(tokenizer)
        threshold = self.options.holdout if self.options.holdout else -1.0
        return [
            Shard(
                str(self._work / f"{k:05d}"),
                tuple(group),
                tokenizer_path,
                end,
                vocab_size,
                self.options.seed,
                threshold,
            )
            for k, group in enumerate(groups)
        ]

    def _tokenize(self, pending: Sequence[Shard], workers: int, report: Report, advance: Advance) -> list[dict]:
        results = [shards.summary(shard) for shard in pending]
        left = [k for k, result in enumerate(results) if result is None]
        sizes = [sum(piece.size for piece in shard.pieces) for shard in pending]
        if len(left) < len(pending):
            report(f"continuing: {len(pending) - len(left)} of {len(pending)} shards are already tokenized")
        workers = max(1, min(workers, len(left)))
        report(f"tokenizing {len(left)} shards with {workers} worker{'s' * (workers > 1)}")
        done = self.total_bytes - sum(sizes[k] for k in left)
        advance(done, self.total_bytes)
        with _in_processes(workers) as run:
            for k, result in run(shards.tokenize, {k: pending[k] for k in left}):
                results[k] = result
                done += sizes[k]
                advance(done, self.total_bytes)
        return results

    def _hold_out_something(self, pending: list[Shard], results: list[dict], report: Report) -> list[dict]:
        """A small corpus may have no document below the threshold: hold out the one with the least chance then."""
        if self.options.holdout and not any(result["splits"]["heldout"].get("documents") for result in results):
            lowest = min(result["lowest"] for result in results)
            report(f"no document fell into a share of {self.options.holdout:.3g}: holding out one")
            results = [
                shards.tokenize(replace(shard, holdout=lowest)) if result["lowest"] == lowest else result
                for shard, result in zip(pending, results, strict=True)
            ]
        for split in SPLITS if self.options.holdout else SPLITS[:1]:
            if not any(result["splits"][split].get("documents") for result in results):
                left_out = "; all of it is held out" if split == "train" and self.options.holdout else ""
                raise ValueError(f"{', '.join(self.options.selection.inputs)}: no text to write as {split}{left_out}")
        return results

    def _publish(self, pending: Sequence[Shard], results: Sequence[dict], report: Report) -> dict[str, Any]:
        """Merge in the work folder, then move into place, what the others are checked against last."""
        splits = SPLITS if self.options.holdout else SPLITS[:1]
        report("merging the shards")
        about = self._about(pending[0], results)
        described = {split: self._merge(split, pending, results, about) for split in splits}
        files = {name: (self._work / name).stat().st_size for name in self._targets()}
        record = {"key": self.key, "files": files, "splits": described}
        (self._work / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
        for name in [*files, _RECORD]:
            with open(self._work / name, "rb") as stream:
                os.fsync(stream.fileno())
        for name in [*files, _RECORD]:
            (self._work / name).replace(self.out / name)
        return record

    def _about(self, shard: Shard, results: Sequence[dict]) -> dict[str, Any]:
        tally = sum((Counter(result["tally"]) for result in results), Counter())
        return {
            "tokenizer_fingerprint": bpe.fingerprint(shard.tokenizer),
            "vocab_size": shard.vocab_size,
            "end_of_document": shard.end,
            "seed": self.options.seed,
            "holdout": self.options.holdout,
            "source": asdict(self.options.selection),
            "documents_empty": tally["empty"],
            "documents_binary": tally["binary"],
            "documents_repaired": tally["repaired"],
            "versions": {package: version(package) for package in _PACKAGES},
        }

    def _merge(self, split: str, pending: Sequence[Shard], results: Sequence[dict], about: dict) -> dict[str, Any]:
        module = _indexed_dataset()
        prefix = str(self._work / split)
        builder = module.IndexedDatasetBuilder(prefix + ".bin", module.DType.optimal_dtype(about["vocab_size"]))
        totals: Counter[str] = Counter()
        gc.freeze()  # add_index collects garbage each time, which all of torch would slow down
        for shard, result in zip(pending, results, strict=True):
            if result["splits"][split].get("documents"):
                builder.add_index(str(Path(shard.folder, split)))
                totals.update(result["splits"][split])
        gc.unfreeze()
        builder.finalize(prefix + ".idx")
        described = {"fingerprint": TokenFile(prefix).fingerprint, **totals}
        described["bytes_per_token"] = totals["bytes"] / totals["tokens"]
        if split == "heldout":
            train, heldout = (shards.token_counts(pending, each) for each in SPLITS)
            described["unigram_loss"] = shards.unigram_loss(train, heldout)
        Path(prefix + ".json").write_text(json.dumps(described | about, indent=2) + "\n")
        return described | {key: about[key] for key in about if key.startswith("documents_")}


def _key(options: Options, pieces: Sequence[Piece]) -> str:
    """Identifies options and input: every file's path, size and time of change."""
    listing = [(asdict(piece), os.stat(piece.path).st_mtime_ns) for piece in pieces]
    chosen = asdict(options)
    if options.tokenizer is not None:
        chosen["tokenizer"] = bpe.fingerprint(options.tokenizer)
    content = json.dumps([listing, chosen, [version(package) for package in _PACKAGES]])
    return blake2b(content.encode(), digest_size=8).hexdigest()


@contextmanager
def _in_processes(workers: int) -> Iterator[Callable[..., Iterator[tuple[int, Any]]]]:
    """A function that maps numbered tasks, in any order: in this process if one is enough, else in several."""
    if workers == 1:
        yield lambda function, tasks: ((k, function(task)) for k, task in tasks.items())
        return
    context = multiprocessing.get_context("spawn")
    held_here, lifeline = context.Pipe()
    with ProcessPoolExecutor(workers, context, _start_worker, (lifeline,)) as pool:

        def run(function: Callable, tasks: dict[int, Any]) -> Iterator[tuple[int, Any]]:
            futures = {pool.submit(function, task): k for k, task in tasks.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()

        try:
            yield run
        except BaseException:
            held_here.close()
            raise


@contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if it is not there, against other preparations; what was made is removed if still empty."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written to ({error.strerror})") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"{folder}: another preparation is writing to it") from None
    finally:
        os.close(handle)
        with suppress(OSError):
            for each in made:
                each.rmdir()


def _indexed_dataset() -> ModuleType:
    """megatron-core's module, imported where it is needed: that takes seconds, and it warns of absent GPU extras."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def _start_worker(lifeline: Connection) -> None:
    """A worker leaves Ctrl-C to its parent, ends when the parent lets go or dies, and encodes on one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def follow() -> None:
        with suppress(EOFError):
            lifeline.recv()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
