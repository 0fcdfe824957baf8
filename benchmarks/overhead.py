"""What the training loop costs beside its model: the trainer against a bare loop of the same decoder.

    python benchmarks/overhead.py --pairs 12 --threads 2

The trainer reads its batches from a token file, measures the gradient norm over the mesh, guards, clips, keeps the
clock, polls for signals, beats the watchdog, and writes metrics.jsonl and TensorBoard every tenth step; the bare loop
feeds the same decoder, of the same precision and recomputation, tokens from memory, with torch's own clipping and fused
AdamW. Both take ten steps at a time in turn, in one process; the ratio is the median over these pairs of (trainer /
bare), with a bootstrap interval.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bench import Shape, arguments, batches, headline, parse, ratio, timed, write, write_tokens
from runtime.assembly import open_trainer
from runtime.config import Config, ParallelConfig
from runtime.model.decoder import Decoder
from runtime.parallel.mesh import Mesh
from runtime.parallel.parallelize import materialize, parallelize
from runtime.startup import process_group
from runtime.trainer import Trainer

STEPS = 10
"""Steps of one measurement: a logging interval."""


def configuration(shape: Shape, folder: Path, steps: int) -> Config:
    """A run long enough, on random tokens, that does all a run does but evaluate and save."""
    write_tokens(folder / "train", shape.vocab_size, 2_000_000)
    return Config.model_validate(
        {
            "run": {"name": "overhead", "dir": str(folder)},
            "model": shape.config().model_dump(),
            "data": {"seq_len": shape.seq_len, "sources": [{"path": str(folder / "train")}]},
            "batch": {"sequences": shape.batch},
            "parallel": {"recompute": "full" if shape.recompute else "none"},
            "optim": {"lr": 1e-3},
            "schedule": {"horizon": shape.batch * shape.seq_len * steps, "kind": "constant"},
            "checkpoint": {"every": "100%"},
            "observe": {"log_every": STEPS},
        }
    )


def bare(shape: Shape, mesh: Mesh, parallel: ParallelConfig) -> Callable[[], None]:
    """Ten steps of the decoder alone, with the trainer's precision and recomputation."""
    with torch.device("meta"):
        decoder = Decoder(shape.config())
    materialize(parallelize(decoder, mesh, parallel), mesh.device, 0)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    source = batches(shape, mesh.device)

    def steps() -> None:
        for _ in range(STEPS):
            tokens, targets = next(source)
            (decoder(tokens, targets).cross_entropy / targets.numel()).backward()
            nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def looped(trainer: Trainer) -> Callable[[], None]:
    """Ten rounds of the trainer's loop."""

    def steps() -> None:
        for _ in range(STEPS):
            trainer.step()
            assert trainer.report_if_due() is None and trainer.halted() is None

    return steps


def main(argv: list[str] | None = None) -> int:
    options, shape = parse(arguments(__doc__, 12, f"measurements of {STEPS} steps of each"), argv)
    times: dict[str, list[float]] = {"trainer": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder, process_group(600):
        config = configuration(shape, Path(folder), STEPS * (options.pairs + 3))
        with open_trainer(config, "") as trainer:
            contenders = {"trainer": looped(trainer), "bare": bare(shape, trainer.mesh, config.parallel)}
            for turn in range(options.pairs + 1):
                for name in sorted(contenders, reverse=bool(turn % 2)):
                    seconds = timed(contenders[name])
                    if turn:
                        times[name].append(seconds)
    found = ratio(times["bare"], times["trainer"])
    print(headline(options.shape, shape))
    print(f"trainer / bare loop, time of {STEPS} steps: {found[0]:.4f}  [{found[1]:.4f}, {found[2]:.4f}]")
    write(options.json, shape, {"seconds": times, "ratio": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
