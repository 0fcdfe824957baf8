"""The arms: over a grid of budgets and batches, the best rate of each cell, and one setting carried to all cells."""

from functools import partial
from pathlib import Path

from experiments.arms import Arm, Results
from experiments.contest import Contender, presets, wanted

SIZES = presets(Path(__file__).parent, cpu=4e-3, gpu=1e-3, smoke={"schedule": {"horizon": 16_384, "warmup": 1_024}})
BUDGETS = (0.25, 0.5, 1.0)
"""Of the tokens of the size."""
BATCHES = (1, 4)
"""Of the batch of the size."""
CAP = 8
"""The cap of Power's rate as a multiple of the rate that sweeps start at: high, so that the power itself decides."""
EXPONENT = -0.51
Cell = tuple[float, int]
CALIBRATION: Cell = (BUDGETS[0], BATCHES[0])
"""The cheapest cell, where what is carried to all cells is chosen."""


def cells() -> list[Cell]:
    return [(budget, batch) for budget in BUDGETS for batch in BATCHES]


def label(kind: str, cell: Cell) -> str:
    budget, batch = cell
    return f"{kind}-t{budget:g}-b{batch}"


def arm(name: str, kind: str, cell: Cell, lr: float, seed: int) -> Arm:
    """A run of one cell. Of Power `lr` is the rate that it has at the calibration cell's last token and batch, from
    which its constant a follows: rate = sequences x a x tokens^b."""
    size, (budget, batch) = SIZES[name], cell
    tokens, sequences = round(budget * size.tokens), batch * size.config["batch"]["sequences"]
    changes = {"schedule": {"horizon": tokens, "kind": kind}, "batch": {"sequences": sequences}}
    made = size.arm(label(kind, cell), lr, seed, changes)
    if kind == "wsd":
        return made
    a = lr / (CALIBRATION[1] * size.config["batch"]["sequences"] * (CALIBRATION[0] * size.tokens) ** EXPONENT)
    made.config["schedule"]["power"] = {"a": a, "b": EXPONENT}
    made.config["optim"]["lr"] = CAP * size.lr
    return made


def contenders(name: str) -> dict[str, Contender]:
    """Of each cell: `wsd` at its own best rate; `wsd-carried` and `power` as they are best at the calibration cell."""

    def side(kind: str, cell: Cell, leader: Contender | None = None) -> Contender:
        make = partial(arm, name, kind.removesuffix("-carried"), cell)
        return Contender(label(kind, cell), make, SIZES[name].lr, leader)

    found = {label("wsd", cell): side("wsd", cell) for cell in cells()}
    power = side("power", CALIBRATION)
    leaders = {"wsd-carried": found[label("wsd", CALIBRATION)], "power": power}
    for kind, leader in leaders.items():
        found |= {label(kind, cell): side(kind, cell, leader) for cell in cells()}
    return found | {power.label: power}


def arms(name: str, results: Results) -> list[Arm]:
    return wanted(contenders(name).values(), results)
