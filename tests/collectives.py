"""Records the collectives that a step issues: what kind, over which axes of the mesh, and how many bytes."""

from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.parallel.mesh import AXES, Mesh

WHOLE = {
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::allreduce_": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", "result"),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
}
"""Kind of a collective by its operator, and where the whole tensor is: an argument, or what is returned."""
NO_TRAFFIC = ("wait_tensor", "_wrap_tensor_autograd")


class Recorder(TorchDispatchMode):
    """Counts (kind, axes) and bytes of the whole tensors of the collectives of a mesh, those of one rank alone left
    out. AssertionError for a collective it does not know."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.axes = dict(axes_by_ranks(mesh))
        self.calls: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.bytes: Counter[tuple[str, tuple[str, ...]]] = Counter()

    @property
    def totals(self) -> dict[tuple[str, tuple[str, ...]], tuple[int, int]]:
        """(calls, bytes) of each kind over each group of axes."""
        return {key: (self.calls[key], self.bytes[key]) for key in self.calls}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # the operators on its shards come by in turn
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and not func.name().endswith(NO_TRAFFIC):
            assert func.name() in WHOLE, f"{func.name()} is a collective that is not counted"
            kind, place = WHOLE[func.name()]
            whole = result if place == "result" else args[place]
            ranks = tuple(dist.get_process_group_ranks(_group(func.namespace, args)))
            if len(ranks) > 1:
                entry = kind, self.axes[ranks]
                tensors = whole if isinstance(whole, list | tuple) else [whole]
                self.calls[entry] += 1
                self.bytes[entry] += sum(each.nbytes for each in tensors)
        return result


def axes_by_ranks(mesh: Mesh) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
    """For each set of axes of more than one rank, this rank's group along them."""
    ranks, here = mesh.device_mesh.mesh, mesh.device_mesh.get_coordinate()
    for chosen in product((False, True), repeat=len(AXES)):
        index = tuple(slice(None) if each else at for each, at in zip(chosen, here, strict=True))
        axes = tuple(axis for axis, each, size in zip(AXES, chosen, ranks.shape, strict=True) if each and size > 1)
        yield tuple(sorted(ranks[index].flatten().tolist())), axes


def _group(namespace: str, args: tuple) -> dist.ProcessGroup:
    if namespace == "c10d":
        (boxed,) = (each for each in args if isinstance(each, torch.ScriptObject) and _is_group(each))
        return dist.ProcessGroup.unbox(boxed)
    return dist.distributed_c10d._resolve_process_group(args[-1])


def _is_group(each: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(each._type())
