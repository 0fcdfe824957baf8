"""The arms: the rungs first, each swept; when all of them have ended the held-out cell, swept in the same way, and with
three seeds at the swept optimum, at the largest rung's optimum, and at what laws propose for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.arms import Arm, Results
from experiments.contest import SEEDS
from experiments.ladder.cells import SIZES, held_out, rungs
from experiments.ladder.grid import Point, Search, around
from experiments.ladder.law import Proposal, proposals

SWEPT, CARRIED = "swept optimum", "the largest rung's"

__all__ = ["SIZES", "arms"]


@dataclass(frozen=True)
class Standing:
    """Where the experiment stands."""

    rungs: tuple[Search, ...]
    """The sweeps, in the order of `cells.rungs`."""
    folders: tuple[Path, ...] = ()
    """Of the rungs that have ended, once all have; those that failed are left out."""
    carried: Point | None = None
    """The best of the largest rung, once all rungs have ended."""
    held_out: Search | None = None
    proposals: tuple[Proposal, ...] = ()

    @property
    def contenders(self) -> Mapping[str, Point]:
        """Settings of the held-out cell that run with three seeds."""
        swept = {SWEPT: self.held_out.best} if self.held_out and self.held_out.best else {}
        if self.carried is None:
            return {}
        told = {each.label: each.point for each in self.proposals if each.point}
        return {**swept, CARRIED: self.carried, **told}


def standing(size: str, results: Results) -> Standing:
    cells = rungs(size)
    sweeps = tuple(cell.sweep(results, around((SIZES[size].lr, base_batch(size)))) for cell in cells)
    ended = [cell.arm(point).name for cell, sweep in zip(cells, sweeps, strict=True) for point in sweep.wanted]
    if not set(ended) <= results.keys() or sweeps[-1].best is None:
        return Standing(sweeps)
    folders = tuple(sorted(results[name].folder for name in ended if results[name].outcome != "failed"))
    carried, cell = sweeps[-1].best, held_out(size)
    return Standing(sweeps, folders, carried, cell.sweep(results, around(carried)), proposals(folders, cell, carried))


def arms(size: str, results: Results) -> list[Arm]:
    now, cell = standing(size, results), held_out(size)
    found = [each.arm(point) for each, sweep in zip(rungs(size), now.rungs, strict=True) for point in sweep.wanted]
    if now.held_out is not None:
        found += [cell.arm(point) for point in now.held_out.wanted]
        found += [cell.arm(point, seed) for seed in SEEDS for point in now.contenders.values()]
    return list({arm.name: arm for arm in found}.values())


def base_batch(size: str) -> int:
    return SIZES[size].config["batch"]["sequences"]
