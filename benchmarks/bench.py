"""What the benchmarks share: shapes, the options of a command, batches, times, ratios, and a machine's description."""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.host_memory import keep_freed_memory
from runtime.model.config import ModelConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of one batch. `recompute` keeps only each block's input."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    seq_len: int
    batch: int
    recompute: bool = False

    def config(self) -> ModelConfig:
        return ModelConfig(**{key: value for key, value in asdict(self).items() if key in ModelConfig.model_fields})


SHAPES = {
    "tiny": Shape(4, 64, 176, 2, 2, 256, 64, 2),
    "small": Shape(8, 256, 688, 4, 4, 4096, 256, 8),
    "larger": Shape(8, 512, 1376, 8, 8, 8192, 512, 2),
    "0.3B": Shape(24, 1024, 2816, 16, 16, 32000, 2048, 16),
    "1B": Shape(16, 2048, 8192, 32, 8, 128256, 4096, 4),
    "8B": Shape(32, 4096, 14336, 32, 8, 128256, 4096, 4, recompute=True),
}
"""The first three for a CPU in float32, one of them to try a command; the others for a GPU in bf16 (1B and 8B are
Llama 3's)."""


def write_tokens(prefix: Path, vocab_size: int, number: int) -> None:
    """A token file, PREFIX.bin and .idx, of one document of random tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # seconds, and warnings

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_item(torch.from_numpy(np.random.default_rng(0).integers(vocab_size, size=number)))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")


def arguments(document: str, pairs: int, counted: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have; `counted`: what there are `pairs` of by default."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, help="sequences of a step, instead of the shape's")
    parser.add_argument("--pairs", type=int, default=pairs, help=f"{counted} (default: {pairs})")
    parser.add_argument("--threads", type=int, help="CPU threads of one process; torch's choice by default")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Shape]:
    """The options, and the shape with its batch; sets the threads, and keeps freed memory as the trainer does."""
    options = parser.parse_args(argv)
    for name in ("pairs", "batch", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: accepted are whole numbers from 1 on")
    if options.threads:
        torch.set_num_threads(options.threads)
    if not torch.cuda.is_available():
        keep_freed_memory()
    shape = SHAPES[options.shape]
    return options, replace(shape, batch=options.batch) if options.batch else shape


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def headline(name: str, shape: Shape) -> str:
    """Two lines: the machine, and the shape of this name."""
    return ", ".join(f"{key} {value}" for key, value in machine(this_device()).items()) + f"\n{name}: {shape}"


def write(path: Path | None, shape: Shape, content: Mapping[str, Any]) -> None:
    """What was measured, with the machine and the shape, if there is a path for it."""
    if path is not None:
        written = {"machine": machine(this_device()), "shape": asdict(shape), **content}
        path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def batches(shape: Shape, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """A few batches in turn, the same for all contenders."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(shape.vocab_size, (4, shape.batch, shape.seq_len + 1), generator=generator).to(device)
    return cycle([(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in rows])


def timed(action: Callable[..., Any], batch: tuple[Tensor, ...] = ()) -> float:
    """Seconds of one call, by the wall's clock."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    action(*batch)
    synchronize()
    return time.perf_counter() - start


def ratio(ours: list[float], theirs: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Median over rounds of theirs / ours, and its 95 % percentile-bootstrap interval over rounds."""
    pairs = [b / a for a, b in zip(ours, theirs, strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(pairs, k=len(pairs))) for _ in range(draws))
    return statistics.median(pairs), medians[round(0.025 * draws)], medians[round(0.975 * draws) - 1]


def undisturbed(ours: Sequence[float], theirs: Sequence[float], draws: int = 2_000) -> tuple[float, float, float]:
    """Theirs / ours of the mean of each one's fastest quarter, and its 95 % percentile-bootstrap interval over rounds.

    What else a machine does adds to a time and never takes from it, so that this tells differences of a per cent, which
    a median over noisy rounds does not. It says nothing of rare costs, such as a step that is slow now and then.
    """
    pairs, generator = np.array([ours, theirs]), np.random.default_rng(0)
    least = max(pairs.shape[1] // 4, 1)

    def quotient(rounds: np.ndarray) -> float:
        below, above = np.sort(pairs[:, rounds], axis=1)[:, :least].mean(1)
        return float(above / below)

    every = np.arange(pairs.shape[1])
    found = [quotient(generator.choice(every, len(every))) for _ in range(draws)]
    return quotient(every), *(float(each) for each in np.quantile(found, [0.025, 0.975]))


def told(found: Mapping[str, Any]) -> str:
    """Both ratios of a comparison, each with its interval."""
    (middle, low, high), (fastest, least, most) = found["ratio"], found["undisturbed"]
    return f"{middle:.4f}  [{low:.4f}, {high:.4f}]  fastest quarter: {fastest:.4f}  [{least:.4f}, {most:.4f}]"


def machine(device: torch.device) -> dict[str, str | int]:
    """What the numbers were taken on, and the versions of the packages that were used."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    found = {
        "processor": processor,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "driver": driver()}
    versions = {name: sys.modules[name].__version__ for name in ("transformers", "torchao") if name in sys.modules}
    return found | versions


def driver() -> str:
    """Version of the GPU's driver."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.stdout.split("\n")[0].strip() or "unknown"
