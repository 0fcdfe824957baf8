"""What one rank finds or fails at is agreed by all: no rank hangs, none goes its own way."""

import errno
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.checkpoint import dcp
from runtime.checkpoint.staging import Staging
from runtime.checkpoint.storage import LocalStorage, RemoteStorage
from runtime.checkpoint.store import CheckpointStore
from tests.workers import run_workers


def name(tokens: int) -> str:
    return f"tokens-{tokens}-segment-0"


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {f"model.{key}": torch.full((5,), float(value)) for key in "abcd"}


def _full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


FAILURES = {
    "staging": (Staging, "copy"),
    "folder": (LocalStorage, "make_folder"),
    "opening": (LocalStorage, "open"),
    "writing": (dcp._CheckedStream, "write"),
    "syncing": (LocalStorage, "sync"),
    "metadata": (LocalStorage, "move"),
    "state": (CheckpointStore, "_write_state"),
    "manifest": (LocalStorage, "publish"),
    "object": (RemoteStorage, "open"),
}
FIRST_RANK_ONLY = {"metadata", "state", "manifest"}


def save_with_failure(rank: int, location: str, kind: str, failing: int) -> tuple[Any, ...]:
    events: list[dict[str, Any]] = []
    store = CheckpointStore(location, on_event=events.append)
    store.save(name(1), tensors(1), {}, asynchronous=False)
    owner, attribute = FAILURES[kind]
    original = getattr(owner, attribute)
    failure = _full_disk if kind != "staging" else _out_of_memory
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if rank == failing:
            setattr(owner, attribute, failure)
        try:
            store.save(name(2), tensors(2), {})
            dist.all_reduce(torch.zeros(1))  # training goes on
            succeeded = store.wait()
        finally:
            setattr(owner, attribute, original)
    folders = sorted(store._storage.folders())
    newest = store.newest()
    store.save(name(3), tensors(3), {})
    store.close()
    return (
        succeeded,
        folders,
        newest,
        store.names(),
        [event["outcome"] for event in events],
        [str(w.message) for w in said],
    )


def _out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("No space left in host memory")


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_on_one_rank_costs_all_ranks_that_checkpoint_and_nothing_else(
    tmp_path: Path, kind: str, failing: int
):
    location = f"local://{tmp_path}" if kind == "object" else str(tmp_path)
    costs = failing == 0 or kind not in FIRST_RANK_ONLY | {"folder"}
    for rank, result in enumerate(run_workers(save_with_failure, 2, location, kind, failing)):
        succeeded, folders, newest, names, outcomes, said = result
        if not costs and kind in FIRST_RANK_ONLY:
            assert succeeded and newest == name(2), "the other ranks never come here"
            continue
        assert not succeeded and folders == [name(1)] and newest == name(1)
        assert names == [name(1), name(3)] and outcomes == ["saved", "failed", "saved"]
        assert len(said) == (1 if rank == 0 else 0)
        assert all("No space left" in text and name(2) in text for text in said)


def divergent_views(rank: int, location: str, other: str) -> list[Any]:
    """Rank 1 looks elsewhere, as a node without the shared file system does."""
    store = CheckpointStore(location if rank == 0 else other, read_only=True)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        outcomes = [_outcome(store.newest), _outcome(lambda: store.load(name(2), tensors(0)))]
    return [text.replace(str(store._storage), "") for text in outcomes]


def _outcome(call: Callable[[], Any]) -> str:
    try:
        return str(call())
    except ValueError as error:
        return f"ValueError: {error}"


