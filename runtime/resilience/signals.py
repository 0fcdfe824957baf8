"""Signals: asked of any process, answered by all of them together."""

import contextlib
import os
import signal
import socket
import sys
import threading
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple

import torch
import torch.distributed as dist

from runtime.resilience.exits import INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Agreed(NamedTuple):
    """What holds for at least one rank, as all of them know. False as a whole if there is nothing."""

    interrupted: bool
    out_of_time: bool

    def __bool__(self) -> bool:
        return any(self)


class Interruption:
    """Catches SIGTERM and SIGINT while it is entered, in the main thread, and brings all ranks to one answer.

    A signal only leaves a mark. Ranks see it at different moments, so they agree by an all-reduce on a gloo group of
    their own, begun at one `poll` and read at the next: nothing waits for the device, nor for a network's round trip.
    A second SIGINT in one process ends that process at once, even in the midst of a collective.
    """

    def __init__(self, timeout: timedelta | None = None):
        """`timeout` is that of the group, made by the first collective here; so a launch can enter this before it
        has a process group."""
        self._timeout = timeout
        self._asked = threading.Event()
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def __enter__(self) -> "Interruption":
        # Python runs its handlers between two of its own instructions, so never while a collective hangs; the
        # interpreter's wake-up socket tells another thread at once.
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._handlers_before = [signal.signal(each, lambda *_: self._asked.set()) for each in SIGNALS]
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in zip(SIGNALS, self._handlers_before, strict=True):
            signal.signal(each, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._sender.close()
        self._thread.join()
        self._receiver.close()
        if kind is None and self._pending is not None:
            # Every rank has begun it; left alone it would outlive the process group.
            with contextlib.suppress(RuntimeError):
                self._pending[1].wait()

    def poll(self, *, out_of_time: bool = False) -> Agreed:
        """What was true on any rank at the poll before; this rank's own answer now goes into the next.

        A collective, to be called by all ranks in the same places, whose n-th call gives all the same answer. One
        process knows at once.
        """
        own = self._own(out_of_time)
        if _alone():
            return Agreed(*own)
        before, self._pending = self._pending, self._begin(own)
        return Agreed(False, False) if before is None else _read(*before)

    def exit_if_asked(self) -> None:
        """Leave with `SystemExit(INTERRUPTED)`, on every rank, if any was asked to; a collective that waits.

        For start-up, before there is anything to save.
        """
        own = self._own(out_of_time=False)
        agreed = Agreed(*own) if _alone() else _read(*self._begin(own))
        if agreed.interrupted:
            raise SystemExit(INTERRUPTED)

    def _own(self, out_of_time: bool) -> tuple[bool, bool]:
        return self._asked.is_set(), out_of_time

    def _begin(self, flags: tuple[bool, ...]) -> tuple[torch.Tensor, dist.Work]:
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        tensor = torch.tensor(flags, dtype=torch.uint8)
        return tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _listen(self) -> None:
        """Takes the numbers of signals as they come, until the socket is closed."""
        interrupts = 0
        while received := self._receiver.recv(64):
            for number in received:
                if number not in SIGNALS:
                    continue
                if not self._asked.is_set() and os.environ.get("RANK", "0") == "0":
                    hint = "; another Ctrl-C exits at once" if number == signal.SIGINT else ""
                    print(
                        f"{signal.Signals(number).name}: stopping at the next step{hint}", file=sys.stderr, flush=True
                    )
                self._asked.set()
                interrupts += number == signal.SIGINT
                if interrupts > 1:
                    os._exit(128 + signal.SIGINT)


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def _read(tensor: torch.Tensor, work: dist.Work) -> Agreed:
    work.wait()
    return Agreed(*(bool(each) for each in tensor.tolist()))
