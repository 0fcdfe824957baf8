"""`prepare`: text to token files, in parallel, resumable, and whole or not at all."""

import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from launch.prepare import main
from runtime.data import tokenizer as bpe
from runtime.data.preparation import build, shards
from runtime.data.tokens import TokenFile

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = ("--vocab-size", "300", "--workers", "1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixty small files of source code, two of them alike."""
    folder = tmp_path_factory.mktemp("corpus")
    for k in range(60):
        body = "".join(f"def function_{k}_{j}(x):\n    return x * {j} + {k}\n\n" for j in range(k % 7 + 1))
        (folder / f"module_{k:02d}.py").write_text(body)
    (folder / "copy.py").write_text((folder / "module_41.py").read_text())
    return folder


@pytest.fixture
def many_shards(monkeypatch):
    """Shards of a kilobyte, so that a small corpus has many."""
    monkeypatch.setattr(build, "_SHARD_BYTES", (1024, 1024))


def contents(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.name != "preparation.json"}


def documents_of(prefix: Path) -> list[str]:
    """The documents of a prepared pair, decoded."""
    file, tokenizer = TokenFile(prefix), bpe.load(prefix.parent / "tokenizer.json")
    ids, owners = file.read(0, file.num_tokens), file.document_ids(0, file.num_tokens)
    end = file.metadata["end_of_document"]
    found = []
    for document in range(file.num_documents):
        own = ids[owners == document].tolist()
        assert own[-1] == end and end not in own[:-1]
        found.append(tokenizer.decode(own[:-1], skip_special_tokens=False))
    return found


def test_every_document_is_written_once_and_described(corpus, tmp_path, capsys):
    assert main([str(corpus), "--out", str(tmp_path / "out"), "--holdout", "20%", *VOCABULARY]) == 0
    out = tmp_path / "out"
    texts = sorted(each.read_text() for each in corpus.iterdir())
    split = {name: documents_of(out / name) for name in ("train", "heldout")}
    assert sorted(split["train"] + split["heldout"]) == texts
    assert 3 <= len(split["heldout"]) <= 25
    assert not set(split["train"]) & set(split["heldout"]), "copies of a document fall on one side"

    printed = capsys.readouterr().out
    for name, documents in split.items():
        file = TokenFile(out / name)
        about = file.metadata
        assert about["fingerprint"] == file.fingerprint
        assert about["tokens"] == file.num_tokens
        assert about["documents"] == len(documents)
        assert about["bytes"] == sum(len(each.encode()) for each in documents)
        assert about["bytes_per_token"] == about["bytes"] / about["tokens"]
        assert about["tokenizer_fingerprint"] == bpe.fingerprint(out / "tokenizer.json")
        assert about["vocab_size"] == 300
        assert about["source"]["inputs"] == [str(corpus)]
        assert {"tokenizers", "megatron-core"} <= set(about["versions"])
        file.check_vocabulary(300)
        assert f"{file.num_tokens:,} tokens" in printed
    assert f"{TokenFile(out / 'heldout').metadata['unigram_loss']:.4f} nats per token" in printed


def test_unigram_loss_is_the_smoothed_one(corpus, tmp_path):
    main([str(corpus), "--out", str(tmp_path), "--holdout", "0.2", *VOCABULARY])
    train, heldout = (TokenFile(tmp_path / name) for name in ("train", "heldout"))
    counts = Counter(train.read(0, train.num_tokens).tolist())
    losses = [
        -math.log((counts[token] + 1) / (train.num_tokens + 300))
        for token in heldout.read(0, heldout.num_tokens).tolist()
    ]
    assert heldout.metadata["unigram_loss"] == pytest.approx(np.mean(losses), rel=1e-9)


def test_the_result_does_not_depend_on_workers_or_form_of_the_command(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_SHARD_BYTES", (4096, 4096))
    arguments = [str(corpus), "--holdout", "10%", "--vocab-size", "300"]
    assert main([*arguments, "--out", str(tmp_path / "two"), "--workers", "2"]) == 0
    monkeypatch.undo()
    commands = {"script": [str(ROOT / "launch" / "prepare.py")], "module": ["-m", "launch.prepare"]}
    for name, command in commands.items():
        folder = tmp_path if name == "script" else ROOT
        line = [sys.executable, *command, *arguments, "--out", str(tmp_path / name), "--workers", "1"]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert contents(tmp_path / name) == contents(tmp_path / "two")


def test_a_finished_preparation_is_left_as_it_is(corpus, tmp_path, capsys):
    command = [str(corpus), "--out", str(tmp_path), *VOCABULARY]
    assert main(command) == 0
    times = {each.name: each.stat().st_mtime_ns for each in tmp_path.iterdir()}
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"nothing to do: {tmp_path} is prepared")
    assert {each.name: each.stat().st_mtime_ns for each in tmp_path.iterdir()} == times

    assert main([*command, "--seed", "1"]) == 2
    assert "of another preparation; --overwrite replaces it" in capsys.readouterr().err
    assert {each.name: each.stat().st_mtime_ns for each in tmp_path.iterdir()} == times
    assert main([*command, "--exclude", "copy.py", "--overwrite"]) == 0
    assert len(documents_of(tmp_path / "train")) == 60
    (tmp_path / "train.bin").unlink()
    assert main([*command, "--exclude", "copy.py", "--overwrite"]) == 0, "what went missing is made again"
    assert len(documents_of(tmp_path / "train")) == 60


@pytest.mark.parametrize("finished", [1, 7])
def test_finished_shards_survive_an_interruption(corpus, tmp_path, monkeypatch, capsys, many_shards, finished):
    command, out = [str(corpus), "--holdout", "20%", *VOCABULARY], tmp_path / "out"
    main([*command, "--out", str(tmp_path / "whole")])
    tokenize, folders = shards.tokenize, []

    def until_interrupted(shard):
        if len(folders) == finished:
            raise KeyboardInterrupt
        return recorded(shard)

    def recorded(shard):
        folders.append(shard.folder)
        return tokenize(shard)

    monkeypatch.setattr(shards, "tokenize", until_interrupted)
    assert main([*command, "--out", str(out)]) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert not [each for each in out.iterdir() if not each.name.startswith(".preparation-")], "nothing half-made"
    monkeypatch.setattr(shards, "tokenize", recorded)
    assert main([*command, "--out", str(out)]) == 0
    assert f"continuing: {finished} of " in capsys.readouterr().out
    assert len(folders) == len(set(folders)) > finished, "no shard twice"
    assert contents(out) == contents(tmp_path / "whole")


IN_SMALL_SHARDS = """
import sys
from launch import prepare
from runtime.data.preparation import build, documents
if __name__ == "__main__":
    build._SHARD_BYTES = documents.PIECE_BYTES = (65536, 65536)
    sys.exit(prepare.main())
"""


def test_a_killed_preparation_continues(tmp_path):
    """SIGKILL between shards: the workers end too, and the next run gives what an undisturbed one gives."""
    source = tmp_path / "source.jsonl"
    texts = ("".join(f"value_{k} = compute({k * j % 1013})\n" for k in range(250)) for j in range(150))
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "small.py").write_text(IN_SMALL_SHARDS)

    def run(out, kill_at=None):
        arguments = [
            str(source),
            "--vocab-size",
            "280",
            "--train-megabytes",
            "0.1",
            "--workers",
            "2",
            "--out",
            str(out),
        ]
        command = [sys.executable, str(tmp_path / "small.py"), *arguments]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        ) as run:
            lines = []
            for line in run.stdout:  # ends when the last process that holds the pipe has ended
                lines.append(line)
                if kill_at and line.startswith(kill_at):
                    run.kill()
        return run.returncode, "".join(lines)

    code, _ = run(tmp_path / "out", kill_at="tokenized")
    assert code == -signal.SIGKILL
    assert not [each for each in (tmp_path / "out").iterdir() if not each.name.startswith(".preparation-")]
    code, printed = run(tmp_path / "out")
    assert code == 0 and "continuing: " in printed
    assert run(tmp_path / "whole")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_preparations_do_not_share_a_folder(corpus, tmp_path, monkeypatch, capsys):
    command = [str(corpus), "--out", str(tmp_path / "out"), *VOCABULARY]
    original, codes = shards.tokenize, []

    def meanwhile(shard):
        codes.append(main(command))
        return original(shard)

    monkeypatch.setattr(shards, "tokenize", meanwhile)
    assert main(command) == 0
    assert codes == [2]
    assert "another preparation is writing to it" in capsys.readouterr().err


