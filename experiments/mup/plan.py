"""The arms: five learning rates at three widths, standard and muP, and at three depths, standard and CompleteP."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.arms import Arm, Raw, Results
from experiments.contest import SEEDS, Preset, presets

SIZES = presets(Path(__file__).parent, cpu=4e-3, gpu=2e-3)
FACTORS = (1, 2, 4)
"""Of the base shape's width, or depth."""
RATES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Of the middle rate; the same at every shape."""


@dataclass(frozen=True)
class Axis:
    """One way to scale a model: which sizes grow, and the parametrisation that is to keep its best rate in place."""

    name: str
    kind: str
    grows: tuple[str, ...]

    def model(self, size: Preset, kind: str, factor: int) -> Raw:
        """A model `factor` times the base shape. At the base every parametrisation is the standard one to the bit, so
        that its arms are run once."""
        base = size.config["model"]
        larger: Raw = {key: base[key] * factor for key in self.grows}
        if kind != "standard" and factor > 1:
            keys = ["hidden_size", "intermediate_size", "num_heads", "head_dim"]
            keys += ["num_layers"] if kind == "completep" else []
            larger["parametrization"] = {"kind": kind, **{f"base_{key}": base[key] for key in keys}}
        return larger


AXES = (
    Axis("width", "mup", ("hidden_size", "intermediate_size", "num_heads")),
    Axis("depth", "completep", ("num_layers",)),
)


def arm(name: str, axis: Axis, kind: str, factor: int, rate: float, seed: int) -> Arm:
    size = SIZES[name]
    label = "base" if factor == 1 else f"{axis.name}{factor}-{kind}"
    return size.arm(label, size.lr * rate, seed, {"model": axis.model(size, kind, factor)})


def grid(name: str) -> Iterator[tuple[Axis, str, int, float, int, Arm]]:
    """Every point of both axes with its arm; seeds are the slowest to vary, so that one of each comes first."""
    for seed in SEEDS:
        for axis in AXES:
            for factor in FACTORS:
                for kind in ("standard", axis.kind):
                    for rate in RATES:
                        yield axis, kind, factor, rate, seed, arm(name, axis, kind, factor, rate, seed)


def arms(name: str, results: Results) -> list[Arm]:
    return list({arm.name: arm for *_, arm in grid(name)}.values())
