"""What attention in tiles costs on a CPU, against the kernel of torch.

    python benchmarks/tiled_attention.py --rounds 15 --threads 1

Both run in float32 on the same tensors, taking turns, causal and with documents of an eighth of the sequence. A ratio
above 1 says how many times as fast the tiles are: the median over rounds of the kernel's processor time over theirs,
with a bootstrap interval. "taken": whether the decoder takes the tiles for this shape.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

if not __package__:  # beside this file, which has a package's name, that package would not be found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bench import machine, ratio
from runtime.host_memory import keep_freed_memory
from runtime.model.prefix_attention import attend
from runtime.model.tiled_attention import suits_tiles, tiled_attention


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int


SHAPES = [
    Shape(16, 4, 4, 128, 64),
    Shape(8, 4, 4, 256, 16),
    Shape(8, 4, 4, 256, 32),
    Shape(8, 4, 4, 256, 64),
    Shape(8, 8, 2, 256, 64),
    Shape(2, 8, 8, 512, 64),
    Shape(4, 4, 4, 1024, 64),
]


class Times(NamedTuple):
    """Seconds of each round, forward and backward."""

    kernel: list[float]
    tiles: list[float]


def documents(shape: Shape) -> Tensor:
    """[1, 1, s, s]: eight documents."""
    ids = torch.arange(shape.length) // (shape.length // 8)
    return (ids[:, None] == ids).tril()[None, None]


def compare(shape: Shape, mask: Tensor | None, rounds: int) -> Times:
    """The kernel and the tiles in turn; the first round does not count."""
    torch.manual_seed(0)

    def drawn(heads: int) -> Tensor:
        return torch.randn(shape.batch, shape.length, heads, shape.head_dim).transpose(1, 2).requires_grad_()

    inputs = drawn(shape.heads), drawn(shape.kv_heads), drawn(shape.kv_heads)
    grad, scale = torch.randn_like(inputs[0]), shape.head_dim**-0.5

    def seconds(tiled: bool) -> float:
        start = time.process_time()
        y = tiled_attention(*inputs, mask, scale) if tiled else attend(*inputs, mask, None, None, scale, tiled=False)
        torch.autograd.grad(y, inputs, grad)
        return time.process_time() - start

    found = [(seconds(False), seconds(True)) for _ in range(rounds + 1)][1:]
    return Times(*map(list, zip(*found, strict=True)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print(", ".join(f"{key} {value}" for key, value in machine(torch.device("cpu")).items()))
    print("batch heads kv_heads length dims  mask       kernel    tiles   ratio (95 %)          taken")
    for shape in SHAPES:
        for mask in (None, documents(shape)):
            times = compare(shape, mask, options.rounds)
            kernel, tiles = (1e3 * sorted(each)[len(each) // 2] for each in times)
            found, low, high = ratio(times.tiles, times.kernel)
            query = torch.empty(()).expand(shape.batch, shape.heads, shape.length, shape.head_dim)
            taken = "yes" if suits_tiles(query, query, mask) else "no"
            sizes = f"{shape.batch:5} {shape.heads:5} {shape.kv_heads:8} {shape.length:6} {shape.head_dim:4}"
            print(
                f"{sizes}  {'causal' if mask is None else 'documents':9} {kernel:5.1f} ms {tiles:5.1f} ms   "
                f"{found:.2f} ({low:.2f} to {high:.2f})   {taken}"
            )


if __name__ == "__main__":
    main()
