"""Joining the process group, and agreeing on bad input before anything is built on it."""

import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


class BadInput(ValueError):
    """What a user can put right: known to every rank, to be shown once, without a traceback."""


class LocalBadInput(BadInput):
    """Found by this rank alone, while the others may be waiting in a collective: it has to speak for itself."""


@contextmanager
def process_group(timeout_seconds: float) -> Iterator[None]:
    """The default group: torchrun's processes, or this one alone. Gloo serves CPU tensors, NCCL those on a GPU."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        store = _attempt(store, rank, world_size, timeout_seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield
    except (BadInput, SystemExit):  # all ranks have agreed on these
        dist.destroy_process_group()
        raise
    # After any other error the peers are in a collective, for which destroying the group would wait.
    dist.destroy_process_group()


def _attempt(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> dist.Store:
    """The part of the agents' store that belongs to this attempt of torchrun, and to no earlier one; a collective.

    torchrun keeps its store over restarts (pytorch issue 135712), so the addresses of killed workers are still in it,
    and its agents count restarts each for itself. Every rank therefore draws a name that only a living rank 0 can
    answer, with the name of the attempt.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"joining/{rank}", own)
        name = store.get(f"attempt/{own}").decode()
        store.add(f"joined/{name}", 1)
        return dist.PrefixStore(name, store)
    deadline = time.monotonic() + timeout_seconds
    while store.add(f"joined/{own}", 0) < world_size - 1:
        for other in range(1, world_size):
            if store.check([f"joining/{other}"]):
                store.set(f"attempt/{store.get(f'joining/{other}').decode()}", own)
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of the {world_size} processes joined within {timeout_seconds:g} s")
        time.sleep(0.01)
    return dist.PrefixStore(own, store)


def agree(action: Callable[[], T]) -> T:
    """Run a local action on every rank; if it is a ValueError on any, it is BadInput on all. A collective.

    A file that is missing on one machine of many would otherwise leave the others waiting.
    """
    result, message = None, None
    try:
        result = action()
    except ValueError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    found = {text: rank for rank, text in reversed(list(enumerate(messages))) if text is not None}
    if not found:
        return result
    everywhere = all(text is not None for text in messages) and len(found) == 1
    raise BadInput("\n".join(text if everywhere else f"rank {rank}: {text}" for text, rank in found.items()))


def read_or_warn(read: Callable[[], T], default: T) -> T:
    """What a log file says, or the default with a warning: a damaged log does not keep a run from going on."""
    try:
        return read()
    except ValueError as error:
        warnings.warn(f"{error}; what it said is lost, the run goes on", stacklevel=2)
        return default
