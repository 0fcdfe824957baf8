"""What each extra of the trainer costs: steps with it and without, in turn, beside the least that it could cost.

    python benchmarks/extras.py --shape small --pairs 12 --threads 1
    python benchmarks/extras.py --parts ema streams --shape 0.3B

Each part opens two trainers that differ in one setting, and the ratio is the median over rounds of the times of a few
steps of each, with a bootstrap interval. The floor of what only moves memory (averages, norms of pieces, growth) is its
bytes over the bandwidth of a copy of the parameters; that of what a checkpoint is written from, of a copy to the host's
memory; that of what changes the model is the ratio of FLOPs. `checkpoint` is what training waits for at an asynchronous
save, in steps, and how much slower it is while one is written; `growth` what it waits for while a model in memory is
made twice as deep, in steps of that.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bench import Shape, arguments, headline, parse, ratio, this_device, write, write_tokens
from benchmarks.floor import bandwidth, bandwidth_to_host
from launch.chain import growing
from launch.config import dump
from launch.growth_config import RunConfiguration, segments
from runtime.assembly import from_origin, open_segment, open_trainer
from runtime.config import Config
from runtime.model.config import ModelConfig
from runtime.model.counts import count, flops_per_token
from runtime.session import open_session
from runtime.startup import process_group
from runtime.trainer import Trainer

STEPS = 4
"""Of one measurement."""
MICRO_BATCHES = 2
Changes = dict[str, dict[str, Any]]
"""Settings by section."""
PARTS: dict[str, Changes] = {
    "noise scale": {"noise_scale": {"enabled": True}},
    "guard": {"guard": {"sigma": 6.0}},
    "logging": {"observe": {"log_every": 1, "tensorboard": True}},
    "ema": {"optim": {"ema_half_life": 1_000_000}},
    "tied": {"model": {"tying": {"plan": "cycle", "loops": 2}}},
    "streams": {"model": {"streams": {"count": 2}}},
    "experts": {"model": {"experts": {"count": 4, "top_k": 2}}},
}
"""What each part's second trainer has; `checkpoint` and `growth` are parts of their own."""
CHECKPOINT, GROWTH = "checkpoint", "growth"
ALL = (*PARTS, CHECKPOINT, GROWTH)


def configuration(shape: Shape, folder: Path, name: str, changes: Changes) -> Config:
    """A run without an end in sight, with none of the extras but `changes`."""
    return Config.model_validate(sections(shape, folder, name, changes))


