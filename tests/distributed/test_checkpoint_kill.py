"""A process killed at any moment leaves an intact newest checkpoint, never older than the last one reported saved."""

import builtins
import multiprocessing
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.checkpoint import dcp
from runtime.checkpoint.store import CheckpointStore
from runtime.checkpoint.unsharded import open_unsharded

CONTEXT = multiprocessing.get_context("forkserver")
WORLDS = [1, 2]


def name(tokens: int) -> str:
    return f"tokens-{tokens}-segment-0"


def tensors(tokens: int) -> dict[str, torch.Tensor]:
    return {f"model.{key}": torch.arange(300.0) + tokens * 1000 + key for key in range(2)}


def assert_intact(location: Path) -> int:
    """The tokens of the newest checkpoint, after checking that it is the one it claims to be."""
    store = CheckpointStore(location, read_only=True)
    newest = store.newest()
    assert newest is not None
    found, state = open_unsharded(location / newest)
    assert newest == name(state["tokens"])
    assert found.keys() == tensors(0).keys()
    assert all(torch.equal(found[key], each) for key, each in tensors(state["tokens"]).items())
    return state["tokens"]


def start(target: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed.fsdp"])
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


# Every single operation on the file system, in turn.


def save_and_die_before_operation(location: Path, last: int) -> int:
    """Save and remove, and be killed right before the file system is touched for the `last`-th time; otherwise how
    often it was touched."""
    count = 0

    def is_last() -> bool:
        nonlocal count
        count += 1
        return count == last

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if is_last():
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return operation

    def torn_write(stream: Any, data: Any) -> int:
        size = memoryview(data).nbytes
        if size >= 256 and is_last():  # torch writes a tensor in dozens of smaller pieces
            stream.raw.write(memoryview(data).cast("B")[: size // 2])
            stream.raw.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(stream, data)

    write = dcp._CheckedStream.write
    dcp._CheckedStream.write = torn_write
    for call in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, call, counting(getattr(os, call)))
    builtins.open = counting(builtins.open)
    store = CheckpointStore(location)
    store.save(name(3), tensors(3), {"tokens": 3})
    store.retain(keep_last=1)
    store.wait()
    return count


def attempt_each(root: str, operations: Any) -> None:
    """In folder 0 an uninterrupted save, which counts the operations; in folder k one killed before the k-th."""
    torch.set_num_threads(1)
    last = 0
    while last <= operations.value:
        location = Path(root) / str(last)
        shutil.copytree(Path(root) / "before", location)
        process = os.fork()
        if process == 0:
            operations.value = save_and_die_before_operation(location, last)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if last else 0)
        last += 1


def test_killed_before_any_one_operation_on_the_file_system(tmp_path: Path):
    before = CheckpointStore(tmp_path / "before")
    for tokens in (1, 2):
        before.save(name(tokens), tensors(tokens), {"tokens": tokens}, asynchronous=False)
    operations = CONTEXT.Value("i", 0)
    process = start(attempt_each, str(tmp_path), operations)
    process.join(120)
    assert process.exitcode == 0 and operations.value > 20
    reached = [assert_intact(tmp_path / str(last)) for last in range(operations.value + 1)]
    assert reached[0] == 3 and reached[1:] == sorted(reached[1:]) and set(reached) == {2, 3}
    for last in range(operations.value + 1):
        store = CheckpointStore(tmp_path / str(last))
        assert store.names() == sorted(store._storage.folders()), "what was interrupted is gone"
        store.save(name(4), tensors(4), {"tokens": 4}, asynchronous=False)
        assert assert_intact(tmp_path / str(last)) == 4


# Random moments of a run that does nothing but save.


def save_forever(rank: int, world_size: int, location: str, rendezvous: str, phases: Connection) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)

    def report(event: dict[str, Any]) -> None:
        if event["outcome"] == "saved":
            phases.send(event["checkpoint"])

    store = CheckpointStore(location, on_phase=phases.send, on_event=report)
    newest = store.newest()
    first = store.read_state(newest)["tokens"] if newest else 0
    for tokens in range(first + 1, first + 10_000):
        store.save(name(tokens), tensors(tokens), {"tokens": tokens})
        store.retain(keep_last=2, keep_every=50)


def kill_at(chance: random.Random, location: Path, world_size: int, rendezvous: Path) -> tuple[str, int]:
    """Start savers, kill all of them a moment after a random phase began; that phase, and the tokens last reported."""
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        start(save_forever, rank, world_size, str(location), str(rendezvous), pipe[1])
        for rank, pipe in enumerate(pipes)
    ]
    reported, seen, enough = 0, "idle", chance.randrange(1, 40)
    wanted = chance.choice(["idle", "staging", "writing", "finalizing", "finalizing"])
    while enough > 0 or seen != wanted:
        assert pipes[0][0].poll(60), "the saver stopped by itself"
        message = pipes[0][0].recv()
        if message.startswith("tokens-"):
            reported = int(message.split("-")[1])
        else:
            seen, enough = message, enough - 1
    for _ in range(chance.randrange(0, 20_000)):
        pass
    chance.shuffle(processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    while pipes[0][0].poll():
        try:
            message = pipes[0][0].recv()
        except EOFError:
            break
        seen = seen if message.startswith("tokens-") else message
    return seen, reported


def kill_often(tmp_path: Path, world_size: int, kills: int) -> Counter[str]:
    chance, location = random.Random(world_size), tmp_path / "checkpoints"
    CheckpointStore(location).save(name(1), tensors(1), {"tokens": 1}, asynchronous=False)
    counted: Counter[str] = Counter()
    newest = 1
    for kill in range(kills):
        phase, reported = kill_at(chance, location, world_size, tmp_path / f"rendezvous-{kill}")
        counted[phase] += 1
        found = assert_intact(location)
        assert found >= max(reported, newest), "what was reported as saved is durable"
        newest = found
    assert newest > kills
    return counted


@pytest.mark.parametrize("world_size", WORLDS)
def test_killed_at_random_moments(tmp_path: Path, world_size: int):
    kill_often(tmp_path, world_size, kills=5)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLDS)
def test_killed_at_random_moments_many_times(tmp_path: Path, world_size: int):
    counted = kill_often(tmp_path, world_size, kills=40)
    assert sum(counted[phase] for phase in ("staging", "writing", "finalizing")) >= 10
