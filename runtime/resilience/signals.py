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
        self._asked = False
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def __enter__(self) -> "Interruption":
        # Python runs its handlers between two of its own instructions, so never while a collective hangs; the
        # interpreter's wake-up socket tells another thread at once.
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._handlers_before = [signal.signal(each, self._mark) for each in SIGNALS]
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for each, handler in zip(SIGNALS, self._handlers_before, strict=True):
            signal.signal(each, handler)
        self._sender.close()
        self._thread.join()
        self._receiver.close()
        if kind is None and self._pending is not None:
            # Every rank has begun it; left alone it would outlive the process group.
            with contextlib.suppress(RuntimeError):
                self._pending[1].wait()

    def poll(self, *, out_of_time: bool = False) -> Agreed:
        """What was true on any rank at the poll before; this rank's own answer now goes into the next.

        A collective, to be called by all ranks in the same places; the n-th call gives all of them the same answer.
        One process knows at once.
        """
        own = Agreed(self._asked, out_of_time)
        if _alone():
            return own
        before, self._pending = self._pending, self._begin(own)
        return Agreed(False, False) if before is None else _read(*before)

    def exit_if_asked(self) -> None:
        """Leave with `SystemExit(INTERRUPTED)`, on every rank, if any was asked to; a collective that waits.

        For start-up, before there is anything to save.
        """
        own = Agreed(self._asked, False)
        agreed = own if _alone() else _read(*self._begin(own))
        if agreed.interrupted:
            raise SystemExit(INTERRUPTED)

    def _begin(self, own: Agreed) -> tuple[torch.Tensor, dist.Work]:
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        flags = torch.tensor(own, dtype=torch.uint8)
        return flags, dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _mark(self, *_: object) -> None:
        # No lock, no Event: a handler may interrupt another in the midst of taking it.
        self._asked = True

    def _listen(self) -> None:
        """Take the numbers of signals as they come, until the socket is closed."""
        received: list[int] = []
        told = False
        while numbers := self._receiver.recv(64):
            received += [number for number in numbers if number in SIGNALS]
            if received.count(signal.SIGINT) > 1:
                os._exit(128 + signal.SIGINT)
            if received and not told:
                told = True
                self._mark()
                _tell(received[0])


def _tell(number: int) -> None:
    """Answer a first signal on the console, once for the processes of a run."""
    if os.environ.get("RANK", "0") == "0":
        hint = "; another one exits at once" if number == signal.SIGINT else ""
        print(f"{signal.Signals(number).name}: saving and stopping{hint}", file=sys.stderr, flush=True)


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def _read(flags: torch.Tensor, work: dist.Work) -> Agreed:
    work.wait()
    return Agreed(*(bool(each) for each in flags.tolist()))
