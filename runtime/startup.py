"""Joining the process group, and agreeing on bad input before anything is built on it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class BadInput(ValueError):
    """What a user can put right: known to every rank, to be shown once, without a traceback."""


@contextmanager
def process_group(timeout_seconds: float) -> Iterator[None]:
    """The default group: torchrun's processes, or this one alone. Gloo serves CPU tensors, NCCL those on a GPU."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


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
