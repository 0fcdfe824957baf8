"""The shapes of a preset's family: what stays equal from small models to large ones, and the nearest to a size."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from runtime.model.config import ModelConfig
from runtime.model.counts import count, flops_per_token

SHALLOWEST, DEEPEST = 3 / 4, 4 / 3
"""Depth over that of the preset's own proportions, if that is more than a layer."""
LENGTHENING = 0.1
"""What an e-fold of depth beyond the preset's proportions counts, beside an e-fold of size beyond the one asked for."""
STEPS = 16
"""Widths that are tried between one and its double, where heads divide it so finely."""
LARGEST = 2**20
"""Width up to which shapes are tried."""
MOST_SHARED = 2.0
"""Times the preset's heads for each key-value head: a prime number of heads has one of these, or as many."""
NEAR = (0, 1, -1, 2, -2, 3, -3)
"""Around a depth: a plan of tied depths fits some of them alone."""


class Family:
    """Models with a preset's head_dim, intermediate over hidden size, width over depth, vocabulary and options, and
    about its heads for each key-value head; `tensor` is the degree that is to split them."""

    def __init__(self, preset: ModelConfig, tensor: int = 1):
        self._preset, self._tensor = preset, tensor
        common = preset.intermediate_size & -preset.intermediate_size
        self._multiple = math.lcm(min(common, 256), tensor)

    def shape(self, heads: int, layers: int) -> ModelConfig | None:
        """The model of so many heads and layers; None where the preset's options do not allow it."""
        preset = self._preset
        hidden, rest = divmod(preset.hidden_size * heads, preset.num_heads)
        if rest or layers < 1:
            return None
        shared = self._key_value_heads(heads)
        if heads / shared > MOST_SHARED * preset.num_heads / preset.num_kv_heads:
            return None
        inner = hidden * preset.intermediate_size / preset.hidden_size
        changes = {
            "num_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": max(1, round(inner / self._multiple)) * self._multiple,
            "num_heads": heads,
            "num_kv_heads": shared,
        }
        try:
            return ModelConfig.model_validate(preset.model_dump() | changes)
        except ValueError:
            return None

    def nearest(self, size: str, target: float) -> ModelConfig:
        """The shape whose count `size` (total, non_embedding or active) is nearest to the target in logarithms, near
        the preset's proportions. ValueError where none is within a factor of 2."""
        best, worth = None, math.log(2)
        for heads, layers in self._rungs(STEPS):
            middle = self._around(heads, layers)
            if middle is None:
                continue
            here = getattr(count(middle), size)
            if here > 4 * target:
                break
            if here < target / 4:
                continue
            for model in self._depths(middle, layers, size, target):
                off = abs(math.log(getattr(count(model), size) / target))
                off += LENGTHENING * abs(math.log(model.num_layers / layers))
                if off < worth:
                    best, worth = model, off
        if best is None:
            smallest = next(filter(None, (self._around(*rung) for rung in self._rungs(1))), None)
            least = f"; its smallest has {getattr(count(smallest), size):,}" if smallest else ""
            raise ValueError(f"no shape of the preset's family has about {target:,.0f} {size} parameters{least}")
        return best

    def flops_per_token(self, size: str, seq_len: int) -> Callable[[np.ndarray], np.ndarray]:
        """FLOPs of a token as a function of size, (n,) of (n,): between shapes a power, beyond them in proportion."""
        models = [model for rung in self._rungs(2) if (model := self._around(*rung)) is not None]
        if not models:
            raise ValueError("the preset's family has no shape of its proportions")
        found = [(getattr(count(model), size), flops_per_token(model, seq_len)) for model in models]
        sizes, flops = np.log(np.array(sorted(found), dtype=float)).T

        def interpolated(wanted: np.ndarray) -> np.ndarray:
            log = np.log(wanted)
            beyond = np.minimum(log - sizes[0], 0) + np.maximum(log - sizes[-1], 0)
            return np.exp(np.interp(log, sizes, flops) + beyond)

        return interpolated

    def _key_value_heads(self, heads: int) -> int:
        """Of those that divide the heads and that the tensor-parallel degree divides, the nearest to the preset's
        share."""
        wanted = heads * self._preset.num_kv_heads / self._preset.num_heads
        fitting = [n for n in range(self._tensor, heads + 1, self._tensor) if heads % n == 0]
        return min(fitting, key=lambda each: abs(math.log(each / wanted)), default=heads)

    def _rungs(self, steps: int) -> Iterator[tuple[int, int]]:
        """Heads, and the depth of the preset's proportions, from the narrowest on, about `steps` to each doubling."""
        heads, preset = self._tensor, self._preset
        while heads * preset.head_dim <= LARGEST:
            yield heads, max(1, round(preset.num_layers * heads / preset.num_heads))
            grain = self._tensor
            while grain * 2 * steps <= heads:
                grain *= 2
            heads += grain

    def _around(self, heads: int, layers: int) -> ModelConfig | None:
        """A shape of about so many layers."""
        return next((model for shift in NEAR if (model := self.shape(heads, layers + shift)) is not None), None)

    def _depths(self, middle: ModelConfig, layers: int, size: str, target: float) -> Iterator[ModelConfig]:
        """Shapes of this width whose size is near the target: it grows evenly with depth."""
        deeper = self._around(middle.num_heads, 2 * middle.num_layers)
        if deeper is None:
            return
        here, there = (getattr(count(each), size) for each in (middle, deeper))
        each = (there - here) / (deeper.num_layers - middle.num_layers)
        low = max(1, min(math.ceil(layers * SHALLOWEST), layers - 1))
        high = max(math.floor(layers * DEEPEST), layers + 1)
        best = min(max(round(middle.num_layers + (target - here) / each), low), high)
        for depth in {best + shift for shift in NEAR}:
            if low <= depth <= high and (model := self.shape(middle.num_heads, depth)) is not None:
                yield model
