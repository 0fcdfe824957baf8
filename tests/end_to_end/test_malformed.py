"""Whatever is wrong with what a user gives: exit code 2, one message that names it, and nothing written."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
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
from tests.corpus import tiny_run, write_corpus
from tests.end_to_end.runs import ROOT, main, newest
from tests.workers import run_workers

BATCH = 8 * 32


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


@pytest.fixture
def spoilt(folder, tmp_path) -> Path:
    """A copy of that folder, to be damaged; its paths lead to the copy."""
    return copy(folder, tmp_path / "copy")


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    config = target / "config.toml"
    config.write_text(config.read_text().replace(str(folder), str(target)))
    return target


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with size and time of change."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.stat()
        found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


class Answer(NamedTuple):
    code: int
    output: str
    wrote: list[str]


def attempt(rank: int, folder: Path, commands: list[list[str]]) -> list[Answer]:
    """Launches, one after the other, in one process; and what each left behind."""
    answers = []
    for argv in commands:
        before = tree(folder)
        code, output = main(rank, argv)
        after = tree(folder)
        answers.append(Answer(code, output, sorted(key for key in before | after if before.get(key) != after.get(key))))
    return answers


def launch(folder: Path, *commands: list[str]) -> list[Answer]:
    (answers,) = run_workers(attempt, 1, folder, [*commands])
    return answers


def assert_refused(answer: Answer, *named: str) -> None:
    assert answer.code == 2, answer
    assert "error: " in answer.output and "Traceback" not in answer.output, answer
    assert not answer.wrote, answer
    for name in named:
        assert name in answer.output, f"{name!r} is not named: {answer}"


def assert_all_refused(folder: Path, cases: dict[tuple[str, ...], list[str]]) -> None:
    """Launch all, and check that each is refused and names what its key lists."""
    for named, answer in zip(cases, launch(folder, *cases.values()), strict=True):
        assert_refused(answer, *named)


# Configurations. The keys and what they admit come from the schema itself, so a new key cannot be forgotten.


class Key(NamedTuple):
    path: tuple[str | int, ...]
    admits: TypeAdapter[Any]

    def __str__(self) -> str:
        return ".".join(map(str, self.path))


def keys(section: type[BaseModel], path: tuple[str | int, ...] = ()) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        here = (*path, field.alias or name)
        yield Key(here, TypeAdapter(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation))
        inner = [field.annotation, *get_args(field.annotation)]
        for part in inner:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from keys(part, here if part is field.annotation else (*here, 0))


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


def configured(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> str:
    raw = tomllib.loads((folder / "config.toml").read_text())
    change(raw)
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(raw))
    return str(path)


def setting(path: tuple[str | int, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        *outer, last = path
        for part in outer:
            raw = raw[part] if isinstance(part, int) else raw.setdefault(part, {})
        raw[last] = value

    return change


def test_every_key_refuses_what_its_type_or_range_does_not_admit(spoilt):
    cases: dict[tuple[str, ...], list[str]] = {}
    for key in KEYS:
        refused = [value for value in ODD_VALUES if is_refused_by(key, value)]
        assert len(refused) >= 2, key
        for value in refused:
            path = configured(spoilt, f"case-{len(cases)}", setting(key.path, value))
            cases[str(key.path[0]), str(key.path[-1]).strip("0") or "sources", path] = [path]
    assert len(cases) > 800
    assert_all_refused(spoilt, cases)


def test_every_free_text_that_leads_nowhere_is_refused(spoilt):
    free = {str(key) for key in KEYS if not is_refused_by(key, "many") and not is_refused_by(key, "a b")}
    assert free == set(OUT_OF_RANGE)
    cases: dict[tuple[str, ...], list[str]] = {}
    for key, text in OUT_OF_RANGE.items():
        value = text if key == "observe.wandb" else str(spoilt / text)
        path = configured(spoilt, key, setting(tuple(int(p) if p.isdigit() else p for p in key.split(".")), value))
        cases[(text,)] = [path, *(["run.name=new"] if key in ("start.from", "run.dir") else [])]
    assert_all_refused(spoilt, cases)


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
    (["data.seq_len=100000", "run.name=new"], "train"),
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
    assert_all_refused(folder, {(named,): [config, *arguments] for arguments, named in CONTRADICTIONS})


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
    "content", [b"", b"\xff\xfe\x00", b"[run", b"run = 1", b"[[run]]\nname='x'", b"[model]\nvocab_size='auto'", b"a.b.c = 1"]
)
def test_a_file_that_is_no_configuration_is_refused(folder, tmp_path, content):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    (answer,) = launch(tmp_path, [str(path)])
    assert_refused(answer)


def test_a_missing_or_unreadable_configuration_is_refused(tmp_path):
    for answer, path in zip(launch(tmp_path, ["absent.toml"], [str(tmp_path)]), ("absent.toml", str(tmp_path)), strict=True):
        assert_refused(answer, path)


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
def test_any_value_at_any_key_is_accepted_or_refused(spoilt_config, key, value):
    raw = tomllib.loads(spoilt_config.read_text())
    setting(key.path, value)(raw)
    path = spoilt_config.with_name("any.toml")
    try:
        path.write_text(tomli_w.dumps(raw), encoding="utf-8")
    except (TypeError, ValueError, UnicodeEncodeError):  # TOML has no word for it
        return
    compose_or_refuse(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_a_configuration_is_accepted_or_refused(spoilt_config, data):
    content = bytearray(spoilt_config.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = spoilt_config.with_name("damaged.toml")
    path.write_bytes(content)
    compose_or_refuse(path)


@pytest.fixture(scope="module")
def spoilt_config(folder, tmp_path_factory) -> Path:
    return Path(shutil.copy(folder / "config.toml", tmp_path_factory.mktemp("any")))


# Datasets.


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << (position % 8)
    path.write_bytes(content)


def damages(size: int) -> dict[str, Callable[[Path], None]]:
    """Ways to damage a file of `size` bytes."""
    chance = random.Random(size)
    places = [0, size // 2, size - 1, *(chance.randrange(size) for _ in range(3))]
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
    cases: dict[tuple[str, ...], list[str]] = {}
    for number, (kind, damage) in enumerate(damages((folder / "data" / file).stat().st_size).items()):
        target = tmp_path / str(number)
        shutil.copytree(folder / "data", target)
        damage(target / file)
        part, name = file.split(".")[0], "data.sources.0.path" if file.startswith("train") else "evaluation.sets.0.path"
        cases[str(target / part), kind[:0]] = [str(folder / "config.toml"), f"{name}={target / part}", "run.name=new"]
    assert_all_refused(tmp_path, cases)
    assert not (folder / "runs" / "new").exists()


def test_every_flip_in_an_index_is_refused(folder, tmp_path):
    """Here without prepare's fingerprint beside it: what a flip leaves possible at all must still be the same tokens."""
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


