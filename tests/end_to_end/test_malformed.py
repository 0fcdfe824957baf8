"""Whatever is wrong with what a user gives: exit code 2, one message that names it, and nothing written."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from launch.config import compose, dump
from runtime.checkpoint import manifest
from runtime.checkpoint.manifest import MANIFEST, Checksum
from runtime.config import Config
from runtime.data.tokens import TokenFile
from runtime.observe.jsonl import read_rows
from tests.corpus import tiny_run, write_corpus
from tests.end_to_end.runs import ROOT, main, newest
from tests.workers import run_workers

BATCH = 8 * 32
NEW = "run.name=new"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny run of two checkpoints, with its data and tokenizer."""
    folder = tmp_path_factory.mktemp("malformed")
    for name, documents in (("train", 60), ("heldout", 10)):
        path = write_corpus(folder / "data" / name, documents, seed=documents)
        path.with_suffix(".json").write_text(json.dumps({"fingerprint": TokenFile(path).fingerprint}))
    sections = {"run": {"until": 8 * BATCH}, "data": {"tokenizer": None}}
    (folder / "config.toml").write_text(dump(tiny_run(folder, **sections)))
    ((code, output),) = run_workers(main, 1, [str(folder / "config.toml")])
    assert code == 0, output
    return folder


def copy(folder: Path, target: Path) -> Path:
    """A copy of that folder, to be damaged; its paths lead to the copy."""
    shutil.copytree(folder, target)
    config = target / "config.toml"
    config.write_text(config.read_text().replace(str(folder), str(target)))
    return target


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with size and time of change, but for what other tests' hypothesis keeps there."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        if ".hypothesis" in path.parts:
            continue
        status = path.stat()
        found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


class Case(NamedTuple):
    """A command that must be refused, and what the message must name."""

    command: list[str]
    named: list[str]
    watched: Path | None = None
    """The folder in which nothing may be written; by default that of the configuration."""


class Answer(NamedTuple):
    code: int
    output: str
    wrote: list[str]


def attempt(rank: int, cases: list[Case]) -> list[Answer]:
    """Launches, one after the other, in one process; and what each left behind."""
    answers = []
    for case in cases:
        watched = case.watched or Path(case.command[0]).parent
        before = tree(watched)
        code, output = main(rank, case.command)
        after = tree(watched)
        wrote = sorted(key for key in before | after if before.get(key) != after.get(key))
        answers.append(Answer(code, output, wrote))
    return answers


def complaints(answer: Answer, named: Iterable[str]) -> list[str]:
    """What a refusal lacks: its code, a message that names all, no traceback, nothing written."""
    found = {f"exit code {answer.code}": answer.code != 2, "no message": "error: " not in answer.output}
    found |= {f"{name!r} is not named": name not in answer.output for name in named}
    found |= {"a traceback": "Traceback" in answer.output, f"wrote {answer.wrote}": bool(answer.wrote)}
    return [complaint for complaint, holds in found.items() if holds]


def assert_refused(cases: list[Case]) -> None:
    assert cases
    names = [f"run.name=new-{uuid.uuid4().hex}" for _ in cases]  # so that one that is not refused stays alone
    renamed = [
        case._replace(command=[name if part == NEW else part for part in case.command])
        for name, case in zip(names, cases, strict=True)
    ]
    (answers,) = run_workers(attempt, 1, renamed)
    wrong = [
        f"{case.command}: {', '.join(lacking)}: {answer.output[-600:]}"
        for case, answer in zip(cases, answers, strict=True)
        if (lacking := complaints(answer, case.named))
    ]
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:12])


# Configurations. The keys and what they admit come from the schema itself, so a new key cannot be forgotten.


class Key(NamedTuple):
    path: tuple[str | int, ...]
    admits: TypeAdapter[Any]

    def __str__(self) -> str:
        return ".".join(map(str, self.path))


