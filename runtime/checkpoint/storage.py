"""Where checkpoints lie: a folder, or any fsspec URL. Paths are relative to the location, with "/"."""

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol


class Storage(Protocol):
    """What the store asks of a place.

    `open(path, "wb")` leaves the bytes durable when the block ends well. `publish` makes a small file appear
    whole or not at all. `remove_folder(folder, first)` removes the file `first` before anything else of it.
    `require_writable` raises ValueError where it is known, without a trial, that nothing can be written.
    """

    def require_writable(self) -> None: ...
    def folders(self) -> list[str]: ...
    def exists(self, path: str) -> bool: ...
    def size(self, path: str) -> int: ...
    def make_folder(self, folder: str) -> None: ...
    def open(self, path: str, mode: str) -> Any: ...
    def publish(self, path: str, data: bytes) -> None: ...
    def sync(self, folder: str) -> None: ...
    def move(self, source: str, target: str) -> None: ...
    def remove(self, path: str) -> None: ...
    def remove_folder(self, folder: str, first: str) -> None: ...


def open_storage(location: str | os.PathLike[str]) -> Storage:
    """The storage at a folder or an fsspec URL (``file://`` is a folder). Touches nothing.

    ValueError if the location is a file, or a URL of an unknown or uninstalled protocol.
    """
    location = os.fspath(location)
    if location.startswith("file://"):
        location = location.removeprefix("file://")
    return RemoteStorage(location) if "://" in location else LocalStorage(Path(location))


class LocalStorage:
    """A folder of a POSIX file system: data and names are fsynced, small files appear by rename."""

    def __init__(self, root: Path) -> None:
        if root.exists() and not root.is_dir():
            raise ValueError(f"{root} is a file; checkpoints lie in a folder")
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def require_writable(self) -> None:
        existing = next(place for place in (self.root, *self.root.absolute().parents) if place.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"checkpoints cannot be written to {self.root}: {existing} is no folder one may write to")

    def folders(self) -> list[str]:
        if not self.root.exists():
            return []
        return [entry.name for entry in os.scandir(self.root) if entry.is_dir()]

    def exists(self, path: str) -> bool:
        return (self.root / path).exists()

    def size(self, path: str) -> int:
        return (self.root / path).stat().st_size

    def make_folder(self, folder: str) -> None:
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        self.sync("")

    @contextmanager
    def open(self, path: str, mode: str) -> Iterator[IO[bytes]]:
        with open(self.root / path, mode) as stream:
            yield stream
            if "w" in mode:
                stream.flush()
                os.fsync(stream.fileno())

    def publish(self, path: str, data: bytes) -> None:
        temporary = f"{path}.tmp"
        with self.open(temporary, "wb") as stream:
            stream.write(data)
        self.move(temporary, path)
        self.sync(str(Path(path).parent))

    def sync(self, folder: str) -> None:
        descriptor = os.open(self.root / folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def move(self, source: str, target: str) -> None:
        os.replace(self.root / source, self.root / target)

    def remove(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def remove_folder(self, folder: str, first: str) -> None:
        if not self.exists(folder):
            return
        if self.exists(f"{folder}/{first}"):
            self.remove(f"{folder}/{first}")
            self.sync(folder)
        shutil.rmtree(self.root / folder, ignore_errors=True)  # what an NFS client still holds open stays, invisible
        self.sync("")


class RemoteStorage:
    """An object store through fsspec: an object appears whole when it is closed, and nothing is renamed."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self.filesystem, self.root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"cannot open {url}: {error}") from None
        self.url = url

    def __str__(self) -> str:
        return self.url

    def require_writable(self) -> None:
        """Only a trial would tell, and opening a place writes nothing."""

    def _path(self, path: str) -> str:
        return f"{self.root.rstrip('/')}/{path}" if path else self.root

    def folders(self) -> list[str]:
        self.filesystem.invalidate_cache()
        try:
            entries = self.filesystem.ls(self.root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory"]

    def exists(self, path: str) -> bool:
        self.filesystem.invalidate_cache()
        return self.filesystem.exists(self._path(path))

    def size(self, path: str) -> int:
        return self.filesystem.size(self._path(path))

    def make_folder(self, folder: str) -> None:
        self.filesystem.makedirs(self._path(folder), exist_ok=True)

    @contextmanager
    def open(self, path: str, mode: str) -> Iterator[io.IOBase]:
        with self.filesystem.open(self._path(path), mode) as stream:
            yield stream

    def publish(self, path: str, data: bytes) -> None:
        self.filesystem.pipe_file(self._path(path), data)

    def sync(self, folder: str) -> None:
        """Nothing to do: a closed object is durable."""

    def move(self, source: str, target: str) -> None:
        self.filesystem.copy(self._path(source), self._path(target))
        self.remove(source)

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.rm_file(self._path(path))

    def remove_folder(self, folder: str, first: str) -> None:
        self.remove(f"{folder}/{first}")
        with suppress(FileNotFoundError):
            self.filesystem.rm(self._path(folder), recursive=True)
