"""The seam to torch.distributed.checkpoint: its file format, planners, writer and reader over our storage.

DCP's `save` and `load` are its protocol (plan, write or read, finish) around collectives. `write` and
`Reader.load` run the same protocol with our agreement on failures, and without a process group too.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    LoadPlanner,
    SavePlan,
)
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.futures import Future

from runtime.checkpoint.manifest import Checksum, FileRecord
from runtime.checkpoint.pickle_guard import load_metadata
from runtime.checkpoint.ranks import Ranks
from runtime.checkpoint.storage import Storage

METADATA = ".metadata"


@dataclass(frozen=True)
class Shard:
    """This rank's part of a tensor: `local` is the box of that size at `offsets` in a tensor of size `shape`."""

    local: Tensor
    offsets: torch.Size
    shape: torch.Size

    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(self.offsets, self.local.shape)


def local_shard(tensor: Tensor) -> Shard:
    """The shard of a DTensor, or the whole of a plain tensor, without a copy."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Shard(tensor, torch.Size([0] * tensor.dim()), tensor.shape)
    assert not any(placement.is_partial() for placement in tensor.placements), "a partial tensor has no shards"
    local = tensor.to_local()
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(sizes) == tuple(local.shape), f"a shard of {list(local.shape)} where {list(sizes)} was planned"
    return Shard(local, torch.Size(offsets), tensor.shape)


class _SavePlanner(DefaultSavePlanner):
    """Writes `Shard`s; DCP spreads what several ranks hold over those ranks, and checks that all is covered."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        stored = {
            name: shard for name, shard in self.state_dict.items() if shard.local.numel() or not prod(shard.shape)
        }
        self.plan = SavePlan([_write_item(name, shard) for name, shard in stored.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


def _write_item(name: str, shard: Shard) -> WriteItem:
    properties = TensorProperties(dtype=shard.local.dtype)
    data = TensorWriteData(chunk=shard.chunk(), properties=properties, size=shard.shape)
    return WriteItem(index=MetadataIndex(name, shard.offsets), type=WriteItemType.SHARD, tensor_data=data)


class _LoadPlanner(LoadPlanner):
    """Fills `Shard`s in place from whichever stored boxes overlap them."""

    def set_up_planner(
        self, state_dict: Mapping[str, Shard], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.shards, self.metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        stored = self.metadata.state_dict_metadata
        items = [create_read_items_for_chunk_list(n, stored[n], [shard.chunk()]) for n, shard in self.shards.items()]
        return LoadPlan([item for each in items for item in each])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        return new_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("tensors only; Reader.metadata refuses anything else")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.shards[read_item.dest_index.fqn].local
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the tensor is a view of its target."""


class _Files(FileSystemBase):
    """DCP's view of a storage. Keeps the record of every file written through it, by name."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with self.storage.open(str(path), mode) as stream:
            if "w" not in mode:
                yield stream
                return
            checked = _CheckedStream(stream)
            yield checked
        self.records[_base(path)] = checked.checksum.record()

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return f"{path}/{suffix}"

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        self.storage.move(str(path), str(new_path))
        self.records[_base(new_path)] = self.records.pop(_base(path))

    def init_path(self, path: str | os.PathLike) -> str:
        return str(path)

    def mkdir(self, path: str | os.PathLike) -> None:
        self.storage.make_folder(str(path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def exists(self, path: str | os.PathLike) -> bool:
        return self.storage.exists(str(path))

    def rm_file(self, path: str | os.PathLike) -> None:
        self.storage.remove(str(path))


class _CheckedStream:
    """A stream being written, with the checksum of what went into it."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.checksum = Checksum()

    def write(self, data: Any) -> int:
        self.checksum.update(data)
        return self.raw.write(data)

    def tell(self) -> int:
        return self.raw.tell()

    def flush(self) -> None:
        self.raw.flush()

    def close(self) -> None:
        """Left to the storage, which has to fsync first."""


class _Writer(FileSystemWriter):
    def __init__(self, storage: Storage, folder: str) -> None:
        # Copying ahead would touch the GPU from this thread; the shards are in host memory already.
        super().__init__(folder, sync_files=False, per_thread_copy_ahead=0)
        self.fs = _Files(storage)
        self.path = folder

    def write_data(self, plan: SavePlan, planner: DefaultSavePlanner) -> Future[list[WriteResult]]:
        if plan.items:
            return super().write_data(plan, planner)
        nothing: Future[list[WriteResult]] = Future()
        nothing.set_result([])
        return nothing


def write(storage: Storage, folder: str, shards: Mapping[str, Shard], ranks: Ranks) -> dict[str, FileRecord]:
    """Write shards in host memory as a DCP checkpoint, metadata last; the records of the files this rank wrote.

    A collective over `ranks`: raises on every rank if one of them fails. Every file is durable on return.
    """
    planner, writer = _SavePlanner(), _Writer(storage, folder)
    planner.set_up_planner(dict(shards), is_coordinator=ranks.is_first)
    writer.set_up_storage_writer(ranks.is_first)
    local_plans = ranks.gather(lambda: writer.prepare_local_plan(planner.create_local_plan()))
    metadata: Metadata | None = None

    def plan_globally() -> list[SavePlan]:
        nonlocal metadata
        plans, metadata = planner.create_global_plan(local_plans)
        return writer.prepare_global_plan(plans)

    plan = ranks.scatter(plan_globally)
    results = ranks.gather(lambda: writer.write_data(planner.finish_plan(plan), planner).wait())
    ranks.broadcast(lambda: writer.finish(metadata, results))
    return writer.fs.records


class Reader:
    """The tensors of a DCP checkpoint folder. ValueError if its metadata is not one of tensors only."""

    def __init__(self, storage: Storage, folder: str, files: Mapping[str, FileRecord]) -> None:
        self._reader = FileSystemReader(folder)
        self._reader.fs = _Files(storage)
        self._reader.path = folder
        self._where = f"{storage}/{folder}"
        where = f"{self._where}/{METADATA}"
        with storage.open(f"{folder}/{METADATA}", "rb") as stream:
            self.metadata = load_metadata(stream.read(), where)
        try:
            _check(self.metadata, files)
        except (ValueError, TypeError, AttributeError) as error:  # a forged one may hold any types
            raise ValueError(f"{where} is refused: {error}") from None
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Size, dtype and stored boxes of each tensor, by name."""
        return self.metadata.state_dict_metadata

    def load(self, shards: Mapping[str, Shard]) -> None:
        """Fill the shards in place, each wholly; of every stored tensor only what a shard overlaps is read."""
        planner = _LoadPlanner()
        planner.set_up_planner(shards, self.metadata)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except (RuntimeError, KeyError, EOFError, UnpicklingError) as error:
            raise ValueError(f"{self._where} cannot be read: {error}") from error


def _check(metadata: Metadata, files: Mapping[str, FileRecord]) -> None:
    """ValueError unless all that the metadata lists are tensors, wholly stored in files of the manifest."""
    for name, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"{name} is no tensor")
        if sum(prod(chunk.sizes) for chunk in stored.chunks) != prod(stored.size):
            raise ValueError(f"{name} is not wholly stored")
    for index, place in metadata.storage_data.items():
        if place.relative_path not in files:
            raise ValueError(f"{index.fqn} lies in {place.relative_path}, which is not in the manifest")


def _base(path: str | os.PathLike) -> str:
    return str(path).rsplit("/", 1)[-1]
