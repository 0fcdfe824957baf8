"""The durable store: checkpoints that are visible whole or not at all, written while training goes on."""

import json
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from runtime.checkpoint import dcp, manifest, retention
from runtime.checkpoint.dcp import LazyShard, Reader, Shards, local_shard
from runtime.checkpoint.manifest import MANIFEST, FileRecord
from runtime.checkpoint.ranks import Ranks
from runtime.checkpoint.staging import Staging
from runtime.checkpoint.storage import Storage, open_storage

STATE = "state.json"
PIN = "pin"

Phase = Literal["idle", "staging", "writing", "finalizing"]
Event = dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run, in a folder or at an fsspec URL that all ranks share.

    Every method is a collective over the ranks, to be called by all in the same order from the main thread,
    except `names`, `poll` and `phase`. A failed save never raises: it costs a warning (on the first rank), an
    event and that checkpoint. Only one store that is not `read_only` may exist for a location at a time.

    `on_event` receives, in the main thread, dicts with ``event = "checkpoint"``, ``checkpoint`` (the name) and
    ``outcome``: "saved" (with ``bytes``, ``seconds`` in the background and ``stall_seconds`` in the main thread),
    "failed" (``error``), "damaged" (``error``) or "removed". `on_phase` is called with each new phase in the
    thread that enters it.
    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        process_group: dist.ProcessGroup | None = None,
        *,
        read_only: bool = False,
        on_event: Callable[[Event], None] | None = None,
        on_phase: Callable[[Phase], None] | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        """Open a location, which need not exist, and remove what interrupted saves have left there.

        `read_only` (another run's checkpoints) removes nothing and cannot save. `timeout` is that of the
        store's own gloo group. ValueError if the location is a file, a URL of an unknown protocol, or a folder
        that cannot be read or written.
        """
        self._storage: Storage = open_storage(location)
        self._ranks = Ranks(process_group, timeout)
        self._read_only = read_only
        self.on_event, self._on_phase = on_event, on_phase
        self._staging = Staging()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._jobs: list[Future[None]] = []
        self._events: deque[Event] = deque()
        self._last_save_failed = False
        self._verified: tuple[str, dict[str, FileRecord]] | None = None
        self.phase: Phase = "idle"
        """What is going on: copying to the host, writing files, or publishing and removing old ones."""
        if not read_only:
            self._ranks.broadcast(self._remove_leftovers)

    def save(
        self,
        name: str,
        tensors: Mapping[str, Tensor | Sequence[LazyShard]],
        state: Mapping[str, Any],
        asynchronous: bool = True,
    ) -> None:
        """Save tensors (DTensors of any mesh, or tensors equal on all ranks) and JSON state under a name
        ``tokens-<n>-segment-<k>``; a point saved before gets a revision, and the older one stays until retention.

        Waits for an earlier save first, copies everything to host memory, and returns; nothing of `tensors` or
        `state` is read afterwards. The files are then written in the background: the tensors, then the state,
        fsynced, and last the manifest, which makes the checkpoint visible. If any rank fails before that, all give it
        up and what was written is removed.

        In place of a tensor there may be this rank's parts of it as `LazyShard`s: they are not copied but computed when
        it is their turn to be written, `dcp.LAZY_FILES` at a time in the order given, so that a checkpoint may be
        larger than memory. Such a save is not asynchronous.
        """
        assert not self._read_only and retention.parse(name), f"cannot save {name!r} here"
        assert not asynchronous or all(isinstance(each, Tensor) for each in tensors.values())
        self.wait()
        self._verified = None
        began = time.perf_counter()
        text = json.dumps(state)
        self._enter("staging")
        try:
            staged: Shards | Exception = self._staging.copy(tensors)
        except (RuntimeError, MemoryError) as error:  # out of host memory: the other ranks hear of it in _save
            staged = error
        stall = time.perf_counter() - began
        self._submit(name, partial(self._save, name, staged, text, stall))
        if not asynchronous:
            self.wait()

    def retain(self, keep_last: int, keep_every: int | None = None, keep_at: Sequence[int] = ()) -> None:
        """Remove old checkpoints in the background, after the save in flight.

        Kept are the last `keep_last`, for each multiple of `keep_every` tokens and each of `keep_at` the first at or
        past it, pinned ones, and in any case the newest intact one: the newest is read back before anything is removed.
        """
        assert not self._read_only and keep_last > 0
        self._submit("retention", partial(self._retain, keep_last, keep_every, tuple(keep_at)))

    def wait(self) -> bool:
        """Wait for the background work, report what it did, and tell whether the last save succeeded."""
        for job in self._jobs:
            job.result()
        self._jobs.clear()
        self._report()
        return not self._last_save_failed

    def poll(self) -> bool:
        """Report what the background work has done so far, without waiting; whether all of it is done."""
        self._report()
        return all(job.done() for job in self._jobs)

    def names(self) -> list[str]:
        """Complete checkpoints, oldest first, as this rank sees them; whether they are intact is not looked at.
        ValueError if the location cannot be read."""
        try:
            names = retention.by_age(self._storage.folders())
            return [name for name in names if self._storage.exists(f"{name}/{MANIFEST}")]
        except OSError as error:
            raise ValueError(f"{self._storage} cannot be listed: {error}") from error

    def newest(self) -> str | None:
        """The newest checkpoint whose every file matches its manifest, the same on every rank; None if there is
        no checkpoint at all.

        The first rank lists, all share the reading. A damaged one costs a warning that names its file, and the
        one before is tried. ValueError if there are checkpoints and none is intact.
        """
        self.wait()
        names = self._ranks.broadcast(self.names)
        problems = {}
        for name in reversed(names):
            files, problem = self._verify(name)
            if problem is None:
                self._verified = name, files
                return name
            problems[name] = problem
            self._note("damaged", name, error=problem)
            self._report()
        if problems:
            listed = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
            raise ValueError(f"{self._storage}: none of the checkpoints is intact: {listed}")
        return None

    def read_state(self, name: str) -> dict[str, Any]:
        """The JSON state of a checkpoint, from the first rank. ValueError if the checkpoint is not intact."""
        self.wait()
        self._require_intact(name)
        return self._ranks.broadcast(partial(read_state, self._storage, name))

    def hash(self, name: str) -> str:
        """The checksum of a manifest, which holds those of all files. ValueError if the checkpoint is not intact."""
        self.wait()
        return manifest.hash_of(self._require_intact(name))

    def open(self, name: str) -> Reader:
        """The tensors of a checkpoint, for this rank to read any part of, alone and whenever it likes. ValueError if
        the checkpoint is not intact."""
        self.wait()
        return self._reader(name, {}, None)

    def hash_of_saved(self, point: str) -> str | None:
        """`hash` of the last revision of a point, after the save in flight and without reading its files back; None if
        it was not saved."""
        self.wait()

        def found() -> str | None:
            names = [name for name in self.names() if retention.parse(name)[:2] == retention.parse(point)[:2]]
            if not names:
                return None
            return manifest.hash_of(manifest.read(self._storage, names[-1]))

        return self._ranks.broadcast(found)

    def load(self, name: str, tensors: Mapping[str, Tensor], partial_load: bool = False) -> None:
        """Fill tensors and DTensors of any mesh in place from a checkpoint of any mesh.

        The checkpoint is verified first, unless this store has just done so. ValueError, before any tensor is
        touched, if it is not intact, if names, shapes or dtypes differ, or, without `partial_load`, if it holds
        tensors that no rank asks for.
        """
        self.wait()
        parts = self._ranks.gather(lambda: set(tensors))
        asked = self._ranks.broadcast(lambda: None if partial_load else set().union(*parts))
        reader = self._reader(name, tensors, asked)
        self._ranks.gather(lambda: reader.load({n: local_shard(tensor) for n, tensor in tensors.items()}))

    def pin(self, name: str) -> None:
        """Keep a checkpoint from retention for good, across processes: another run begins from it. ValueError if
        there is no such checkpoint."""
        self._ranks.broadcast(lambda: self._pin(name))

    def unpin(self, name: str) -> None:
        """Undo `pin`; not being pinned is no error."""
        self._ranks.broadcast(lambda: self._storage.remove(f"{name}/{PIN}"))

    def close(self) -> bool:
        """`wait`, then give threads, buffers and the process group back. The store cannot be used afterwards."""
        succeeded = self.wait()
        self._worker.shutdown()
        self._staging.release()
        self._ranks.close()
        return succeeded

    # Background: one thread runs these in the order they were submitted, which is the same on every rank.

    def _submit(self, name: str, job: Callable[[], None]) -> None:
        def run() -> None:
            try:
                job()
            except Exception as error:  # the run goes on, whatever happened here
                self._note("failed", name, error=str(error))
            finally:
                self._enter("idle")

        self._jobs.append(self._worker.submit(run))

    def _save(self, point: str, staged: Shards | Exception, state: str, stall: float) -> None:
        began = time.perf_counter()
        self._last_save_failed = True
        self._enter("writing")
        self._ranks.gather(lambda: _raise_if_failed(staged))
        name = self._ranks.broadcast(partial(self._free_name, point))
        try:
            self._ranks.broadcast(partial(self._make_folder, name))
            written = self._write(name, staged, state)
        except Exception:
            with suppress(Exception):  # what cannot be removed stays invisible, and the first error is the one to tell
                self._ranks.broadcast(partial(self._discard, name))
            raise
        self._last_save_failed = False
        self._note("saved", name, bytes=written, seconds=time.perf_counter() - began, stall_seconds=stall)

    def _discard(self, name: str) -> None:
        """Remove what a failed save has written, but not where all of it was published before a rank was lost."""
        if not self._storage.exists(f"{name}/{MANIFEST}"):
            self._storage.remove_folder(name, MANIFEST)

    def _write(self, name: str, shards: Shards, state: str) -> int:
        """All files of a checkpoint, the manifest last; their size in bytes on the first rank."""
        records = dcp.write(self._storage, name, shards, self._ranks)
        self._enter("finalizing")

        def finish() -> dict[str, FileRecord]:
            if self._ranks.is_first:
                records[STATE] = self._write_state(name, state)
            self._storage.sync(name)
            return records

        parts = self._ranks.gather(finish)
        files = {path: record for part in parts for path, record in part.items()}
        self._ranks.broadcast(lambda: self._require_shared(name, files))
        self._ranks.broadcast(lambda: self._storage.publish(f"{name}/{MANIFEST}", manifest.encode(files)))
        return sum(record.size for record in files.values())

    def _require_shared(self, name: str, files: Mapping[str, FileRecord]) -> None:
        """OSError if the first rank does not see what another has written."""
        for path, record in files.items():
            if not self._storage.exists(f"{name}/{path}") or self._storage.size(f"{name}/{path}") != record.size:
                raise OSError(f"the first rank does not see {path}: all ranks need the same storage")

    def _write_state(self, name: str, text: str) -> FileRecord:
        checksum = manifest.Checksum()
        checksum.update(text.encode())
        with self._storage.open(f"{name}/{STATE}", "wb") as stream:
            stream.write(text.encode())
        return checksum.record()

    def _retain(self, keep_last: int, keep_every: int | None, keep_at: Sequence[int]) -> None:
        self._enter("finalizing")
        names, pinned = self._ranks.broadcast(self._list_with_pins)
        old = set(names) - retention.kept(names, keep_last, keep_every, keep_at) - pinned
        if not old:
            return
        for name in reversed(names):
            _, problem = self._verify(name)
            if problem is None:
                self._remove(sorted(old - {name}))
                return
            self._note("damaged", name, error=problem)

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self._ranks.broadcast(partial(self._storage.remove_folder, name, MANIFEST))
            self._note("removed", name)

    # Either thread.

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        if self._on_phase:
            self._on_phase(phase)

    def _note(self, outcome: str, name: str, **details: Any) -> None:
        self._events.append({"event": "checkpoint", "outcome": outcome, "checkpoint": name, **details})

    def _verify(self, name: str) -> tuple[dict[str, FileRecord], str | None]:
        """A checkpoint's manifest and what is wrong with the checkpoint; each rank reads its share of the files."""
        try:
            files = self._ranks.broadcast(partial(manifest.read, self._storage, name))
        except ValueError as error:
            return {}, str(error)
        share = sorted(files.items())[self._ranks.rank :: self._ranks.size]
        found = self._ranks.gather(partial(manifest.first_problem, self._storage, name, share))
        return files, self._ranks.broadcast(lambda: next((problem for problem in found if problem), None))

    # On the first rank, or in the main thread.

    def _report(self) -> None:
        while self._events:
            event = self._events.popleft()
            if self._ranks.is_first and event["outcome"] in ("failed", "damaged"):
                where = f"{self._storage}/{event['checkpoint']}"
                warnings.warn(f"checkpoint {where} {event['outcome']}: {event['error']}", RuntimeWarning, stacklevel=3)
            if self.on_event:
                self.on_event(event)

    def _require_intact(self, name: str) -> dict[str, FileRecord]:
        if self._verified and self._verified[0] == name:
            return self._verified[1]
        files, problem = self._verify(name)
        if problem is not None:
            raise ValueError(f"{self._storage}/{name}: {problem}")
        self._verified = name, files
        return files

    def _reader(self, name: str, tensors: Mapping[str, Tensor], asked: set[str] | None) -> Reader:
        """A reader of an intact checkpoint in which these tensors match, as of `_require_match`."""
        files = self._require_intact(name)
        reader: Reader | None = None

        def open_and_check() -> None:
            nonlocal reader
            reader = Reader(self._storage, name, files)
            _require_match(f"{self._storage}/{name}", reader, tensors, asked)

        self._ranks.gather(open_and_check)
        return reader

    def _free_name(self, point: str) -> str:
        """The name of a point of the run, or of its first revision that is not there yet."""
        position = retention.parse(point)
        while self._storage.exists(f"{position}/{MANIFEST}"):
            position = position._replace(revision=position.revision + 1)
        return str(position)

    def _make_folder(self, name: str) -> None:
        self._storage.remove_folder(name, MANIFEST)
        self._storage.make_folder(name)

    def _remove_leftovers(self) -> None:
        self._storage.require_writable()
        complete = self.names()
        for name in retention.by_age(self._storage.folders()):
            if name not in complete:
                self._storage.remove_folder(name, MANIFEST)

    def _list_with_pins(self) -> tuple[list[str], set[str]]:
        names = self.names()
        return names, {name for name in names if self._storage.exists(f"{name}/{PIN}")}

    def _pin(self, name: str) -> None:
        if not self._storage.exists(f"{name}/{MANIFEST}"):
            raise ValueError(f"{self._storage}: there is no checkpoint {name}")
        self._storage.publish(f"{name}/{PIN}", b"")


def read_state(storage: Storage, name: str) -> dict[str, Any]:
    """The JSON state in a checkpoint folder that was verified."""
    with storage.open(f"{name}/{STATE}", "rb") as stream:
        return json.loads(stream.read())


def _raise_if_failed(staged: Any) -> None:
    if isinstance(staged, Exception):
        raise staged


def _require_match(where: str, reader: Reader, tensors: Mapping[str, Tensor], asked: set[str] | None) -> None:
    """ValueError unless each tensor is stored with its shape and dtype, and nothing is stored that is not `asked`
    for (None allows anything)."""
    stored = reader.tensors
    if missing := sorted(tensors.keys() - stored.keys()):
        raise ValueError(f"{where} lacks {_listed(missing)}")
    if asked is not None and (extra := sorted(stored.keys() - asked)):
        raise ValueError(f"{where} holds {_listed(extra)}, for which there is no place here")
    for name, tensor in tensors.items():
        shape, dtype = stored[name].size, stored[name].properties.dtype
        if shape != tensor.shape or dtype != tensor.dtype:
            raise ValueError(
                f"{where}: tensor {name} is {dtype} {list(shape)}, expected {tensor.dtype} {list(tensor.shape)}"
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:8])}{more}"
