"""Safetensors files, one or several with an index, as Hugging Face lays them out."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.checkpoint.interchange import read_json, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of open safetensors files, read on access."""

    def __init__(self, files: dict[str, Any]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor from its file's header, or None if there is no such tensor."""
        return tuple(self._files[name].get_slice(name).get_shape()) if name in self._files else None


def open_shards(folder: Path, stack: ExitStack) -> LazyTensors:
    """Open every weight file of a folder until `stack` closes.

    Headers, sizes and the index are checked before any tensor is read: ValueError names the damaged file.
    """
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")
        only = _open(folder / SINGLE, stack)
        return LazyTensors(dict.fromkeys(only.keys(), only))
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{folder / INDEX}: weight_map is not an object of file names")
    files = sorted(set(weight_map.values()))
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"{folder / INDEX}: weight_map names {file!r}, which is not a file of this folder")
    opened = {file: _open(folder / file, stack) for file in files}
    held = {file: set(handle.keys()) for file, handle in opened.items()}
    for tensor, file in weight_map.items():
        if tensor not in held[file]:
            raise ValueError(f"{folder / file}: tensor {tensor} is missing, though {INDEX} places it there")
    return LazyTensors({tensor: opened[file] for tensor, file in weight_map.items()})


def _open(path: Path, stack: ExitStack) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing, or not a file")
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not an intact safetensors file: {error}") from None


def write_shards(tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """Write tensors as `dtype`, in files of at most `shard_bytes` each (or one tensor), with an index if several."""
    shards = _divide(tensors, dtype, shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        # Cloned because safetensors refuses views that share a storage.
        shard = {name: tensors[name].to(dtype).clone(memory_format=torch.contiguous_format) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # it writes them readable by their owner alone
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _divide(tensors: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
