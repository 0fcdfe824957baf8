import time

import pytest
import torch
import torch.distributed as dist

from tests.workers import run_workers


def total_of_ranks(rank: int, scale: int) -> float:
    value = torch.tensor(float(rank * scale))
    dist.all_reduce(value)
    return value.item()


def fail_on_one(rank: int, guilty: int) -> None:
    if rank == guilty:
        raise ValueError("a bad value")
    dist.barrier()


def hang(rank: int) -> None:
    if rank == 1:
        time.sleep(600)


@pytest.mark.parametrize("world_size", [1, 2, 3, 2])
def test_every_rank_takes_part_and_answers(world_size):
    expected = 10.0 * sum(range(world_size))
    assert run_workers(total_of_ranks, world_size, 10) == [expected] * world_size


def test_an_error_names_its_rank_and_the_pool_recovers(monkeypatch):
    monkeypatch.setattr("tests.workers.GRACE_SECONDS", 1.0)
    with pytest.raises(ValueError, match="a bad value") as raised:
        run_workers(fail_on_one, 2, 1)
    assert "rank 1 of 2" in raised.value.__notes__[0]
    assert run_workers(total_of_ranks, 2, 1) == [1.0, 1.0]


def test_a_hung_worker_is_named():
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2"):
        run_workers(hang, 2, timeout=2.0)