TOKENIZERS = [b"", b"{}", b"[]", b"null", b'{"model": {}}', b'{"model": {"vocab": 3}}', b"\xff\xfe", b"{" * 5000, b'"a"']


def test_a_tokenizer_that_is_none_is_refused(folder, tmp_path):
    cases: dict[tuple[str, ...], list[str]] = {}
    for number, content in enumerate(TOKENIZERS):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        for size in ("61", "auto"):
            arguments = [f"data.tokenizer={path}", f"model.vocab_size={size}", "run.name=new"]
            cases[str(path), size[:0] + " " * len(cases) * 0, str(path)[: -1 if size == "auto" else None]] = [
                str(folder / "config.toml"),
                *arguments,
            ]
    assert_all_refused(tmp_path, cases)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{", b"\xff", b'{"fingerprint": "x"}', b'{"vocab_size": 1000}'])
def test_metadata_that_does_not_fit_is_refused(folder, tmp_path, content):
    shutil.copytree(folder / "data", tmp_path / "data")
    (tmp_path / "data" / "train.json").write_bytes(content)
    source = f"data.sources.0.path={tmp_path / 'data' / 'train'}"
    (answer,) = launch(tmp_path, [str(folder / "config.toml"), source, "run.name=new"])
    assert_refused(answer, "train.json")


def test_other_data_on_resume_is_refused(folder, tmp_path):
    write_corpus(tmp_path / "other", seed=7)
    (answer,) = launch(folder, [str(folder / "config.toml"), f"data.sources.0.path={tmp_path / 'other'}"])
    assert_refused(answer, "data.sources", "data.on_change")


# Checkpoints.


def checkpoint_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs/tiny/checkpoints" / newest(folder / "runs/tiny")).iterdir())


def only_newest(folder: Path) -> Path:
    """The newest checkpoint of a copy, after removing the others."""
    run = folder / "runs" / "tiny"
    name = newest(run)
    for each in (run / "checkpoints").iterdir():
        if each.name != name:
            shutil.rmtree(each)
    return run / "checkpoints" / name


def test_damage_to_any_file_of_the_only_checkpoint_is_refused(folder, tmp_path):
    cases: dict[tuple[str, ...], list[str]] = {}
    files = checkpoint_files(folder)
    assert {MANIFEST, "state.json"} < set(files)
    for file in files:
        size = (only := folder / "runs/tiny/checkpoints" / newest(folder / "runs/tiny") / file).stat().st_size
        assert only.exists()
        for kind, damage in damages(size).items():
            if file == MANIFEST and kind in ("missing", "a folder"):
                continue  # without its manifest it is a save that was interrupted
            target = copy(folder, tmp_path / str(len(cases)))
            checkpoint = only_newest(target)
            damage(checkpoint / file)
            cases[file, checkpoint.name, str(target)[:1] * (len(cases) + 1)[:0] if False else str(target)] = [
                str(target / "config.toml")
            ]
    assert_all_refused(tmp_path, cases)
