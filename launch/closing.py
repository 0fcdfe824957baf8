"""What a finished launch tells its user: where things are, how good the model is, what it writes, how to go on."""

import json
import math
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.config import Config
from runtime.model.counts import count
from runtime.observe.jsonl import read_rows
from runtime.persistence import checkpoint_location

LARGEST_SAMPLED = 100_000_000
"""Parameters up to which the closing lines show samples: a larger model is worth a command of its own."""
PROMPTS = ("def __init__(self", "import os", "class Test")


def close(config: Config, command: list[str], outcome: str) -> None:
    """Draw loss.png and print the closing lines of a launch; for one process, after training."""
    folder = Path(config.run.dir) / config.run.name
    unigram = unigram_losses(config)
    plot = draw(folder, next(iter(unigram.values()), None))
    print(f"\nrun            {folder}  ({outcome})")
    if plot is not None:
        print(f"loss curve     {plot}")
    for row in last_evaluations(folder):
        known = unigram.get(row["set"].removesuffix("-ema"))
        beside = f"; a unigram model has {known:.4f}" if known is not None else ""
        bits = f", {row['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in row else ""
        print(f"held-out loss  {row['loss']:.4f} nats per token on {row['set']}{bits}{beside}")
    checkpoints = checkpoint_location(config) if config.checkpoint.dir else str(folder)
    if outcome == "finished" and count(config.model).total <= LARGEST_SAMPLED:
        show_samples(checkpoints)
    print(f"\nresume         {' '.join(shlex.quote(part) for part in command)}")
    print(f"sample         python launch/sample.py {checkpoints} --prompt 'def '")
    if config.observe.tensorboard:
        print(f"tensorboard    tensorboard --logdir {folder / 'tensorboard'}")


def unigram_losses(config: Config) -> dict[str, float]:
    """The loss of a unigram model on each held-out set for which `prepare` recorded it."""
    losses = {}
    for held_out in config.evaluation.sets:
        with suppress(OSError, ValueError, KeyError, TypeError):
            recorded = json.loads(Path(held_out.path + ".json").read_text(encoding="utf-8"))
            losses[held_out.name] = float(recorded["unigram_loss"])
    return losses


def last_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The newest row of each evaluation set. A loss that is not finite, which is not written, is NaN."""
    newest = {row["set"]: {"loss": math.nan} | row for row in read_rows(folder / "evaluations.jsonl")}
    return list(newest.values())


def draw(folder: Path, unigram: float | None) -> Path | None:
    """loss.png, or None with a warning if there is nothing to draw or no way to."""
    from runtime.observe.plot import loss_plot

    try:
        return loss_plot(folder, unigram_loss=unigram)
    except (OSError, ValueError) as error:
        print(f"no loss curve: {error}", file=sys.stderr)
        return None


def show_samples(checkpoints: str) -> None:
    """A few lines the model writes; a model without a tokenizer writes none."""
    from launch.sample import sample_lines

    try:
        lines = sample_lines(checkpoints, PROMPTS, max_tokens=48, seed=0)
    except ValueError as error:
        print(f"no samples: {error}", file=sys.stderr)
        return
    print("\nsampled:")
    for line in lines:
        print("\n".join(f"    {part}" for part in line.rstrip().splitlines()) + "\n    " + "-" * 40)