def keys(section: type[BaseModel], path: tuple[str | int, ...] = ()) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        here = (*path, field.alias or name)
        yield Key(
            here, TypeAdapter(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
        )
        inner = [field.annotation, *get_args(field.annotation)]
        for part in inner:
            if isinstance(part, type) and issubclass(part, BaseModel):
                is_list = part is not field.annotation and type(None) not in inner
                yield from keys(part, (*here, 0) if is_list else here)


KEYS = list(keys(Config))

ODD_VALUES = [
    *("many", "", "a b", "../x", "200%", "-1", "9" * 400, "\x00"),
    *(-1, 0, 10**30, -0.5, 1.5, 2.0, float("inf"), float("nan")),
    *(True, [], [0], ["a", "b"], [[1], [2]], [3, 2, 1], {}, {"x": 1}),
]

OUT_OF_RANGE = {
    "run.dir": "config.toml",
    "data.tokenizer": "absent.json",
    "data.sources.0.path": "data/absent",
    "evaluation.sets.0.path": "data/absent",
    "checkpoint.dir": "config.toml",
    "start.from": "nowhere",
    "observe.wandb": "project",
}
"""For the keys whose type admits any text, a text that leads nowhere; files are relative to the run's folder."""


def is_refused_by(key: Key, value: Any) -> bool:
    try:
        key.admits.validate_python(value)
    except (ValidationError, ArithmeticError, ValueError):
        return True
    return False


def configured(folder: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Write the run's configuration to `path`, with a change."""
    raw = tomllib.loads((folder / "config.toml").read_text())
    change(raw)
    path.write_text(tomli_w.dumps(raw))
    return str(path)


def setting(path: tuple[str | int, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        *outer, last = path
        for part in outer:
            if isinstance(part, int):
                raw.extend({} for _ in range(len(raw), part + 1))
            raw = raw[part] if isinstance(part, int) else raw.setdefault(part, {})
        raw[last] = value

    return change


def test_every_key_refuses_what_its_type_or_range_does_not_admit(folder, tmp_path):
    cases = []
    for key in KEYS:
        refused = [value for value in ODD_VALUES if is_refused_by(key, value)]
        assert len(refused) >= 2, key
        for value in refused:
            path = configured(folder, tmp_path / f"{len(cases)}.toml", setting(key.path, value))
            cases.append(Case([path], [path, str(key.path[-1])], folder))
    assert len(cases) > 800
    assert_refused(cases)


def test_every_free_text_that_leads_nowhere_is_refused(folder, tmp_path):
    free = {str(key): key for key in KEYS if not is_refused_by(key, "many") and not is_refused_by(key, "a b")}
    assert free.keys() == OUT_OF_RANGE.keys()
    cases = []
    for name, text in OUT_OF_RANGE.items():
        value = text if name == "observe.wandb" else str(folder / text)
        path = configured(folder, tmp_path / f"{name}.toml", setting(free[name].path, value))
        cases.append(Case([path, NEW], [text], folder))
    assert_refused(cases)


CONTRADICTIONS = [
    (["model.num_heads=3"], "num_heads 3"),
    (["model.num_kv_heads=3"], "num_kv_heads 3"),
    (["schedule.warmup=90%"], "schedule.warmup"),
    (["schedule.tail=exponential"], "schedule.final"),
    (["run.until=1T"], "run.until"),
    (["parallel.tensor=2"], "parallel.tensor = 2"),
    (["parallel.data_shard=2"], "parallel.data_shard = 2"),
    (["parallel.data_replicate=3"], "parallel.data_replicate = 3"),
    (["model.vocab_size=10"], "train.bin"),
    (["data.seq_len=100000", NEW], "train"),
    (["observe.memory_snapshot=true"], "memory_snapshot"),
    (["nonsense"], "nonsense"),
    (["model.nonsense=1"], "model.nonsense"),
    (["--world-size", "2"], "--world-size"),
    (["--dry-run", "--world-size", "0"], "--world-size"),
    (["--dry-run", "--world-size", "3", "parallel.tensor=2"], "parallel.tensor = 2"),
    (["--dry-run", "--world-size", "16"], "batch.sequences = 8"),
    (["model.num_layers=3"], "model.num_layers"),
    (["optim.lr=0.5"], "optim.lr"),
    (["schedule.horizon=1M"], "schedule.horizon"),
    (["batch.sequences=16"], "batch.sequences"),
    (["run.seed=5"], "run.seed"),
]


def test_contradictions_are_refused(folder):
    config = str(folder / "config.toml")
    assert_refused([Case([config, *arguments], [named]) for arguments, named in CONTRADICTIONS])


IMPOSSIBLE_MESHES = [
    (["parallel.tensor=4"], "parallel.tensor = 4"),
    (["parallel.data_shard=1"], "parallel.data_shard = 1"),
    (["parallel.data_shard=4"], "parallel.data_shard = 4"),
    (["parallel.tensor=2", "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=32"], "num_heads"),
    (["parallel.tensor=2", "model.num_kv_heads=1"], "num_kv_heads"),
    (["parallel.tensor=2", "data.seq_len=33"], "data.seq_len"),
    (["batch.sequences=7"], "batch.sequences = 7"),
]


def open_on(rank: int, config: str, overrides: list[str]) -> str:
    from runtime.assembly import open_trainer
    from runtime.startup import BadInput

    try:
        with open_trainer(compose(config, overrides), ""):
            return "opened"
    except BadInput as error:
        return str(error)


@pytest.mark.parametrize(("overrides", "named"), IMPOSSIBLE_MESHES)
def test_an_impossible_mesh_is_refused_on_every_rank(folder, overrides, named):
    before = tree(folder)
    answers = run_workers(open_on, 2, str(folder / "config.toml"), ["run.name=mesh", *overrides])
    assert named in answers[0] and answers[0] == answers[1]
    assert tree(folder) == before


# Configuration files.


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[run",
        b"run = 1",
        b"[[run]]\nname='x'",
        b"[model]\nvocab_size='auto'",
        b"a = " + b"[" * 5000,
        b"a = " + b"9" * 5000,
    ],
)
def test_a_file_that_is_no_configuration_is_refused(folder, tmp_path, content):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    assert_refused([Case([str(path)], [])])


def test_a_missing_or_unreadable_configuration_is_refused(tmp_path):
    (tmp_path / "a folder").mkdir()
    paths = [str(tmp_path / name) for name in ("absent.toml", "a folder")]
    assert_refused([Case([path], [path]) for path in paths])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
).filter(lambda value: value is not None)


def compose_or_refuse(path: Path) -> None:
    try:
        compose(path)
    except ValueError as error:
        assert str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), value=values)
