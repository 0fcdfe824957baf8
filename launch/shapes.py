"""The shapes of a preset's family: what stays equal from small models to large ones, and the nearest to a size."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from runtime.model.config import ModelConfig
from runtime.model.counts import count, flops_per_token

SHALLOWEST, DEEPEST = 3 / 4, 4 / 3
"""Depth over that of the preset's own proportions."""
LENGTHENING = 0.1
"""What an e-fold of depth beyond the preset's proportions counts, beside an e-fold of size beyond the one asked for."""
LARGEST = 2**20
"""Width up to which shapes are tried."""


class Family:
    """Models with a preset's head_dim, heads for each key-value head, intermediate over hidden size, width over depth,
    vocabulary and options; `tensor` is the degree that is to split them. ValueError for a preset that tells no such
    proportions."""

    def __init__(self, preset: ModelConfig, tensor: int = 1):
        self._preset, self._tensor = preset, tensor
        self._unit = math.lcm(preset.num_heads // preset.num_kv_heads * tensor, tensor)
        common = preset.intermediate_size & -preset.intermediate_size
        self._multiple = math.lcm(min(common, 256), tensor)

    def shape(self, heads: int, layers: int) -> ModelConfig | None:
        """The model of so many heads and layers; None where the preset's options do not allow it."""
        preset = self._preset
        hidden, rest = divmod(preset.hidden_size * heads, preset.num_heads)
        if rest:
            return None
        inner = hidden * preset.intermediate_size / preset.hidden_size
        changes = {
            "num_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": max(1, round(inner / self._multiple)) * self._multiple,
            "num_heads": heads,
            "num_kv_heads": heads * preset.num_kv_heads // preset.num_heads,
        }
        try:
            return ModelConfig.model_validate(preset.model_dump() | changes)
        except ValueError:  # a plan of tied depths fits some depths alone
            return None

    def nearest(self, size: str, target: float) -> ModelConfig:
        """The shape whose count `size` (total, non_embedding or active) is nearest to the target in logarithms, near
        the preset's proportions. ValueError where none is within a factor of 2."""
        best, worth = None, math.log(2)
        for heads, layers in self._rungs():
            middle = self._count(heads, layers, size)
            if middle is None or not 1 / 4 < middle / target < 4:
                if middle is not None and middle > 4 * target:
                    break
                continue
            for depth in range(max(1, math.ceil(layers * SHALLOWEST)), max(1, math.floor(layers * DEEPEST)) + 1):
                found = self._count(heads, depth, size)
                if found is None:
                    continue
                off = abs(math.log(found / target)) + LENGTHENING * abs(math.log(depth / layers))
                if off < worth:
                    best, worth = (heads, depth), off
        if best is None:
            smallest = next(filter(None, (self._count(*rung, size) for rung in self._rungs())), None)
            least = f"; its smallest is {smallest:,}" if smallest else ""
            raise ValueError(f"no shape of the preset's family has about {target:,.0f} {size} parameters{least}")
        return self.shape(*best)

    def flops_per_token(self, size: str, seq_len: int) -> Callable[[np.ndarray], np.ndarray]:
        """FLOPs of a token as a function of size, (n,) of (n,): between shapes a power, beyond them in proportion."""
        found = []
        for heads, layers in self._rungs(doubling=True):
            model = self.shape(heads, layers)
            if model is not None:
                found.append((getattr(count(model), size), flops_per_token(model, seq_len)))
        if not found:
            raise ValueError("the preset's family has no shape of its proportions")
        sizes, flops = np.log(np.array(found, dtype=float)).T

        def interpolated(wanted: np.ndarray) -> np.ndarray:
            log = np.log(wanted)
            beyond = np.minimum(log - sizes[0], 0) + np.maximum(log - sizes[-1], 0)
            return np.exp(np.interp(log, sizes, flops) + beyond)

        return interpolated

    def _rungs(self, doubling: bool = False) -> Iterator[tuple[int, int]]:
        """Heads, and the depth of the preset's proportions, from the narrowest on."""
        heads, preset = self._unit, self._preset
        while heads * preset.head_dim <= LARGEST:
            yield heads, max(1, round(preset.num_layers * heads / preset.num_heads))
            heads += heads if doubling else self._unit

    def _count(self, heads: int, layers: int, size: str) -> int | None:
        model = self.shape(heads, layers)
        return None if model is None else getattr(count(model), size)
