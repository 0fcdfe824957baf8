"""The loss trajectory of every layout equals one process's, for every option of the model."""

from functools import cache

import pytest

from runtime.config import ParallelConfig
from runtime.parallel.mesh import plan_layout
from tests.distributed.parity import CASES, SEQ_LEN, SEQUENCES, Case, Trajectory, mismatches, train_alone, train_on_mesh
from tests.workers import run_workers

LAYOUTS = {
    "fsdp2": (2, {}),
    "fsdp4": (4, {}),
    "hsdp2x2": (4, {"data_replicate": 2}),
    "tp2": (2, {"tensor": 2}),
    "tp4": (4, {"tensor": 4}),
    "fsdp2xtp2": (4, {"tensor": 2}),
}


def possible(case: Case, layout: str) -> bool:
    world_size, degrees = LAYOUTS[layout]
    try:
        plan_layout(ParallelConfig(**degrees), world_size, case.config, SEQ_LEN, SEQUENCES)
    except ValueError:
        return False
    return True


def train_all(rank: int, layout: str) -> dict[str, Trajectory]:
    return {case.name: train_on_mesh(case, *LAYOUTS[layout]) for case in CASES if possible(case, layout)}


@cache
def trajectories(layout: str) -> list[dict[str, Trajectory]]:
    """Each rank's trajectories of all cases, trained in one go."""
    return run_workers(train_all, LAYOUTS[layout][0], layout)


alone = cache(train_alone_by_name := lambda name: train_alone(next(case for case in CASES if case.name == name)))


@pytest.mark.parametrize(
    ("layout", "name"),
    [(layout, case.name) for layout in LAYOUTS for case in CASES if possible(case, layout)],
)
def test_a_mesh_trains_like_one_process(layout, name):
    for rank in trajectories(layout):
        assert mismatches(rank[name], alone(name)) == []
