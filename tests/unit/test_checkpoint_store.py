"""One process and its checkpoints: whole or not at all, and never the run's undoing."""

import errno
import json
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem
from torch import Tensor

from runtime.checkpoint import dcp, storage
from runtime.checkpoint.storage import LocalStorage, RemoteStorage
from runtime.checkpoint.store import CheckpointStore
from runtime.checkpoint.unsharded import UnshardedCheckpoint, open_unsharded


class ObjectStore(MemoryFileSystem):
    """Like S3: no folders of its own, no rename, an object is there once it is closed."""

    protocol = "objects"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def mv(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("objects cannot be renamed")

    def rm_file(self, path: str) -> None:
        if path not in self.store:
            raise FileNotFoundError(path)
        super().rm_file(path)


register_implementation("objects", ObjectStore, clobber=True)


def name(tokens: int) -> str:
    return f"tokens-{tokens}-segment-0"


def tensors(seed: int) -> dict[str, Tensor]:
    """One of each kind that a run has."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.a": torch.randn(7, 5, generator=generator),
        "model.transposed": torch.randn(4, 6, generator=generator).t(),
        "model.half": torch.randn(3, generator=generator).bfloat16(),
        "optimizer.a.step": torch.tensor(float(seed)),
        "guard.mask": torch.tensor([True, False, bool(seed % 2)]),
        "guard.count": torch.tensor(seed),
        "guard.nothing": torch.empty(0, 3),
        "guard.not_a_number": torch.tensor([float("nan"), float("inf")]),
    }


def blank() -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in tensors(0).items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key].nan_to_num(7), other[key].nan_to_num(7))
        for key in one
    )


def loaded(store: CheckpointStore, which: str) -> dict[str, Tensor]:
    target = blank()
    store.load(which, target)
    return target


def save(store: CheckpointStore, *tokens: int) -> None:
    for each in tokens:
        store.save(name(each), tensors(each), {"tokens": each})
    store.wait()


@pytest.fixture(params=["folder", "file://", "memory://", "local://", "objects://"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "checkpoints")
    return f"{request.param}{tmp_path}/checkpoints"


def damage(store: CheckpointStore, path: str, change: Callable[[bytes], bytes]) -> None:
    with store._storage.open(path, "rb") as stream:
        data = stream.read()
    with store._storage.open(path, "wb") as stream:
        stream.write(change(data))


# What every location promises.


def test_what_was_saved_is_loaded_in_place_and_read_without_a_mesh(location: str):
    store = CheckpointStore(location)
    assert store.newest() is None and store.names() == []
    save(store, 1, 2)
    assert store.newest() == name(2)
    for each in (1, 2):
        assert equal(loaded(store, name(each)), tensors(each))
        assert store.read_state(name(each)) == {"tokens": each}
        assert equal(open_unsharded(f"{location}/{name(each)}")[0], tensors(each))
    assert store.close()


def test_another_process_sees_the_same(location: str):
    save(CheckpointStore(location), 1, 2)
    assert CheckpointStore(location, read_only=True).newest() == name(2)
    assert open_unsharded(location)[1] == {"tokens": 2}


def test_opening_a_location_makes_nothing(location: str):
    CheckpointStore(location).newest()
    assert storage.open_storage(location.rsplit("/", 1)[0]).folders() == []


def test_leftovers_of_an_interrupted_save_are_removed_at_the_next_start_and_nothing_else(location: str):
    store = CheckpointStore(location)
    save(store, 1, 2)
    store._storage.remove(f"{name(2)}/manifest.json")
    store._storage.make_folder("notes")
    with store._storage.open("notes/kept", "wb") as stream:
        stream.write(b"x")
    assert CheckpointStore(location, read_only=True).names() == [name(1)]
    assert store._storage.exists(f"{name(2)}/state.json")
    again = CheckpointStore(location)
    assert again.newest() == name(1)
    assert sorted(again._storage.folders()) == ["notes", name(1)]


@pytest.mark.parametrize("path", ["manifest.json", "state.json", ".metadata", "__0_0.distcp"])
def test_a_flipped_byte_in_any_file_is_named_and_the_one_before_is_used(location: str, path: str):
    store = CheckpointStore(location)
    save(store, 1, 2)
    damage(store, f"{name(2)}/{path}", lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:])
    with pytest.warns(RuntimeWarning, match=f"{name(2)} damaged: {path}"):
        assert store.newest() == name(1)
    assert equal(loaded(store, name(1)), tensors(1))
    for read in (store.read_state, lambda which: store.load(which, blank())):
        with pytest.raises(ValueError, match=f"{name(2)}: {path}"):
            read(name(2))
    with pytest.raises(ValueError, match=f"{name(2)}: {path}"):
        UnshardedCheckpoint(f"{location}/{name(2)}")
    with pytest.warns(RuntimeWarning, match=path):
        assert open_unsharded(location)[1] == {"tokens": 1}


def test_if_none_is_intact_the_run_does_not_start_from_scratch(location: str):
    store = CheckpointStore(location)
    save(store, 1, 2)
    for each in (1, 2):
        damage(store, f"{name(each)}/__0_0.distcp", lambda data: data[:-1])
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(ValueError, match=r"none of the checkpoints is intact.*__0_0\.distcp"),
    ):
        store.newest()
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="no checkpoint is intact"):
        open_unsharded(location)


def test_retention_keeps_the_last_the_milestones_and_the_pinned(location: str):
    events: list[dict[str, Any]] = []
    store = CheckpointStore(location, on_event=events.append)
    for each in (10, 20, 30, 40, 50):
        store.save(name(each), tensors(each), {})
        if each == 10:
            store.wait()
            store.pin(name(10))
        store.retain(keep_last=1, keep_every=20)
    store.wait()
    assert store.names() == [name(10), name(20), name(40), name(50)]
    assert [event["checkpoint"] for event in events if event["outcome"] == "removed"] == [name(30)]
    assert len(open_unsharded(f"{location}/{name(10)}")[0]) == len(tensors(0))
    store.unpin(name(10))
    store.retain(keep_last=1)
    store.wait()
    assert store.names() == [name(50)]


def test_retention_never_removes_the_newest_intact_one(location: str):
    store = CheckpointStore(location)
    save(store, 1, 2, 3, 4)
    for each in (3, 4):
        damage(store, f"{name(each)}/state.json", lambda data: data + b" ")
    with pytest.warns(RuntimeWarning, match=r"state\.json"):
        store.retain(keep_last=1)
        store.wait()
    assert store.names() == [name(2), name(4)]
    damage(store, f"{name(2)}/state.json", lambda data: data + b" ")
    with pytest.warns(RuntimeWarning):
        store.retain(keep_last=1)
        store.wait()
    assert store.names() == [name(2), name(4)]


def test_a_point_saved_again_replaces_the_older_only_once_it_is_whole(location: str, monkeypatch: pytest.MonkeyPatch):
    store = CheckpointStore(location)
    save(store, 1)
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="No space left"):
        patch.setattr(type(store._storage), "publish", _full_disk)
        save(store, 1)
    assert store.newest() == name(1)
    store.save(name(1), tensors(5), {}, asynchronous=False)
    assert store.newest() == f"{name(1)}-revision-1"
    assert equal(loaded(store, f"{name(1)}-revision-1"), tensors(5))
    store.retain(keep_last=3)
    store.wait()
    assert store.names() == [f"{name(1)}-revision-1"]


def _full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["make_folder", "open", "write", "move", "publish"])
def test_a_full_disk_costs_a_warning_and_that_checkpoint(location: str, call: str, monkeypatch: pytest.MonkeyPatch):
    events: list[dict[str, Any]] = []
    store = CheckpointStore(location, on_event=events.append)
    save(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(*((dcp._CheckedStream, call) if call == "write" else (type(store._storage), call)), _full_disk)
        store.save(name(2), tensors(2), {})
        with pytest.warns(RuntimeWarning, match=f"{name(2)} failed: .*No space left on device"):
            assert not store.wait()
    assert [event["outcome"] for event in events] == ["saved", "failed"]
    assert store._storage.folders() == [name(1)] and store.newest() == name(1)
    save(store, 2)
    assert store.wait() and store.newest() == name(2) and equal(loaded(store, name(2)), tensors(2))


def test_a_checkpoint_that_is_published_when_a_rank_is_lost_stays(location: str, monkeypatch: pytest.MonkeyPatch):
    """The first of a run, else: a launch that is restarted would begin anew."""
    store = CheckpointStore(location)
    publish = type(store._storage).publish

    def lose_a_rank(*args: Any) -> None:
        publish(*args)
        raise RuntimeError("Connection closed by peer")

    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="failed: .*Connection closed by peer"):
        patch.setattr(type(store._storage), "publish", lose_a_rank)
        save(store, 1)
        assert not store.wait()
    next_launch = CheckpointStore(location)
    assert next_launch.newest() == name(1) and equal(loaded(next_launch, name(1)), tensors(1))


# Asynchrony.


class Gate:
    """Holds the background thread at the start of writing until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.entered = threading.Event(), []
        original = dcp.write

        def write(*args: Any) -> Any:
            self.entered.append(args[1])
            assert self.opened.wait(60)
            return original(*args)

        monkeypatch.setattr(dcp, "write", write)


def test_training_goes_on_while_a_save_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gate, store, live, state = Gate(monkeypatch), CheckpointStore(tmp_path), tensors(1), {"list": [1]}
    store.save(name(1), live, state)
    for tensor in live.values():
        tensor.zero_()
    state["list"].append(2)
    assert not store.poll() and store.names() == []
    gate.opened.set()
    assert store.wait() and store.poll()
    assert equal(loaded(store, name(1)), tensors(1)) and store.read_state(name(1)) == {"list": [1]}


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gate, store = Gate(monkeypatch), CheckpointStore(tmp_path)
    store.save(name(1), tensors(1), {})
    second = threading.Thread(target=store.save, args=(name(2), tensors(2), {}))
    second.start()
    second.join(0.2)
    assert second.is_alive() and gate.entered in ([], [name(1)])
    gate.opened.set()
    second.join()
    store.wait()
    assert gate.entered == [name(1), name(2)]
    assert equal(loaded(store, name(1)), tensors(1)) and equal(loaded(store, name(2)), tensors(2))


def test_events_come_in_the_main_thread_and_phases_in_order(tmp_path: Path):
    events: list[tuple[threading.Thread, dict[str, Any]]] = []
    phases: list[str] = []
    store = CheckpointStore(
        tmp_path, on_event=lambda event: events.append((threading.current_thread(), event)), on_phase=phases.append
    )
    assert store.phase == "idle"
    save(store, 1)
    assert phases == ["staging", "writing", "finalizing", "idle"] and store.phase == "idle"
    [(thread, event)] = events
    assert thread is threading.main_thread()
    size = sum(file.stat().st_size for file in (tmp_path / name(1)).iterdir() if file.name != "manifest.json")
    assert event.pop("seconds") > 0 and event.pop("stall_seconds") > 0
    assert event == {"event": "checkpoint", "outcome": "saved", "checkpoint": name(1), "bytes": size}


def test_out_of_host_memory_costs_only_that_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = CheckpointStore(tmp_path)
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="out of memory"):
        patch.setattr(store._staging, "copy", lambda _: (_ for _ in ()).throw(RuntimeError("out of memory")))
        save(store, 1)
    save(store, 2)
    assert store.names() == [name(2)]


