"""Run a function on n persistent gloo processes: `run_workers(fn, world_size, *args)`."""

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import re
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

GRACE_SECONDS = 10.0
"""How long the other ranks may take to answer after one of them has raised; then they are taken to hang."""

_PEER_IS_GONE = re.compile(r"Connection (closed|reset) by peer|Socket closed|Broken pipe")

MOST_THREADS = 90
"""Of a worker that is kept. torch's caches hold on to the meshes of ended groups, and so to their threads, which wake a
hundred times a second each: a few hundred of them take a core."""


def run_workers(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """`fn(rank, *args)` on each of `world_size` processes of a fresh gloo group; the results in rank order.

    The processes are kept for the next call, the group is not. `fn`, its arguments and its results must be
    picklable (`fn` at the top of its module). An exception of a worker is raised here, of its own type, with the
    rank and its traceback as a note. TimeoutError, naming the ranks, if one does not answer in `timeout` seconds.
    """
    return _pool.run(fn, world_size, args, timeout)


class _Worker:
    def __init__(self, context: Any) -> None:
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()


class _Pool:
    def __init__(self) -> None:
        self.workers: list[_Worker] = []
        self.store: dist.TCPStore | None = None
        self.calls = 0

    def run(self, fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
        task = pickle.dumps((fn, args))
        self._grow(world_size)
        assert self.store is not None
        self.calls += 1
        workers = self.workers[:world_size]
        for rank, worker in enumerate(workers):
            worker.connection.send((rank, world_size, self.store.port, self.calls, timeout, task))
        answers = _collect([worker.connection for worker in workers], timeout)
        errors = {rank: answer for rank, answer in answers.items() if not answer[0]}
        silent = [rank for rank in range(world_size) if rank not in answers]
        if silent:
            self._dump_and_close([workers[rank] for rank in silent])
        if errors:
            rank, (_, error, text) = min(errors.items(), key=lambda each: _is_consequence(each[1][1]))
            error.add_note(f"raised on rank {rank} of {world_size}:\n{text}")
            raise error
        if silent:
            raise TimeoutError(f"ranks {silent} of {world_size} did not answer within {timeout:.0f} s in {fn.__name__}")
        if any(_threads(worker.process) > MOST_THREADS for worker in workers):
            self.close()
        return [answers[rank][1] for rank in range(world_size)]

    def _grow(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        multiprocessing.set_forkserver_preload(["torch", "torch.distributed.fsdp"])
        if self.store is None:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        if not all(worker.process.is_alive() for worker in self.workers):
            self.close()
        while len(self.workers) < world_size:
            self.workers.append(_Worker(context))

    def _dump_and_close(self, silent: list[_Worker]) -> None:
        """Print where the silent workers stand, then end all of them."""
        for worker in silent:
            if worker.process.is_alive():
                os.kill(worker.process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        self.close()

    def close(self) -> None:
        for worker in self.workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
        self.workers = []


def _threads(process: BaseProcess) -> int:
    try:
        return len(os.listdir(f"/proc/{process.pid}/task"))
    except OSError:  # it has died, or this is no Linux
        return 0


def _collect(connections: list[Connection], timeout: float) -> dict[int, tuple[Any, ...]]:
    """Answers by rank, until all are there, time is up, or the grace after a first failure has passed."""
    answers: dict[int, tuple[Any, ...]] = {}
    deadline = time.monotonic() + timeout
    pending = {connection: rank for rank, connection in enumerate(connections)}
    while pending and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(pending), timeout=left):
            rank = pending.pop(connection)
            try:
                answers[rank] = connection.recv()
            except EOFError:
                answers[rank] = (False, RuntimeError("the process died"), "no traceback")
            if not answers[rank][0]:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return answers


def _is_consequence(error: BaseException) -> bool:
    """Whether an error only says that a peer went away, so that the peer's own error is shown first."""
    return isinstance(error, RuntimeError) and _PEER_IS_GONE.search(str(error)) is not None


def _serve(connection: Connection) -> None:
    """A worker's life: run tasks until the parent closes its end."""
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)
    while True:
        try:
            rank, world_size, port, call, timeout, task = connection.recv()
        except EOFError:
            return
        try:
            fn, args = pickle.loads(task)
            _join(rank, world_size, port, call, timeout)
            answer = pickle.dumps((True, fn(rank, *args)))
        except BaseException as error:
            answer = _failure(error)
        _leave()
        connection.send_bytes(answer)


def _join(rank: int, world_size: int, port: int, call: int, timeout: float) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    store = dist.PrefixStore(f"call-{call}", dist.TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    torch.manual_seed(0)


def _leave() -> None:
    """End the group, and the sharding plans that DTensors remember of its meshes: an equal mesh would find them."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _clear_sharding_prop_cache()


def _failure(error: BaseException) -> bytes:
    text = traceback.format_exc()
    try:
        answer = pickle.dumps((False, error, text))
        pickle.loads(answer)
    except Exception:
        answer = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}"), text))
    return answer


_pool = _Pool()
atexit.register(_pool.close)