def test_ranks_with_different_views_agree(tmp_path: Path):
    for tokens in (1, 2):
        store = CheckpointStore(tmp_path / "all")
        store.save(name(tokens), tensors(tokens), {}, asynchronous=False)
    shutil.copytree(tmp_path / "all", tmp_path / "some")
    for file in (tmp_path / "some" / name(2)).iterdir():
        file.unlink()
    one, other = run_workers(divergent_views, 2, str(tmp_path / "all"), str(tmp_path / "some"))
    assert one == other
    assert one[0] == name(1) and one[1].startswith("ValueError") and name(2) in one[1] and "missing" in one[1]
    one, other = run_workers(divergent_views, 2, str(tmp_path / "all"), str(tmp_path / "nowhere"))
    assert one == other and "none of the checkpoints is intact" in one[0]
    one, other = run_workers(divergent_views, 2, str(tmp_path / "nowhere"), str(tmp_path / "all"))
    assert one == other and one[0] == "None"


def mismatched(rank: int, location: str) -> list[str]:
    store = CheckpointStore(location, read_only=True)
    cases = []
    for change in ({"model.a": torch.zeros(6)}, {"model.other": torch.zeros(1)}):
        mine = {**tensors(0), **(change if rank == 1 else {})}
        cases.append(_outcome(lambda mine=mine: store.load(name(1), mine)))
        assert not any(tensor.any() for tensor in mine.values())
    split = {key: value for key, value in tensors(0).items() if (key in ("model.a", "model.b")) == (rank == 0)}
    store.load(name(1), split)
    assert all(tensor.eq(1).all() for tensor in split.values())
    return cases


def test_what_one_rank_cannot_load_is_refused_by_all(tmp_path: Path):
    CheckpointStore(tmp_path).save(name(1), tensors(1), {}, asynchronous=False)
    one, other = run_workers(mismatched, 2, str(tmp_path))
    assert one == other
    assert "model.a is torch.float32 [5], expected torch.float32 [6]" in one[0]
    assert "lacks tensor model.other" in one[1]


def shared_verification(rank: int, location: str) -> list[str]:
    read: list[str] = []
    original = LocalStorage.open

    def spy(self: LocalStorage, path: str, mode: str) -> Any:
        read.append(os.path.basename(path))
        return original(self, path, mode)

    LocalStorage.open = spy
    try:
        assert CheckpointStore(location, read_only=True).newest() == name(1)
    finally:
        LocalStorage.open = original
    return read


def test_ranks_share_the_reading_of_a_verification(tmp_path: Path):
    CheckpointStore(tmp_path).save(name(1), tensors(1), {}, asynchronous=False)
    one, other = run_workers(shared_verification, 2, str(tmp_path))
    assert sorted([*one, *other]) == sorted(["manifest.json", ".metadata", "__0_0.distcp", "state.json"])
    assert "manifest.json" in one and other


def many_saves_beside_training(rank: int, location: str) -> list[str]:
    store = CheckpointStore(location)
    total = torch.zeros(1)
    for tokens in range(1, 9):
        store.save(name(tokens), tensors(tokens), {"tokens": tokens})
        store.retain(keep_last=2)
        for _ in range(20):
            dist.all_reduce(total := torch.ones(1))
        store.poll()
    assert store.wait() and total.item() == 2
    target = tensors(0)
    store.load(store.newest(), target)
    assert all(tensor.eq(8).all() for tensor in target.values())
    store.close()
    return store.names()


@pytest.mark.parametrize("scheme", ["", "local://"])
def test_saves_and_removals_run_beside_the_collectives_of_training(tmp_path: Path, scheme: str):
    assert run_workers(many_saves_beside_training, 2, f"{scheme}{tmp_path}") == [[name(7), name(8)]] * 2


def on_a_subgroup(rank: int, location: str) -> list[str] | None:
    group = dist.new_group([1, 2])
    if rank not in (1, 2):
        return None
    store = CheckpointStore(location, group)
    store.save(name(1), tensors(1), {})
    assert store.wait() and store.newest() == name(1)
    store.close()
    return sorted(os.listdir(f"{location}/{name(1)}"))


def test_a_store_of_a_subgroup_needs_only_its_ranks(tmp_path: Path):
    files = [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "state.json"]
    assert run_workers(on_a_subgroup, 3, str(tmp_path)) == [None, files, files]
