"""From the rungs' runs to laws as `launch/fit.py` has them, and to proposals for the held-out cell as `launch/plan.py`
has them: by our laws, and by published ones."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from experiments.arms import merged
from experiments.ladder.cells import Cell
from experiments.ladder.grid import Point
from launch.auto import Laws, PublishedLaws
from launch.config import validated
from launch.planning import Machine, Preset, Target, make_plan
from runtime.model.config import ModelConfig
from runtime.model.counts import count
from scaling.analysis import analyse
from scaling.proposal import law_for
from scaling.published import PUBLISHED
from scaling.readers import read
from scaling.results import Analysis, Bowl, Decision, Fit

OURS = "our law"


@dataclass(frozen=True)
class OurLaws:
    """An analysis, as plans read laws."""

    name: str
    fits: Sequence[Fit]
    bowls: Sequence[Bowl]


@dataclass(frozen=True)
class Proposal:
    """What laws propose for the held-out cell: what can be trained, and the decision behind it; or why nothing."""

    label: str
    point: Point | None = None
    decision: Decision | None = None
    note: str = ""


@lru_cache(maxsize=4)
def analysed(folders: tuple[Path, ...]) -> Analysis | str:
    """The laws of these runs, which have ended; or why there are none. Kept, as the queue asks after every arm."""
    try:
        return analyse(read(folders))
    except ValueError as error:
        return str(error)


@lru_cache(maxsize=4)
def proposals(folders: tuple[Path, ...], cell: Cell, carried: Point) -> tuple[Proposal, ...]:
    """Of our law, and of every publication that has a law of the learning rate. A law without one of the batch takes
    that of ours, or where ours has none the `carried` one."""
    found = analysed(folders)
    if isinstance(found, str):
        ours = Proposal(OURS, note=found)
    else:
        ours = proposed(OURS, OurLaws(OURS, found.fits, found.bowls), cell, carried)
    at = ours.point or carried
    others = [name for name, known in PUBLISHED.items() if "lr" in known]
    return ours, *(proposed(name, PublishedLaws(name), cell, at) for name in others)


def proposed(label: str, laws: Laws, cell: Cell, base: Point) -> Proposal:
    """What laws propose for a cell, in whole sequences and as a rate of three digits; what they do not tell is that of
    `base`. A published law is taken however far the cell is from its data."""
    raw = merged(cell.arm(base).config, {"run": {"name": cell.label}})
    fits = [fit for name in ("loss", "batch_tokens", "lr") if (fit := law_for(laws.fits, name)[0])]
    if law_for(laws.fits, "lr")[0] is None:
        return Proposal(label, note=law_for(laws.fits, "lr")[1][0].message)
    size = getattr(count(ModelConfig.model_validate(raw["model"])), fits[0].size)
    try:
        preset = Preset(raw, validated(deepcopy(raw), (), cell.label))
        plan = make_plan(laws, Target(params=size, tokens=cell.tokens), preset, Machine(), far=label in PUBLISHED)
    except ValueError as error:
        return Proposal(label, note=str(error))
    point = plan.config.optim.lr, plan.config.batch.sequences
    return Proposal(label, point, plan.decision, _note(label, plan.fits))


def _note(label: str, fits: dict[str, Fit]) -> str:
    """Which quantities a law tells, and from what data."""
    told = [name for name in ("lr", "batch_tokens") if name in fits]
    batch_of = "the largest rung" if label == OURS else OURS
    note = "" if len(told) == 2 else f"no law of the batch, which is that of {batch_of}"
    if label not in PUBLISHED:
        return note
    spans = fits["lr"].spans
    data = ", ".join(f"{name} {spans[name][0]:.2g}" for name in ("N", "D", "C") if name in spans)
    return "; ".join(each for each in (note, f"its data begin at {data}" if data else "") if each)
