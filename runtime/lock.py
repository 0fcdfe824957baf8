"""One launch at a time writes a run."""

import fcntl
import os
import warnings
from pathlib import Path

import torch.distributed as dist


class RunLock:
    """An advisory lock on a run's folder, held by rank 0 until `close` or the end of its process, however it ends.

    A second launch of the same run would otherwise take the first one's saves in progress for leftovers.
    """

    def __init__(self, folder: Path):
        self._path = folder / ".lock"
        self._file: int | None = None

    def acquire(self, *, create: bool) -> None:
        """Take the lock; without `create` only if the run exists. ValueError if another launch holds it,
        or the folder cannot be written."""
        if self._file is not None or dist.get_rank() != 0 or not (create or self._path.exists()):
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"run.dir: cannot write {self._path.parent}: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise ValueError(f"{self._path.parent}: another launch is running it; choose another run.name") from None
        except OSError as error:  # a file system without locks
            warnings.warn(f"{self._path} cannot be locked ({error.strerror}): launch a run only once", stacklevel=2)
        self._file = file

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