def test_host_memory_does_not_grow_from_save_to_save(tmp_path: Path):
    store, process = CheckpointStore(tmp_path), psutil.Process()
    size = 8 * 2**20
    live = {"model.a": torch.zeros(size // 8), "model.b": torch.zeros(size // 8)}
    used = []
    for each in range(1, 41):
        store.save(name(each), live, {})
        store.retain(keep_last=1)
        store.wait()
        used.append(process.memory_info().rss)
    assert used[-1] - used[9] < 2 * size, "thirty saves of this size may not add two"


# Durability of a folder.


def test_every_file_is_on_disk_before_the_manifest_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)))
        fsync(descriptor)

    def record_replace(source: Any, target: Any) -> None:
        calls.append(("rename", os.path.relpath(target, tmp_path)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    save(CheckpointStore(tmp_path), 1)
    appears = calls.index(("rename", f"{name(1)}/manifest.json"))
    before, after = calls[:appears], calls[appears + 1 :]
    for synced in ("__0_0.distcp", ".metadata.tmp", "state.json", "manifest.json.tmp"):
        assert ("fsync", f"{name(1)}/{synced}") in before
    assert (
        before.index(("rename", f"{name(1)}/.metadata")) < before.index(("fsync", name(1))) and ("fsync", ".") in before
    )
    assert after == [("fsync", name(1))]


def test_removal_begins_with_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = CheckpointStore(tmp_path)
    save(store, 1, 2)
    monkeypatch.setattr(storage.shutil, "rmtree", lambda *args, **kwargs: None)  # killed right here
    store.retain(keep_last=1)
    store.wait()
    assert store.names() == [name(2)] and store.newest() == name(2)


# What a user can get wrong.


def _changed(key: str, value: Tensor | None) -> dict[str, Tensor]:
    target = {**blank(), key: value}
    return {key: value for key, value in target.items() if value is not None}


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (_changed("model.b", torch.zeros(1)), "lacks tensor model.b"),
        (_changed("model.a", None), "holds tensor model.a"),
        (_changed("model.a", torch.zeros(7, 6)), r"model.a is torch.float32 \[7, 5\], expected torch.float32 \[7, 6\]"),
        (_changed("model.a", torch.zeros(5, 7)), r"expected torch.float32 \[5, 7\]"),
        (_changed("model.a", torch.zeros(35)), r"expected torch.float32 \[35\]"),
        (_changed("optimizer.a.step", torch.zeros(1)), r"optimizer.a.step is torch.float32 \[\]"),
        (_changed("model.half", torch.zeros(3)), "model.half is torch.bfloat16"),
        ({}, r"holds tensors guard\.count"),
    ],
)
def test_tensors_that_do_not_match_are_refused_before_any_is_touched(tmp_path: Path, target: Any, told: str):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    with pytest.raises(ValueError, match=told):
        store.load(name(1), target)
    assert not any(tensor.any() for tensor in target.values())


