"""What attention over a prefix costs, against padding the queries as the released code of ParScale does.

    python benchmarks/prefix_attention.py --rounds 15 --threads 1

Both are run forward and backward on the same tensors in float32, taking turns; the released way puts rows of zeros
before the queries, calls causal attention on the square and drops these rows. A ratio above 1 says how many times as
fast ours is: the median over rounds of padded over ours, in processor time, with a bootstrap interval.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if not __package__:  # beside this file, which has a package's name, that package would not be found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bench import machine, ratio
from runtime.model.prefix_attention import attend
from runtime.model.streams import Prefix

Attention = Callable[..., Tensor]


class Shape(NamedTuple):
    batch: int
    """Sequences of all streams."""
    streams: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int = 64
    tokens: int = 48


SHAPES = [
    Shape(16, 2, 8, 8, 256),
    Shape(16, 2, 8, 2, 256),
    Shape(32, 4, 4, 4, 128),
    Shape(4, 2, 8, 8, 512),
    Shape(2, 2, 8, 8, 1024),
    Shape(2, 2, 4, 4, 2048),
]


def padded(
    query: Tensor, key: Tensor, value: Tensor, _: None, prefix: tuple[Tensor, Tensor], __: None, scale: float
) -> Tensor:
    """`attend` the released way."""
    key, value = (torch.cat(pair, 2) for pair in zip(prefix, (key, value), strict=True))
    tokens, grouped = prefix[0].shape[2], query.shape[1] != key.shape[1]
    query = F.pad(query, (0, 0, tokens, 0))
    y = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return y[:, :, tokens:]


def compare(shape: Shape, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each round, padded and ours."""
    torch.manual_seed(0)

    def drawn(heads: int) -> Tensor:
        return torch.randn(shape.batch, shape.length, heads, shape.head_dim).transpose(1, 2).requires_grad_()

    query, key, value = drawn(shape.heads), drawn(shape.kv_heads), drawn(shape.kv_heads)
    sizes = shape.streams * shape.tokens, shape.kv_heads * shape.head_dim
    prefix = Prefix(torch.randn(sizes, requires_grad=True), torch.randn(sizes, requires_grad=True), None)
    grad = torch.randn(shape.batch, shape.length, shape.heads, shape.head_dim).transpose(1, 2)

    def seconds(attention: Attention) -> float:
        start = time.process_time()
        before = prefix.of_batch(shape.batch, shape.streams, shape.head_dim)
        y = attention(query, key, value, None, before, None, shape.head_dim**-0.5)
        torch.autograd.grad(y, (query, key, value, prefix.keys, prefix.values), grad)
        return time.process_time() - start

    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for attention, found in zip((padded, attend), times, strict=True):
            took = seconds(attention)
            if number:
                found.append(took)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = machine(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    print("batch streams heads kv_heads length   padded    ours   ratio (95 %)")
    for shape in SHAPES:
        before, ours = compare(shape, options.rounds)
        milliseconds = [1e3 * sorted(each)[len(each) // 2] for each in (before, ours)]
        sizes = f"{shape.batch:5} {shape.streams:7} {shape.heads:5} {shape.kv_heads:8} {shape.length:6}"
        found, low, high = ratio(ours, before)
        print(f"{sizes} {milliseconds[0]:5.0f} ms {milliseconds[1]:4.0f} ms   {found:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
