"""The cells of the ladder: sizes x tokens, each swept over learning rate and batch, and a larger one held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from experiments.arms import Arm, Raw, Results
from experiments.contest import SEEDS, presets
from experiments.ladder.grid import Point, Search, search
from launch.planning import short, whole_steps

SIZES = presets(Path(__file__).parent, cpu=8e-3, gpu=2e-3, smoke={"schedule": {"horizon": 32_768}})
WIDTHS = (1.0, 1.5, 2.0)
"""Of the preset's hidden size; layers, heads and the intermediate size grow with it, parameters by the cube."""
LENGTHS = (0.25, 0.5, 1.0)
"""Of the preset's tokens."""
HELD_OUT = 2.5, 2.0
"""Width and length of the held-out cell: beyond all rungs in both, and 3.6 times the compute of the largest (cpu)."""
LEAST_STEPS = 8
"""That a batch of a sweep leaves a run."""
GROWING = ("num_layers", "hidden_size", "intermediate_size", "num_heads")


@dataclass(frozen=True)
class Cell:
    """Runs of one preset that differ in learning rate, batch and seed alone."""

    size: str
    width: float
    length: float
    kind: str = "rung"

    @property
    def model(self) -> Raw:
        base = SIZES[self.size].config["model"]
        return {key: round(base[key] * self.width) for key in GROWING}

    @property
    def tokens(self) -> int:
        return round(SIZES[self.size].tokens * self.length)

    @property
    def label(self) -> str:
        return f"{self.kind}-h{self.model['hidden_size']}-{short(self.tokens)}"

    def arm(self, point: Point, seed: int = SEEDS[0]) -> Arm:
        """The run at a rate and batch, over about the cell's tokens in whole batches."""
        lr, batch = point
        size = SIZES[self.size]
        horizon = whole_steps(self.tokens, batch * size.config["data"]["seq_len"])
        changes = {"model": self.model, "batch": {"sequences": batch}, "schedule": {"horizon": horizon}}
        return size.arm(f"{self.label}-b{batch}", lr, seed, changes)

    def loss(self, results: Results, point: Point) -> float | None:
        """Of the first seed, None while it has not run."""
        arm = self.arm(point)
        return results[arm.name].loss if arm.name in results else None

    def sweep(self, results: Results, start: Sequence[Point]) -> Search:
        step = SIZES[self.size].config["data"]["seq_len"] * LEAST_STEPS
        return search(start, self.tokens // step, partial(self.loss, results))


def rungs(size: str) -> list[Cell]:
    """The cheapest first."""
    return [Cell(size, width, length) for width, length in product(WIDTHS, LENGTHS)]


def held_out(size: str) -> Cell:
    return Cell(size, *HELD_OUT, "held")
