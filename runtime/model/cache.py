"""Keys and values of past positions, for generation."""

import torch
from torch import Tensor


class KeyValueCache:
    """One growing buffer of keys and one of values for each unrolled depth: a tied block has one for each of its uses.

    num_layers: unrolled depths, `len(decoder.depth_plan)`. Buffers double when full.
    """

    def __init__(self, num_layers: int):
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._lengths = [0] * num_layers

    @property
    def length(self) -> int:
        """Positions held; inside a forward, those of before it until the last depth has run."""
        return self._lengths[-1]

    def extend(self, depth: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [b, kv_heads, s, head_dim] at a depth; all that it now holds."""
        start = self._lengths[depth]
        end = self._lengths[depth] = start + keys.shape[2]
        self._keys[depth] = _fitted(self._keys[depth], keys, start, end)
        self._values[depth] = _fitted(self._values[depth], values, start, end)
        return self._keys[depth][:, :, :end], self._values[depth][:, :, :end]


def _fitted(buffer: Tensor | None, new: Tensor, start: int, end: int) -> Tensor:
    if buffer is None or buffer.shape[2] < end:
        grown = new.new_empty(*new.shape[:2], max(end, 2 * start), new.shape[3])
        if buffer is not None:
            grown[:, :, :start] = buffer[:, :, :start]
        buffer = grown
    buffer[:, :, start:end] = new
    return buffer


def lower_right_mask(length: int, past: int, device: torch.device) -> Tensor:
    """Boolean [length, past + length]: query i sees the past and the new positions up to its own."""
    return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
