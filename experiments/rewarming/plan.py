"""The arms: a finished run on one text for each seed, and a second stage on another, at several rates and mixtures."""

from functools import partial
from pathlib import Path

from experiments.arms import Arm, Raw, Results
from experiments.contest import SEEDS, Contender, presets, wanted
from experiments.rewarming.text import FOLDER
from experiments.store import Store

SIZES = presets(Path(__file__).parent, cpu=4e-3, gpu=1e-3, smoke={"schedule": {"horizon": 20_480, "warmup": 2_048}})
SECOND = {**FOLDER, "gpu": "data/second"}
STAGE = 0.5
"""Tokens of the second stage, as a share of the first's."""
FINAL = 0.1
"""Last rate of the first stage, as a share of its peak."""
PEAKS = {"no re-warming": None, "re-warmed to 0.5": 0.5, "re-warmed to 1": 1.0}
REPLAYS = (0.05, 0.25)
"""Shares of the first text in the second stage; the published ones for a weak and for a strong shift."""
SETS = ("heldout", "second")
"""The held-out texts, of the first stage, by which its rate is chosen, and of the second."""


def sources(name: str, replay: float) -> list[Raw]:
    first, second = SIZES[name].config["data"]["sources"][0]["path"], f"{SECOND[name]}/train"
    old = [{"path": first, "weight": replay}] if replay else []
    return [{"path": second, "weight": 1 - replay}, *old]


def first_stage(name: str, label: str, lr: float, seed: int) -> Arm:
    """A run on the first text that ends in a tail, or, for a `plateau`, at its peak."""
    decay: Raw = {"decay": 0, "final": 0.0} if label == "plateau" else {}
    return SIZES[name].arm(f"first-{label}", lr, seed, {"schedule": decay})


def second_stage(name: str, label: str, peak: float | None, replay: float, lr: float, seed: int) -> Arm:
    """The first stage, trained on with the second text: at its last rate, or re-warmed to a share of the peak."""
    size = SIZES[name]
    schedule, tokens = size.config["schedule"], round(STAGE * size.tokens)
    part = {"kind": "constant", "peak": FINAL} if peak is None else {
        "kind": "rewarm", "peak": peak, "final": FINAL / peak, "warmup": round(0.02 * tokens)}  # fmt: skip
    before = {key: schedule[key] for key in ("kind", "warmup", "decay", "tail", "final")}
    parts = [before | {"tokens": size.tokens}, part | {"tokens": tokens}]
    changes = _follows(name, "finished", lr, seed, tokens) | {
        "data": {"sources": sources(name, replay), "on_change": "switch"}
    }
    made = size.arm(label, lr, seed, changes, tokens * size.flops_per_token())
    made.config["schedule"] = {"kind": "sequence", "horizon": size.tokens + tokens, "parts": parts}
    return made


def from_plateau(name: str, lr: float, seed: int) -> Arm:
    """A first stage that was never annealed, trained on with the second text, with a tail at its end."""
    size = SIZES[name]
    tokens = round(STAGE * size.tokens)
    changes = _follows(name, "plateau", lr, seed, tokens)
    changes["data"] = {"sources": sources(name, 0.0), "on_change": "switch"}
    changes["schedule"] = {"horizon": size.tokens + tokens, "decay": round(0.2 * tokens)}
    return size.arm("from-plateau", lr, seed, changes, tokens * size.flops_per_token())


def alone(name: str, lr: float, seed: int) -> Arm:
    """The second text from the first weights, on the tokens of the second stage."""
    changes = {"data": {"sources": sources(name, 0.0)}, "schedule": {"horizon": round(STAGE * SIZES[name].tokens)}}
    return SIZES[name].arm("second-alone", lr, seed, changes)


def together(name: str, lr: float, seed: int) -> Arm:
    """Both texts from the first weights, on the tokens of both stages."""
    share = 1 / (1 + STAGE)
    changes = {
        "data": {"sources": sources(name, share)},
        "schedule": {"horizon": round((1 + STAGE) * SIZES[name].tokens)},
    }
    return SIZES[name].arm("both-together", lr, seed, changes)


def _follows(name: str, label: str, lr: float, seed: int, tokens: int) -> Raw:
    run = Store("rewarming", name).path(first_stage(name, label, lr, seed)).with_suffix("")
    return {
        "start": {"from": str(run), "carry": "all"},
        "checkpoint": {"every": tokens},
        "evaluation": {"every": tokens // 2},
    }


def leader(name: str) -> Contender:
    return Contender("first-finished", partial(first_stage, name, "finished"), SIZES[name].lr)


def contenders(name: str) -> dict[str, Contender]:
    """By label; the first stage sweeps its rate, and all others have that rate as their peak."""
    first = leader(name)
    makers = {}
    for label, peak in PEAKS.items():
        for replay in (0.0, *REPLAYS):
            told = label if not replay else f"{label}, {replay:.0%} replay"
            slug = told.replace(", ", "-").replace(" ", "-").replace("%", "pct")
            makers[told] = partial(second_stage, name, slug, peak, replay)
    makers |= {"from the plateau": partial(from_plateau, name), "second text alone": partial(alone, name)}
    makers["both together"] = partial(together, name)
    sides = {label: Contender(label, make, SIZES[name].lr, first) for label, make in makers.items()}
    return {"first stage": first, **sides}


def arms(name: str, results: Results) -> list[Arm]:
    """The sweep and the first stages, then what goes on from those that have finished."""
    found, rate = wanted(contenders(name).values(), results), leader(name).rate(results)
    if rate is None:
        return found
    parents = [first_stage(name, label, rate, seed) for label in ("finished", "plateau") for seed in SEEDS]
    ready = {str(Store("rewarming", name).path(arm).with_suffix("")) for arm in parents if arm.name in results}
    possible = [arm for arm in found if "start" not in arm.config or arm.config["start"]["from"] in ready]
    return list({arm.name: arm for arm in (*possible, *parents)}.values())