def test_a_part_of_a_checkpoint_is_loaded_on_request(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    target = {"model.a": torch.zeros(7, 5)}
    store.load(name(1), target, partial_load=True)
    assert torch.equal(target["model.a"], tensors(1)["model.a"])
    with pytest.raises(ValueError, match=r"lacks tensor model\.b"):
        store.load(name(1), {"model.b": torch.zeros(1)}, partial_load=True)


def _forbid(monkeypatch: pytest.MonkeyPatch, owner: Any, call: str) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(owner, call, refuse)


def test_a_location_that_cannot_be_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    for location, told in [
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "checkpoints", "file is no folder"),
        ("nowhere://x", "nowhere://x"),
    ]:
        with pytest.raises(ValueError, match=told):
            CheckpointStore(location)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"cannot be listed: .*Permission denied"):
        _forbid(patch, storage.os, "scandir")
        CheckpointStore(tmp_path).newest()
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"{tmp_path} is no folder one may write to"):
        patch.setattr(storage.os, "access", lambda *args: False)
        CheckpointStore(tmp_path / "not" / "there")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    for call in (store.read_state, lambda which: store.load(which, {}), store.pin):
        with pytest.raises(ValueError, match=name(7)):
            call(name(7))


def test_state_that_is_no_json_is_an_error_at_once(tmp_path: Path):
    with pytest.raises(TypeError):
        CheckpointStore(tmp_path).save(name(1), {}, {"tensor": torch.zeros(1)})


def test_a_url_of_a_folder_is_a_folder():
    assert isinstance(storage.open_storage("file:///x"), LocalStorage)
    assert isinstance(storage.open_storage("local:///x"), RemoteStorage)


def test_the_manifest_lists_every_file(tmp_path: Path):
    save(CheckpointStore(tmp_path), 1)
    listed = json.loads((tmp_path / name(1) / "manifest.json").read_text())["files"]
    assert {*listed, "manifest.json"} == {file.name for file in (tmp_path / name(1)).iterdir()}


def test_nothing_is_said_when_nothing_is_wrong(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = CheckpointStore(tmp_path)
        save(store, 1)
        loaded(store, store.newest())
        open_unsharded(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_training_on_a_gpu_goes_on_while_a_save_is_written(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    live = {"model.a": torch.randn(4096, 4096, device="cuda"), "optimizer.a.step": torch.tensor(3.0, device="cuda")}
    truth = {key: tensor.cpu() for key, tensor in live.items()}
    store.save(name(1), live, {})
    for tensor in live.values():
        tensor.zero_()
    store.wait()
    store.load(name(1), live)
    assert all(torch.equal(live[key].cpu(), truth[key]) for key in live)
