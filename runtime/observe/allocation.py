"""Counts the bytes of live tensor storages while a program runs, on real or on fake tensors."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PARAMETERS, GRADIENTS, OPTIMIZER, EMA = "parameters", "gradients", "optimizer", "ema"
GATHERED, ACTIVATIONS, LOGITS = "gathered", "activations", "logits"
KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER, EMA, GATHERED, ACTIVATIONS, LOGITS)

# What the operators of FSDP's collectives handle: buffers of whole parameters, gradients to be sharded.
_FSDP_OPERATORS = {
    "fsdp::all_gather_copy_in": GATHERED,
    "fsdp::split_with_sizes_copy": GATHERED,
    "fsdp::chunk_cat": GRADIENTS,
    "c10d::_reduce_scatter_base_": GRADIENTS,
}
_COPIES = {"aten::_to_copy": 0, "aten::copy_": 1}
"""Operators that copy the tensor at a place of their arguments."""


class AllocationTracker(TorchDispatchMode):
    """Follows every storage that an operator returns, from its birth to its release.

    A storage has the kind that is current at its birth (`kind`, a context; `ACTIVATIONS` by default) until
    an FSDP operator shows it to be something else. `adopt` enters tensors that were there before, or gives
    them another kind. Under `fake_mode` only its own tensors are counted, so that those of DTensor's shape
    propagation, which have global sizes, are not.
    """

    def __init__(self, fake_mode: FakeTensorMode | None = None):
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        """Bytes by kind at the moment of the largest total."""
        self._highest = 0
        self._fake_mode = fake_mode
        self._current = ACTIVATIONS
        self._entries: dict[int, tuple[str, int, weakref.ref]] = {}
        self._gathered: set[int] = set()

    @contextmanager
    def kind(self, kind: str) -> Iterator[None]:
        previous, self._current = self._current, kind
        try:
            yield
        finally:
            self._current = previous

    def adopt(self, tensor: Tensor, kind: str) -> None:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        self._enter(local, kind)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # the operators on its shards come by in turn
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "prim":  # asks a fake tensor for its device
            return result
        for tensor in tree_leaves(result):
            if self._is_counted(tensor) and _key(tensor) not in self._entries:
                self._enter(tensor, self._current)
        self._recognise(func.name().partition(".")[0], args, kwargs, result)
        self._note_resized()
        total = sum(self.live.values())
        if total > self._highest:
            self._highest, self.peak = total, self.live.copy()
        return result

    def _is_counted(self, value: object) -> bool:
        if not isinstance(value, Tensor) or value.device.type == "meta":
            return False
        return self._fake_mode is None or (isinstance(value, FakeTensor) and value.fake_mode is self._fake_mode)

    def _recognise(self, operator: str, args: tuple, kwargs: dict, result: object) -> None:
        kind = _FSDP_OPERATORS.get(operator)
        if kind is not None:
            tensors = tree_leaves((args, kwargs))
        elif operator in _COPIES and self._kind_of(args[_COPIES[operator]]) in (PARAMETERS, GATHERED):
            kind, tensors = GATHERED, [result]  # one rank gathers by copying its shard
        else:
            return
        for tensor in tensors:
            if self._is_counted(tensor) and self._kind_of(tensor) == ACTIVATIONS:
                self._enter(tensor, kind)

    def _kind_of(self, tensor: Tensor) -> str:
        return self._entries.get(_key(tensor), (ACTIVATIONS, 0, None))[0]

    def _enter(self, tensor: Tensor, kind: str) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        self._leave(key)
        self._entries[key] = (kind, storage.nbytes(), weakref.ref(storage, lambda _: self._leave(key)))
        self.live[kind] += storage.nbytes()
        if kind == GATHERED:
            self._gathered.add(key)

    def _leave(self, key: int) -> None:
        kind, size, _ = self._entries.pop(key, (ACTIVATIONS, 0, None))
        self.live[kind] -= size
        self._gathered.discard(key)

    def _note_resized(self) -> None:
        """FSDP frees and refills gathered parameters by resizing their storages, which no operator shows."""
        for key in self._gathered:
            _, size, reference = self._entries[key]
            storage = reference()
            if storage is not None and storage.nbytes() != size:
                self._entries[key] = (GATHERED, storage.nbytes(), reference)
                self.live[GATHERED] += storage.nbytes() - size


def _key(tensor: Tensor) -> int:
    return torch._C._storage_id(tensor)
