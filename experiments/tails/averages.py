"""Averages of a stable run's last checkpoints, evaluated: what costs nothing in place of a tail."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from experiments.arms import Arm
from experiments.contest import SEEDS
from experiments.store import Store
from experiments.tails import plan

CHOICES: Mapping[str, str] = {
    "uniform": "uniform",
    "tail 1-sqrt": "tail:1-sqrt",
    "tail linear": "tail:linear",
    "last five": "lawa:5",
}
"""Arguments of launch/merge.py --weights, by what the report calls them."""
LOSS = re.compile(r"^merged\s+\S+: loss ([0-9.]+)", re.MULTILINE)


def measured(size: str, lr: float) -> dict[str, dict[str, float]]:
    """Held-out losses of every average by seed, and of the newest checkpoint itself; of the runs that are there.

    Kept in the experiment's folder of runs, so that a report is written again without measuring anew.
    """
    found: dict[str, dict[str, float]] = {}
    for seed in SEEDS:
        run = plan.stable(size, lr, seed)
        folder = Store("tails", size).path(run).with_suffix("")
        if not (folder / "checkpoints").is_dir():
            continue
        for label, weights in CHOICES.items():
            found.setdefault(label, {})[str(seed)] = _average(size, run, folder, weights)
    return found


def parts(size: str, folder: Path) -> list[Path]:
    """The checkpoints of the last part of a stable run."""
    first = plan.tokens_at(size, 1 - plan.AVERAGED)
    found = [path for path in (folder / "checkpoints").iterdir() if path.name.startswith("tokens-")]
    return sorted((path for path in found if _tokens(path) > first), key=_tokens)


def _tokens(path: Path) -> int:
    return int(path.name.split("-")[1])


def beside(folder: Path, suffix: str) -> Path:
    """A path next to a run's folder, whose name ends in a rate and a seed and has no suffix to be replaced."""
    return folder.with_name(f"{folder.name}.{suffix}")


def _average(size: str, run: Arm, folder: Path, weights: str) -> float:
    kept = beside(folder, "averages.json")
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if weights not in known:
        out = beside(folder, "average")
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "launch/merge.py", *map(str, parts(size, folder)), str(out)]
        done = subprocess.run(
            [*command, "--weights", weights, "--evaluate"], capture_output=True, text=True, check=False
        )
        shutil.rmtree(out, ignore_errors=True)
        if done.returncode:
            raise ValueError(f"averaging {run.name} with {weights} failed: {done.stderr.strip()}")
        known[weights] = float(LOSS.search(done.stdout)[1])
        kept.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return known[weights]
