"""The second text: English documentation that comes with Python and with the packages this project needs anyway."""

import ast
import importlib.util
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

PACKAGES = ("numpy", "scipy", "pandas", "matplotlib")
FOLDER = dict.fromkeys(("cpu", "smoke"), "data/experiments/documentation-512")
"""Where its token files lie, of the sizes that make them."""
TOKENIZER = "data/experiments/stdlib-512"
"""The first text's: it has to be the same one."""
LEAST = 2_000
"""Characters that a document has at least."""


def prepare(size: str) -> None:
    """Make the token files of the second text, unless they are there; of the gpu size they are data/second, which is
    anybody's to make. ValueError where that cannot be done."""
    folder = FOLDER.get(size)
    if folder is None or Path(folder, "preparation.json").exists():
        return
    text = Path(f"{folder}.jsonl")
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents()), encoding="utf-8")
    command = [sys.executable, "launch/prepare.py", str(text), "--tokenizer", TOKENIZER, "--holdout", "5%"]
    if code := subprocess.run([*command, "--out", folder], check=False).returncode:
        raise ValueError(f"preparing {folder} ended with code {code}")


def documents() -> Iterator[str]:
    """The language reference's topics, and of each module of the standard library and the packages its docstrings."""
    yield from (text for text in topics.values() if len(text) >= LEAST)
    library = Path(sysconfig.get_paths()["stdlib"])
    folders = [library, *(Path(spec.origin).parent for name in PACKAGES if (spec := importlib.util.find_spec(name)))]
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if "tests" in path.parts or (folder == library and "site-packages" in path.parts):
                continue
            text = docstrings(path)
            if len(text) >= LEAST:
                yield text


def docstrings(path: Path) -> str:
    """All docstrings of a module, in order; none of one that does not parse."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return ""
    return "\n\n".join(text for node in definitions(tree) if (text := ast.get_docstring(node)))


def definitions(node: ast.AST) -> Iterator[ast.AST]:
    """A module and what it defines at its own level, with what its classes define; the inside of functions is code."""
    yield node
    if isinstance(node, ast.Module | ast.ClassDef):
        for each in node.body:
            if isinstance(each, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from definitions(each)
