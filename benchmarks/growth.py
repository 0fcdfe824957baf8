"""What growth costs: between runs against a copy of the checkpoint, in a run against a save and a load.

    python benchmarks/growth.py --rounds 6 --threads 1 --folder runs

Between runs: `launch/grow.py` stacks the blocks of a checkpoint `factor` times, and a plain copy reads the same
checkpoint's files and writes them anew, with fsync, in the same folder; the two take turns. Each moves what it reads
and what it writes; the ratio is that of bytes per second, growth over copy, the checks of the source and the checksums
of the target included. In a run: the growth in memory, from the decision to the next segment's trainer, against saving
the segment before it and loading the one after it, which is what a growth between two runs would cost at least. Ratios
are medians over rounds, with a bootstrap interval.
"""

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch

if not __package__:  # beside this file, which has a package's name, that package would not be found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bench import machine, ratio, this_device, write_tokens
from launch.chain import growing
from launch.config import dump
from launch.grow import main as grow
from launch.growth_config import RunConfiguration, segments
from runtime.assembly import from_origin, open_segment
from runtime.session import open_session
from runtime.startup import process_group
from runtime.trainer import Trainer

BLOCK = 1 << 22
SEQUENCES, SEQ_LEN = 4, 128


def configuration(options: argparse.Namespace, folder: Path) -> RunConfiguration:
    """A run on random tokens that would grow before its first step."""
    write_tokens(folder / "train", options.vocab, 50_000)
    model = {"num_layers": options.layers, "hidden_size": options.hidden, "intermediate_size": 4 * options.hidden}
    return RunConfiguration.model_validate(
        {
            "run": {"name": "small", "dir": str(folder)},
            "model": model | {"num_heads": options.hidden // 64, "vocab_size": options.vocab},
            "data": {"seq_len": SEQ_LEN, "sources": [{"path": str(folder / "train")}]},
            "batch": {"sequences": SEQUENCES},
            "optim": {"lr": 1e-3},
            "schedule": {"horizon": 100 * SEQUENCES * SEQ_LEN},
            "observe": {"tensorboard": False},
            "growth": [
                {
                    "at": 0,
                    "operator": "depth.stack",
                    "options": {"factor": options.factor},
                    "moments": "keep",
                    "verify": "none",
                }
            ],
        }
    )


def now() -> float:
    """The wall's clock, when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(action: Callable[[], object]) -> float:
    start = now()
    action()
    return now() - start


def live(config: RunConfiguration, rounds: int) -> dict[str, list[float]]:
    """Seconds of growing in memory, and of saving the segment before and loading the one after; the run's checkpoint
    stays behind."""
    times: dict[str, list[float]] = {"growth": [], "save and load": []}
    with (
        open_session(segments(config), dump(config)) as session,
        open_segment(session, from_origin(session)) as trainer,
    ):
        for turn in range(rounds + 1):
            save(trainer)
            began = now()
            with open_segment(session, growing(session, trainer, config.growth[0])) as grown:
                growth = now() - began
                save(grown)
                name = grown.parts.persistence.store.newest()
                apart = seconds(partial(save, trainer)) + seconds(partial(grown.parts.persistence.load, name))
            if turn:
                times["growth"].append(growth)
                times["save and load"].append(apart)
    return times


def save(trainer: Trainer) -> None:
    trainer.parts.persistence.save(trainer.state, elapsed=0.0, wait=True, retain=False)


def offline(source: Path, factor: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Bytes per second of growing a checkpoint, and of copying it."""
    rates: dict[str, list[float]] = {"growth": [], "copy": []}
    target = folder / "target"

    def grown() -> None:
        arguments = [str(source), str(target), "--operator", "depth.stack", "--factor", str(factor)]
        with redirect_stdout(io.StringIO()):
            assert grow([*arguments, "--moments", "keep", "--verify", "none"]) == 0

    # Always in this order: a disk writes faster where the same has just been written and removed.
    contenders = {"growth": grown, "copy": lambda: copy(source, target)}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            taken = seconds(contender)
            if turn:
                rates[name].append((size(source) + size(target)) / taken)
            shutil.rmtree(target)
            os.sync()
    return rates


def copy(source: Path, target: Path) -> None:
    """Read every file and write it anew, durable at the end."""
    target.mkdir()
    buffer = memoryview(bytearray(BLOCK))
    for file in source.iterdir():
        with open(file, "rb") as reading, open(target / file.name, "wb") as writing:
            while count := reading.readinto(buffer):
                writing.write(buffer[:count])
            writing.flush()
            os.fsync(writing.fileno())


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default that of temporary files")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        config = configuration(options, folder)
        with process_group(600):
            times = live(config, options.rounds)
        source, *others = sorted(folder.glob("small/checkpoints/tokens-*"))
        for each in others:
            shutil.rmtree(each)
        read = size(source)
        rates = offline(source, options.factor, options.rounds, folder)
    hardware = machine(this_device())
    print(", ".join(f"{key} {value}" for key, value in hardware.items()))
    print(f"checkpoint of {read / 2**20:,.0f} MiB, blocks stacked {options.factor} times")
    found = {}
    for name, (above, below) in {
        "between runs: bytes per second, growth / copy": (rates["growth"], rates["copy"]),
        "in a run: seconds, growth / (save and load)": (times["growth"], times["save and load"]),
    }.items():
        found[name] = ratio(below, above)
        print(f"{name}: {found[name][0]:.3f}  [{found[name][1]:.3f}, {found[name][2]:.3f}]")
    if options.json:
        measured = {"machine": hardware, "rates": rates, "seconds": times, "ratios": found}
        options.json.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
