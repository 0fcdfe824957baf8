"""The arms: constant small and large batches at their own rates, and batches between them at the small one's rate."""

from functools import partial
from pathlib import Path

from experiments.arms import Arm, Raw, Results
from experiments.contest import Contender, presets, wanted

SIZES = presets(Path(__file__).parent, cpu=4e-3, gpu=1e-3, smoke={"schedule": {"horizon": 40_960, "warmup": 5_120}})
GROWTH = 8
"""The large batch as a multiple of the small one."""
RAMP = "50%"
CONTROL: Raw = {"every": "2%", "most": 2}
NOISE_MULTIPLE = 1.0
ETA = 0.5
"""Of the norm test: it comes to rest at three times the noise scale."""
COUPLINGS: dict[str, Raw] = {
    "none": {"lr": "none"},
    "sqrt": {"lr": "sqrt"},
    "linear": {"lr": "linear"},
    "sqrt+beta2": {"lr": "sqrt", "beta2": "half_life"},
}


def batches(name: str) -> dict[str, Raw]:
    """The batch section of every side, and what else of its configuration is its own."""
    small = SIZES[name].config["batch"]["sequences"]
    large = GROWTH * small
    control = {"control": CONTROL | {"largest": large}}
    grown: dict[str, Raw] = {}
    for coupling, section in COUPLINGS.items():
        ramp = {"kind": "ramp", "ramp": {"to": large, "increment": small, "tokens": RAMP}, "coupling": section}
        noise = {"kind": "noise_scale", "noise_scale": {"multiple": NOISE_MULTIPLE}, "coupling": section, **control}
        grown |= {f"ramp, {coupling}": {"batch": ramp}, f"noise scale, {coupling}": {"batch": noise}}
    norm = {"kind": "norm_test", "norm_test": {"eta": ETA}, "coupling": COUPLINGS["sqrt"], **control}
    cosine = {"kind": "cosine"}
    return {
        "small": {},
        "large": {"batch": {"sequences": large}},
        **grown,
        "norm test, sqrt": {"batch": norm},
        "small, cosine": {"schedule": cosine},
        "seesaw of the cosine": {"schedule": cosine, "batch": {"kind": "seesaw", "seesaw": {"largest": large}}},
    }


def arm(name: str, label: str, lr: float, seed: int) -> Arm:
    return SIZES[name].arm(slug(label), lr, seed, batches(name)[label])


def slug(label: str) -> str:
    """A label as a part of a file's name."""
    return label.replace(", ", "-").replace(" ", "-").replace("+", "-")


def contenders(name: str) -> dict[str, Contender]:
    """By label; the constant batches have rates of their own, and what grows from a small one has that one's."""
    lr = SIZES[name].lr
    made = {label: partial(arm, name, label) for label in batches(name)}
    leaders = {label: Contender(slug(label), made[label], lr) for label in ("small", "large", "small, cosine")}
    following = {"seesaw of the cosine": "small, cosine"}
    return {
        label: leaders.get(label) or Contender(slug(label), make, lr, leaders[following.get(label, "small")])
        for label, make in made.items()
    }


def arms(name: str, results: Results) -> list[Arm]:
    return wanted(contenders(name).values(), results)