def test_any_value_at_any_key_is_accepted_or_refused(a_config, key, value):
    raw = tomllib.loads(a_config.read_text())
    setting(key.path, value)(raw)
    path = a_config.with_name("any.toml")
    try:
        path.write_text(tomli_w.dumps(raw), encoding="utf-8")
    except (TypeError, ValueError, UnicodeEncodeError):  # TOML has no word for it
        return
    compose_or_refuse(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_a_configuration_is_accepted_or_refused(a_config, data):
    content = bytearray(a_config.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = a_config.with_name("damaged.toml")
    path.write_bytes(content)
    compose_or_refuse(path)


@pytest.fixture(scope="module")
def a_config(folder, tmp_path_factory) -> Path:
    return Path(shutil.copy(folder / "config.toml", tmp_path_factory.mktemp("any")))


# Datasets.


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << (position % 8)
    path.write_bytes(content)


def damages(size: int) -> dict[str, Callable[[Path], None]]:
    """Ways to damage a file of `size` bytes."""
    chance = random.Random(size)
    places = [0, size - 1, *(chance.randrange(size) for _ in range(2))]
    return {
        "truncated": lambda path: os.truncate(path, size - 1),
        "halved": lambda path: os.truncate(path, size // 2),
        "emptied": lambda path: os.truncate(path, 0),
        "longer": lambda path: path.write_bytes(path.read_bytes() + b"\x00\x00"),
        "garbage": lambda path: path.write_bytes(chance.randbytes(size)),
        "missing": lambda path: path.unlink(),
        "a folder": lambda path: (path.unlink(), path.mkdir()),
    } | {f"flipped at {place}": lambda path, place=place: flip(path, place) for place in places}


DATA_FILES = [f"{name}.{suffix}" for name in ("train", "heldout") for suffix in ("bin", "idx")]


@pytest.mark.parametrize("file", DATA_FILES)
def test_a_damaged_data_file_is_refused(folder, tmp_path, file):
    cases = []
    for kind, damage in damages((folder / "data" / file).stat().st_size).items():
        target = tmp_path / kind
        shutil.copytree(folder / "data", target)
        damage(target / file)
        pair = target / file.split(".")[0]
        key = "data.sources.0.path" if pair.name == "train" else "evaluation.sets.0.path"
        cases.append(Case([str(folder / "config.toml"), f"{key}={pair}", NEW], [str(pair)]))
    assert_refused(cases)
    assert [path.name for path in (folder / "runs").iterdir()] == ["tiny"]


def test_every_flip_in_an_index_is_refused(folder, tmp_path):
    """Without prepare's fingerprint: what a flip leaves possible at all must still be the same tokens."""
    size = (folder / "data" / "heldout.idx").stat().st_size
    for position in range(0, size, 7):
        path = tmp_path / "flipped"
        for suffix in (".bin", ".idx"):
            shutil.copy(folder / "data" / f"heldout{suffix}", path.with_suffix(suffix))
        flip(path.with_suffix(".idx"), position)
        try:
            found = TokenFile(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        assert found.num_tokens == TokenFile(folder / "data" / "heldout").num_tokens


TOKENIZERS = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b'{"model": {}}',
    b'{"model": {"vocab": 3}}',
    b"\xff\xfe",
    b"{" * 5000,
    b'"a"',
]


def test_a_tokenizer_that_is_none_is_refused(folder, tmp_path):
    cases = []
    for number, content in enumerate(TOKENIZERS):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        for size in ("61", "auto"):
            arguments = [f"data.tokenizer={path}", f"model.vocab_size={size}", NEW]
            cases.append(Case([str(folder / "config.toml"), *arguments], [str(path)]))
    assert_refused(cases)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{", b"\xff", b'{"fingerprint": "x"}', b'{"vocab_size": 1000}'])
def test_metadata_that_does_not_fit_is_refused(folder, tmp_path, content):
    shutil.copytree(folder / "data", tmp_path / "data")
    (tmp_path / "data" / "train.json").write_bytes(content)
    source = f"data.sources.0.path={tmp_path / 'data' / 'train'}"
    assert_refused([Case([str(folder / "config.toml"), source, NEW], ["train.json"])])


def test_other_data_on_resume_is_refused(folder, tmp_path):
    write_corpus(tmp_path / "other", seed=7)
    command = [str(folder / "config.toml"), f"data.sources.0.path={tmp_path / 'other'}"]
    assert_refused([Case(command, ["data.sources", "data.on_change"])])


# Checkpoints.


def newest_folder(folder: Path) -> Path:
    return folder / "runs" / "tiny" / "checkpoints" / newest(folder / "runs" / "tiny")


def checkpoint_files(folder: Path) -> list[str]:
    return sorted(path.name for path in newest_folder(folder).iterdir())


def damaged_checkpoints(folder: Path, target: Path) -> Iterator[tuple[str, Path]]:
    """Copies of the run, each with one damage to one file of its newest checkpoint; and that file."""
    for file in checkpoint_files(folder):
        size = (newest_folder(folder) / file).stat().st_size
        for kind, damage in damages(size).items():
            if file == MANIFEST and kind == "missing":
                continue  # without it this is a save that was interrupted, and not a checkpoint
            damaged = copy(folder, target / f"{file} {kind}")
            damage(newest_folder(damaged) / file)
            yield file, damaged


def test_damage_to_any_file_of_the_only_checkpoint_is_refused(folder, tmp_path):
    alone = copy(folder, tmp_path / "alone")
    for each in newest_folder(alone).parent.iterdir():
        if each != newest_folder(alone):
            shutil.rmtree(each)
    assert {MANIFEST, "state.json"} < set(checkpoint_files(alone))
    cases = []
    for file, damaged in damaged_checkpoints(alone, tmp_path):
        checkpoint = newest_folder(damaged)
        cases.append(Case([str(damaged / "config.toml")], [checkpoint.name, file]))
        start = [str(folder / "config.toml"), NEW, f"start.from={checkpoint}"]
        cases.append(Case(start, [checkpoint.name, file], damaged))
    assert_refused(cases)
    assert [path.name for path in (folder / "runs").iterdir()] == ["tiny"]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(folder, tmp_path):
    damaged = list(damaged_checkpoints(folder, tmp_path))[::5]
    cases = [Case([str(copied / "config.toml"), f"run.until={9 * BATCH}"], []) for _, copied in damaged]
    (answers,) = run_workers(attempt, 1, cases)
    for (file, copied), answer in zip(damaged, answers, strict=True):
        assert answer.code == 0 and "Traceback" not in answer.output, answer
        assert f"tokens-{8 * BATCH}-segment-0 damaged: {file}" in answer.output
        (resumed,) = [row for row in read_rows(copied / "runs/tiny/events.jsonl") if row["event"] == "resume"]
        assert resumed["tokens"] == 4 * BATCH


def rewrite(checkpoint: Path, file: str, content: bytes) -> None:
    """Replace a file, and make the manifest agree with it."""
    files = manifest.decode((checkpoint / MANIFEST).read_bytes())
    checksum = Checksum()
    checksum.update(content)
    (checkpoint / file).write_bytes(content)
    (checkpoint / MANIFEST).write_bytes(manifest.encode({**files, file: checksum.record()}))


class Malicious:
    """A pickle that makes a folder where it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def states(state: dict[str, Any]) -> Iterator[bytes]:
    """Contents of state.json that no version of this program wrote."""
    yield from (b"", b"[]", b"3", b"null", b"{}", b"{", b"\xff\xfe", b'{"format": 1}')
    yield json.dumps({**state, "format": 99}).encode()
    for key in state:
        yield json.dumps({name: value for name, value in state.items() if name != key}).encode()
        yield json.dumps({**state, key: None}).encode()
    for key in state["train"]:
        yield json.dumps({**state, "train": {**state["train"], key: "x"}}).encode()


def test_a_forged_checkpoint_is_refused(folder, tmp_path):
    forged: list[tuple[str, bytes]] = [(".metadata", pickle.dumps(Malicious(tmp_path / "made")))]
    forged += [(".metadata", content) for content in (b"", b"garbage", pickle.dumps({}), pickle.dumps([1]))]
    forged += [
        ("state.json", content) for content in states(json.loads((newest_folder(folder) / "state.json").read_text()))
    ]
    cases = []
    for number, (file, content) in enumerate(forged):
        copied = copy(folder, tmp_path / str(number))
        rewrite(newest_folder(copied), file, content)
        cases.append(Case([str(copied / "config.toml")], [newest_folder(copied).name]))
    assert_refused(cases)
    assert not (tmp_path / "made").exists()


STARTS = [
    "data",
    "runs",
    "runs/tiny/config.toml",
    "absent",
    "runs/tiny/checkpoints/tokens-1-segment-0",
    "data/train.bin",
]


def test_a_start_from_what_is_no_checkpoint_is_refused(folder, tmp_path):
    starts = [str(folder / each) for each in STARTS] + ["", "no-protocol://x/y"]
    config = str(folder / "config.toml")
    cases = [Case([config, NEW, f"start.from={each}"], ["start.from", each]) for each in starts]
    checkpoint = f"start.from={newest_folder(folder)}"
    for change in ("model.num_layers=3", "model.hidden_size=64", "model.qk_norm=true"):
        cases.append(Case([config, NEW, checkpoint, change], ["start.from", newest_folder(folder).name]))
    assert_refused(cases)


# The command itself.


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_exits_with_2_and_one_message(folder, processes):
    before = tree(folder)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes > 1 else []
    command = [
        sys.executable,
        *launcher,
        "-m",
        "launch.pretrain",
        str(folder / "config.toml"),
        "data.sources.0.path=gone",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.stderr.count("error: gone.idx: cannot be read") == 1
    if processes == 1:
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    else:
        assert ended.returncode != 0 and "exitcode  : 2" in ended.stderr
    assert tree(folder) == before