def test_outputs_inside_the_input_are_not_read_and_no_file_twice(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 20)
    command = [str(tmp_path), str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), *VOCABULARY]
    for _ in range(2):
        assert main(command) == 0
        assert documents_of(tmp_path / "out" / "train") == ["some text " * 20]


def test_a_given_tokenizer_is_used_and_kept(corpus, tmp_path):
    bpe.train(["some other text"], 270).save(str(tmp_path / "tokenizer.json"))
    for given in (tmp_path / "tokenizer.json", tmp_path):
        out = tmp_path / f"out-{given.name}"
        assert main([str(corpus), "--out", str(out), "--tokenizer", str(given), "--workers", "1"]) == 0
        assert (out / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_a_small_corpus_holds_out_one_document(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "sentence number {k}"}}\n' for k in range(5)))
    assert main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--holdout", "0.01%", *VOCABULARY]) == 0
    assert len(documents_of(tmp_path / "out" / "heldout")) == 1
    assert len(documents_of(tmp_path / "out" / "train")) == 4
    assert "holding out one" in capsys.readouterr().out


def test_what_was_left_out_or_repaired_is_said(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"plain text " * 9)
    (folder / "b.txt").write_bytes(b"caf\xe9")
    (folder / "c.bin").write_bytes(b"\0\1\2")
    assert main([str(folder), "--out", str(tmp_path / "out"), *VOCABULARY]) == 0
    printed = capsys.readouterr().out
    assert "binary files (with NUL bytes), left out: 1" in printed
    assert "documents with bytes that are not UTF-8, replaced by U+FFFD: 1" in printed
    metadata = TokenFile(tmp_path / "out" / "train").metadata
    assert (metadata["documents_binary"], metadata["documents_repaired"]) == (1, 1)


