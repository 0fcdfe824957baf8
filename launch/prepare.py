"""Turn text into token files and a tokenizer: `python launch/prepare.py INPUT... --out DIR`."""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the project's root is where its packages are found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from runtime.data.preparation.build import Advance, Options, Preparation, Report
from runtime.data.preparation.documents import FORMATS, Selection

DESCRIPTION = """\
Tokenize text, JSON lines, Parquet or folders of files into a Megatron .bin/.idx pair, DIR/train, with DIR/heldout
for held-out documents and DIR/tokenizer.json. An interrupted preparation continues with the same command; a
finished one is left as it is.
"""
EPILOG = """\
Exit codes: 0 done, 2 bad input, and nothing is written; 1 stopped, 130 interrupted: the same command continues.
"""


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 2 for bad input (one line says which, nothing is written), 1 or 130 where it can be continued."""
    arguments = _parser().parse_args(argv)
    try:
        preparation = Preparation(_options(arguments), arguments.out, arguments.overwrite)
        if record := preparation.finished():
            print(f"nothing to do: {arguments.out} is prepared from this input with these options")
        else:
            with _display() as (report, advance):
                files = len({piece.path for piece in preparation.pieces})
                report(f"{files:,} file{'s' * (files > 1)}, {preparation.total_bytes / 1e6:,.1f} MB")
                record = preparation.run(arguments.workers, report, advance)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, BrokenProcessPool, KeyboardInterrupt) as error:
        reasons = {KeyboardInterrupt: "interrupted", BrokenProcessPool: "a worker was killed; memory may be short"}
        reason = reasons.get(type(error), error)
        print(f"stopped: {reason}. Finished shards are kept; the same command continues.", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    _summarize(record, arguments.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("prepare", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files and folders")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of what is prepared")
    parser.add_argument(
        "--format", choices=FORMATS, default="auto", help="by default from each file's suffix, else text"
    )
    parser.add_argument("--glob", default="**/*", help="files of a folder to take (default: all)")
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="... and to leave; repeatable"
    )
    parser.add_argument("--key", default="text", help="key of a JSON line's text (default: text)")
    parser.add_argument("--column", default="text", help="column of a Parquet file's text (default: text)")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--tokenizer", metavar="FILE", help="an existing tokenizer.json, or the folder that holds it"
    )
    tokenizer.add_argument("--train-tokenizer", action="store_true", help="train a byte-level BPE (the default)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of a trained tokenizer (default: 4096)")
    parser.add_argument("--train-megabytes", type=float, default=16, help="text to train it on (default: 16)")
    parser.add_argument(
        "--end-of-document", metavar="TOKEN", help="token that ends a document (default: found by name)"
    )
    parser.add_argument("--holdout", default="0", metavar="SHARE", help="documents to hold out, such as 2%% or 0.02")
    parser.add_argument("--seed", type=int, default=0, help="chooses what is held out (default: 0)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, help="processes; the result does not depend on it")
    parser.add_argument("--overwrite", action="store_true", help="replace another preparation in DIR")
    return parser


def _options(arguments: argparse.Namespace) -> Options:
    tokenizer = arguments.tokenizer
    if tokenizer is not None and Path(tokenizer).is_dir():
        tokenizer = str(Path(tokenizer) / "tokenizer.json")
    if tokenizer is None and arguments.vocab_size < 257:
        raise ValueError(f"--vocab-size {arguments.vocab_size} is too small; it is 257 (the bytes and an end) or more")
    for name, value, least in (("workers", arguments.workers, 1), ("seed", arguments.seed, 0)):
        if not least <= value < 2**63:
            raise ValueError(f"--{name} {value} is out of range; it is {least} or more")
    if not 0 < arguments.train_megabytes < 1e6:
        raise ValueError(f"--train-megabytes {arguments.train_megabytes} is out of range; it is above 0")
    return Options(
        Selection(
            tuple(arguments.inputs),
            arguments.format,
            arguments.glob,
            tuple(arguments.exclude),
            arguments.key,
            arguments.column,
        ),
        tokenizer,
        0 if tokenizer else arguments.vocab_size,
        0 if tokenizer else int(arguments.train_megabytes * 2**20),
        arguments.end_of_document,
        _share(arguments.holdout),
        arguments.seed,
    )


def _share(text: str) -> float:
    try:
        share = float(text.rstrip("% ")) / (100 if text.rstrip().endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f"--holdout {text!r} is not a share; write 2% or 0.02")
    return share


@contextmanager
def _display() -> Iterator[tuple[Report, Advance]]:
    """Where progress goes: a bar on a terminal, otherwise a line for each tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("tokenizing", total=None, visible=False)
            yield (
                lambda text: progress.console.print(text, highlight=False),
                lambda done, total: progress.update(task, completed=done, total=total, visible=True),
            )
        return
    tenth = 0

    def advance(done: int, total: int) -> None:
        nonlocal tenth
        if 10 * done // total > tenth:
            tenth = 10 * done // total
            print(f"tokenized {done / 1e6:,.1f} of {total / 1e6:,.1f} MB ({100 * done // total}%)", flush=True)

    yield lambda text: print(text, flush=True), advance


def _summarize(record: dict[str, Any], out: str) -> None:
    train = record["splits"]["train"]
    notes = {
        "empty": "empty documents, left out",
        "binary": "binary files (with NUL bytes), left out",
        "repaired": "documents with bytes that are not UTF-8, replaced by U+FFFD",
    }
    for kind, note in notes.items():
        if count := train[f"documents_{kind}"]:
            print(f"{note}: {count:,}")
    for split, each in record["splits"].items():
        print(
            f"{split:<8} {each['tokens']:>14,} tokens {each['documents']:>10,} documents "
            f"{each['bytes_per_token']:6.3f} bytes per token"
        )
    if heldout := record["splits"].get("heldout"):
        print(f"unigram model on heldout: {heldout['unigram_loss']:.4f} nats per token")
    print(f"in {out}: {', '.join(record['files'])}")


if __name__ == "__main__":
    sys.exit(main())