def sections(shape: Shape, folder: Path, name: str, changes: Changes) -> dict[str, dict[str, Any]]:
    plain: dict[str, dict[str, Any]] = {
        "run": {"name": name.replace(" ", "-"), "dir": str(folder)},
        "model": shape.config().model_dump(),
        "data": {"seq_len": shape.seq_len, "sources": [{"path": str(folder / "train")}]},
        "batch": {"sequences": shape.batch, "micro_sequences": max(shape.batch // MICRO_BATCHES, 1)},
        "parallel": {"recompute": "full" if shape.recompute else "none"},
        "optim": {"lr": 1e-3},
        "schedule": {"horizon": 10**12, "kind": "constant"},
        "checkpoint": {"every": "100%"},
        "evaluation": {"every": "100%"},
        "noise_scale": {"enabled": False},
        "observe": {"log_every": 10**6, "tensorboard": False},
        "guard": {},
    }
    return {key: each | changes.get(key, {}) for key, each in plain.items()}


def steps(trainer: Trainer) -> float:
    """Seconds of a few steps of the loop: on one CPU thread the processor's, which other work hardly lengthens."""
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu or torch.get_num_threads() > 1 else time.process_time
    start = clock()
    for _ in range(STEPS):
        trainer.step()
        if trainer.report_if_due() is not None or trainer.halted() is not None:
            raise SystemExit("interrupted")
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def wall() -> float:
    """Seconds of the wall's clock, when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def opened(*configs: Config) -> Iterator[list[Trainer]]:
    """The trainers of these runs, warm; what they say goes to stderr."""
    with redirect_stdout(sys.stderr), ExitStack() as stack:
        trainers = [stack.enter_context(open_trainer(each, "")) for each in configs]
        for trainer in trainers:
            steps(trainer)
        yield trainers


def part(name: str, shape: Shape, folder: Path, pairs: int) -> dict[str, Any]:
    """Time with an extra over time without, and its floor."""
    within, without = (configuration(shape, folder, *each) for each in ((name, PARTS[name]), ("without", {})))
    times: dict[str, list[float]] = {"with": [], "without": []}
    with opened(within, without) as trainers:
        contenders = dict(zip(times, trainers, strict=True))
        for turn in range(pairs):
            for each in sorted(contenders, reverse=bool(turn % 2)):
                times[each].append(steps(contenders[each]))
    step = statistics.median(times["without"]) / STEPS
    return {
        "ratio": ratio(times["without"], times["with"]),
        "floor": floor(name, within.model, without.model, shape, step),
        "seconds": times,
    }


def floor(name: str, within: ModelConfig, without: ModelConfig, shape: Shape, step: float) -> float:
    """The least that the ratio of a part could be, where a step without it takes so many seconds."""
    if within != without:
        return flops_per_token(within, shape.seq_len) / flops_per_token(without, shape.seq_len)
    parameters = 4 * count(without).total
    passes = {"ema": 3, "noise scale": MICRO_BATCHES}.get(name, 0)  # read, read and write; each piece read once
    return 1 + passes * parameters / bandwidth(this_device(), parameters) / step


def part_checkpoint(shape: Shape, folder: Path, pairs: int) -> dict[str, Any]:
    """Steps that a save holds training up for, and the time of the next few over that of as many without a save. By
    the wall's clock, as a disk is waited for."""
    stalls, slowed = [], []
    with opened(configuration(shape, folder, CHECKPOINT, {})) as (trainer,):
        for _ in range(pairs):
            start = wall()
            steps(trainer)
            plain = wall() - start
            trainer.save()
            stalled = wall() - start - plain
            steps(trainer)
            slowed.append((wall() - start - plain - stalled, plain))
            trainer.persistence.store.wait()
            stalls.append(stalled * STEPS / plain)
        size = sum(each.nbytes for each in trainer.persistence.tensors().values())
    step = statistics.median(plain for _, plain in slowed) / STEPS
    found = {f"{CHECKPOINT}: stall, steps": {
        "ratio": ratio([1.0] * pairs, stalls),
        "floor": size / bandwidth_to_host(this_device(), size) / step, "seconds": stalls,
    }}  # fmt: skip
    during, plain = (list(each) for each in zip(*slowed, strict=True))
    found[f"{CHECKPOINT}: steps while it is written"] = {
        "ratio": ratio(plain, during), "floor": 1.0, "seconds": {"with": during, "without": plain},
    }  # fmt: skip
    return found


def part_growth(shape: Shape, folder: Path, pairs: int) -> dict[str, Any]:
    """Steps of the grown model that a growth to twice the depth holds training up for, moments and all; no less than
    reading the small one's tensors and writing the large one's."""
    stack = {"at": 0, "operator": "depth.stack", "options": {"factor": 2}, "moments": "keep", "verify": "none"}
    config = RunConfiguration.model_validate({**sections(shape, folder, GROWTH, {}), "growth": [stack]})
    stalls: list[float] = []
    with (
        redirect_stdout(sys.stderr),
        open_session(segments(config), dump(config)) as session,
        open_segment(session, from_origin(session)) as small,
    ):
        small.parts.persistence.save(small.state, elapsed=0.0, wait=True, retain=False)
        for turn in range(pairs + 1):
            start = wall()
            with open_segment(session, growing(session, small, config.growth[0])) as grown:
                stalls.append(wall() - start)
                if turn == pairs:
                    steps(grown)
                    start = wall()
                    steps(grown)
                    step = (wall() - start) / STEPS
                    moved = sum(each.nbytes for each in grown.persistence.tensors().values()) * 3 // 2
    return {f"{GROWTH}: stall, steps": {
        "ratio": ratio([1.0] * pairs, [stall / step for stall in stalls[1:]]),
        "floor": moved / bandwidth(this_device(), moved // 2) / step, "seconds": stalls[1:],
    }}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, 12, f"measurements of {STEPS} steps of each, two at least")
    parser.add_argument("--parts", nargs="+", choices=ALL, default=ALL)
    options, shape = parse(parser, argv)
    if options.pairs < 2:
        parser.error(f"--pairs {options.pairs}: at least two are needed for an interval")
    measures: dict[str, Callable[[Path], dict[str, Any]]] = {
        name: lambda folder, name=name: {name: part(name, shape, folder, options.pairs)} for name in PARTS
    }
    measures[CHECKPOINT] = lambda folder: part_checkpoint(shape, folder, options.pairs)
    measures[GROWTH] = lambda folder: part_growth(shape, folder, options.pairs)
    print(headline(options.shape, shape))
    print(f"{'extra':34}{'with / without':>16}{'95 % interval':>18}{'floor':>8}", flush=True)
    found = {}
    with process_group(600):
        for name in options.parts:
            with tempfile.TemporaryDirectory() as folder:
                write_tokens(Path(folder) / "train", shape.vocab_size, 2_000_000)
                for label, each in measures[name](Path(folder)).items():
                    found[label] = each
                    middle, low, high = each["ratio"]
                    print(f"{label:34}{middle:16.3f}{f'{low:.3f} to {high:.3f}':>18}{each['floor']:8.3f}", flush=True)
    write(options.json, shape, {"parts": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