BAD = {
    "missing input": (["nowhere.txt"], "nowhere.txt: no such file or folder"),
    "no match": (["corpus", "--glob", "*.rs"], "corpus: no file matches '*.rs'"),
    "all excluded": (["corpus", "--exclude", "*"], "corpus: no file matches"),
    "not JSON": (["bad.jsonl"], "bad.jsonl: the record at byte 14 is not JSON"),
    "other key": (["bad.jsonl", "--key", "body"], "bad.jsonl: the record at byte 0 has no key 'body'"),
    "not Parquet": (["bad.parquet"], "bad.parquet: not a Parquet file"),
    "binary only": (["zeros.txt"], "zeros.txt: no text to write as train"),
    "one document": (["one.txt", "--holdout", "50%"], "one.txt: no text to write as train; all of it is held out"),
    "no tokenizer": (["corpus", "--tokenizer", "bad.jsonl"], "bad.jsonl: not a tokenizer.json"),
    "no such end": (["corpus", "--tokenizer", "t.json", "--end-of-document", "<x>"], "no token to end a document"),
    "small vocabulary": (["corpus", "--vocab-size", "12"], "--vocab-size 12 is too small"),
    "holdout of all": (["corpus", "--holdout", "100%"], "--holdout '100%' is not a share"),
    "holdout of words": (["corpus", "--holdout", "some"], "--holdout 'some' is not a share"),
    "no workers": (["corpus", "--workers", "0"], "--workers 0 is out of range"),
    "negative seed": (["corpus", "--seed", "-1"], "--seed -1 is out of range"),
    "no text to train on": (["corpus", "--train-megabytes", "0"], "--train-megabytes 0.0 is out of range"),
}


@pytest.mark.parametrize(
    ("arguments", "complaint", "workers"),
    [*((*case, "1") for case in BAD.values()), (*BAD["not JSON"], "2")],
    ids=[*BAD, "not JSON, found by a worker"],
)
def test_bad_input_is_one_line_and_nothing_written(
    corpus, tmp_path, monkeypatch, capsys, arguments, complaint, workers
):
    monkeypatch.chdir(tmp_path)
    Path("corpus").symlink_to(corpus)
    Path("bad.jsonl").write_text('{"text": "x"}\n{"text": \n' + '{"text": "y"}\n' * 9)
    Path("bad.parquet").write_bytes(b"nothing")
    Path("zeros.txt").write_bytes(bytes(100))
    Path("one.txt").write_text("one document\n")
    bpe.train(["text"], 260).save("t.json")
    before = sorted(Path().iterdir())
    workers_given = [] if "--workers" in arguments else ["--workers", workers]
    vocabulary = [] if {"--vocab-size", "--tokenizer"} & set(arguments) else ["--vocab-size", "300"]
    assert main([*arguments, *workers_given, *vocabulary, "--out", "new/out"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert complaint in captured.err
    assert sorted(Path().iterdir()) == before


def test_an_output_that_is_a_file_is_refused(corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    for out in ("file", "file/below"):
        assert main([str(corpus), "--out", str(tmp_path / out), *VOCABULARY]) == 2
        assert "cannot be written to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_a_full_disk_stops_and_the_next_run_finishes(corpus, tmp_path, monkeypatch, capsys):
    command = [str(corpus), "--out", str(tmp_path), *VOCABULARY]

    def full(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)
        assert main(command) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert main(command) == 0
    assert len(documents_of(tmp_path / "train")) == 61
