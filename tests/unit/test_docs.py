"""The pages say what is there: every key with its default, options and files that exist, presets that compose."""

import ast
import importlib
import re
import runpy
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from matplotlib.image import imread
from pydantic import BaseModel

from benchmarks import bench
from growth.operator import find, names
from launch.config import compose
from launch.growth_arguments import split_steps
from launch.growth_config import RunConfiguration as Config
from launch.ladder import laid_over, read_ladder
from launch.ladder_runs import plan
from runtime.schedule_config import ScheduleConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LADDERS = sorted(ROOT.glob("configs/ladder-*.toml"))
PRESETS = sorted({*ROOT.glob("configs/*.toml")} - {*LADDERS})
DERIVED = {"model.num_kv_heads": "`model.num_heads`", "model.head_dim": "`model.hidden_size / model.num_heads`"}
"""Keys that the schema requires, and whose absence its validator fills."""
OTHERS = {
    *(
        "--dist",
        "--no-loadscope-reorder",
        "--nproc-per-node",
        "--nnodes",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--rdzv-id",
        "--max-restarts",
    ),
    *("--shutdown-timeout", "--nodes", "--gpus-per-node", "--signal", "--dependency", "--logdir", "--ckpt-format"),
    *("--model", "--model_args", "--tasks", "--batch_size", "--include_path"),
}
"""Options of pytest, torchrun, Slurm, TensorBoard, Megatron-LM and lm-eval."""


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the schema with its field; a list's entries are below `name[]`, those of a section below `name`."""
    for name, field in section.model_fields.items():
        path = prefix + (field.alias or name)
        entry = next((each for each in get_args(field.annotation) if isinstance(each, type)), None)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{path}.")
            continue
        yield path, field
        if entry is not None and issubclass(entry, BaseModel):
            yield from keys(entry, f"{path}." if type(None) in get_args(field.annotation) else f"{path}[].")


KEYS = dict(keys())


def test_the_plot_of_every_schedule_can_be_drawn(tmp_path):
    script = runpy.run_path(str(ROOT / "docs" / "schedules.py"))
    script["draw"](tmp_path / "schedules.png")
    assert imread(tmp_path / "schedules.png").shape == imread(ROOT / "docs" / "schedules.png").shape
    drawn = {section.get("kind", "wsd") for panel in script["PANELS"].values() for section in panel.values()}
    kinds = {*get_args(ScheduleConfig.model_fields["kind"].annotation)}
    assert drawn == kinds - {"rewarm"}, "which is a part of a sequence"


def documented() -> dict[str, str]:
    """The default that docs/configuration.md gives for each key."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9_.\[\]]+)` \| (.*?) \|", text, re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a key is described twice"
    return dict(rows)


def test_every_key_is_described_and_none_is_invented():
    assert set(documented()) == set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_the_default_of_a_key_is_the_one_described(key):
    field, cell = KEYS[key], documented()[key]
    if field.is_required():
        assert cell == DERIVED.get(key, "required")
    elif field.default is None:
        assert cell == "`none`"
    else:
        stated = tomllib.loads(f"value = {cell.strip('`')}")["value"]
        assert stated == (list(field.default) if isinstance(field.default, tuple) else field.default)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_keys_named_in_the_text_exist(page):
    sections, suffixes = "|".join(Config.model_fields), "json|toml|safetensors"
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text())
    words = {word for each in inline for word in re.split(r"[\s=]+", each)}
    known = {key[: end.start()] for key in KEYS for end in re.finditer(r"\.|$", key)}
    assert {word for word in words if re.fullmatch(rf"(?:{sections})(?:\.(?!{suffixes})[a-z_]+)+", word)} <= known


def source(path: Path) -> str:
    """A script, and with `arguments` what gives all benchmarks their options."""
    text = path.read_text()
    if re.search(r"from benchmarks\.bench import [\s(\w,]*\barguments\b", text):
        text += (ROOT / "benchmarks" / "bench.py").read_text()
    return text


def options(path: Path) -> set[str]:
    return set(re.findall(r'"(--[a-z][a-z0-9-]*)"', source(path)))


SCRIPTS = {ids(path): options(path) for path in (*ROOT.glob("launch/*.py"), *ROOT.glob("benchmarks/*.py"))}
SCRIPTS["launch/grow.py"] |= {
    f"--{key.replace('_', '-')}" for name in names() for key in find(name).options.model_fields
}


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """The scripts that a page calls, with what follows them."""
    for command in re.sub(r"\\\n\s*", "", page.read_text()).splitlines():
        for script in SCRIPTS:
            for after in command.split(script)[1:2]:
                yield script, after.split("`")[0]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_options_in_the_text_exist(page):
    known = OTHERS.union(*SCRIPTS.values())
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text())) <= known
    for script, after in commands(page):
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", after)) <= SCRIPTS[script], after


def choices(script: str) -> dict[str, tuple[set[str], bool]]:
    """What each option of a script that has `choices` accepts, and whether it takes several."""
    found = {}
    names = vars(importlib.import_module(script.removesuffix(".py").replace("/", "."))) | vars(bench)
    for call in (each for each in ast.walk(ast.parse(source(ROOT / script))) if isinstance(each, ast.Call)):
        given = {each.arg: each.value for each in call.keywords}
        if "choices" in given:
            accepted = set(map(str, eval(ast.unparse(given["choices"]), names)))
            found[call.args[0].value] = accepted, "nargs" in given
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_values_in_the_text_are_among_the_choices(page):
    for script, after in commands(page):
        for option, (accepted, several) in choices(script).items() if "--" in after else ():
            for values in re.findall(rf"(?<!\S){option}[ =]((?:(?!--)\S+ ?)+)", after):
                assert set(values.split()[: None if several else 1]) <= accepted, after
        if script == "launch/grow.py" and "--operator" in after:
            split_steps(shlex.split(after, comments=True))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_named_in_the_text_exist(page):
    parts = "runtime|launch|growth|schedulers|tests|benchmarks|experiments|configs|docs"
    for name in re.findall(rf"(?<![\w/.-])((?:{parts})/[a-z0-9_/.-]+\.(?:py|toml|md|sbatch))\b", page.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("preset", PRESETS, ids=ids)
def test_presets_compose(preset, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = compose(preset, ["model.vocab_size=32768"])
    assert config.run.name == preset.stem
    assert any(ids(preset) in page.read_text() for page in PAGES)


@pytest.mark.parametrize("ladder", LADDERS, ids=ids)
def test_ladders_come_to_runs(ladder):
    known, base = read_ladder(ladder)
    runs = plan(known, laid_over(base, {"model": {"vocab_size": 4096}}), ladder)
    assert known.name == ladder.stem and len(runs) > 1
    assert any(ids(ladder) in page.read_text() for page in PAGES)


def test_every_command_of_a_preset_s_head_is_one_of_ours():
    for preset in PRESETS:
        for line in preset.read_text().splitlines():
            if line.startswith("#   python"):
                script, config, *rest = shlex.split(line[1:])[1:]
                assert script in SCRIPTS and config == ids(preset)
                assert {each for each in rest if each.startswith("--")} <= SCRIPTS[script]
                compose(ROOT / config, [each for each in rest if "=" in each])


def test_the_slurm_template_is_a_shell_script():
    done = subprocess.run(["bash", "-n", ROOT / "launch" / "slurm" / "pretrain.sbatch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
