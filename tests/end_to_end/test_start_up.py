"""What a start does not wait for: packages that it does not use."""

import ast
import subprocess
import sys

import pytest

from launch.config import dump
from launch.main import VERBS
from tests.corpus import tiny_run, write_corpus
from tests.end_to_end.runs import ROOT

HEAVY = ("torch", "pandas", "scipy", "matplotlib", "pydantic", "megatron", "rich")


def loaded_after(program: str, names: tuple[str, ...]) -> list[str]:
    """Those of these packages that a Python which has run the program has loaded."""
    program = f"import sys\n{program}\nprint([name for name in {names!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return ast.literal_eval(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("verb", VERBS)
def test_help_needs_no_heavy_package(verb):
    program = f"from launch.{verb} import main\ntry: main(['--help'])\nexcept SystemExit as end: assert not end.code"
    assert loaded_after(program, HEAVY) == []


def test_a_run_of_one_process_in_float32_never_loads_the_compiler(tmp_path):
    """From the start to the last checkpoint; it takes a second or two of every process of every start."""
    for name in ("train", "heldout"):
        write_corpus(tmp_path / "data" / name, 30, seed=len(name))
    config = tmp_path / "config.toml"
    config.write_text(dump(tiny_run(tmp_path, observe={"tensorboard": True})))
    program = f"from launch.pretrain import main\nassert main([{str(config)!r}]) == 0\n"
    compiler = ("torch._dynamo", "torch._inductor")
    assert loaded_after(program, (*compiler, "torch")) == ["torch"]
