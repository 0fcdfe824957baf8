"""An accelerator without a device: tensors that have a device and no data, to find what only a GPU would refuse.

An operation on tensors of two devices raises, and so does any that the host would have to wait for. What asks `is_cuda`
takes it for a GPU. It cannot be taken out of a process again: `install` it in one of its own.
"""

from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._subclasses import FakeTensor, FakeTensorMode, fake_impls, fake_tensor
from torch.utils import backend_registration

from runtime.optim import ages

NAME = "phantom"


class _Stream:
    """Of a device on which everything has happened already; an event as well."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record_event(self, *_: object) -> "_Stream":
        return self

    def _nothing(self, *_: object) -> None:
        pass

    wait_stream = wait_event = record = wait = synchronize = _nothing


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of `torch.cuda`, under another name."""

    Stream = Event = current_stream = _Stream

    def stream(self, stream: _Stream) -> _Stream:
        return stream

    def device(self, *_: object) -> nullcontext[None]:
        return nullcontext()

    def set_device(self, *_: object) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def is_available(self) -> bool:
        return True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def install(*, reads: bool = False) -> FakeTensorMode:
    """Make `torch.device(NAME)` the accelerator; what is made on the host stays real. With `reads` the host may wait
    for what it computes, and reads numbers without a meaning. Returns the mode that its tensors are of."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    library = torch.library.Library("aten", "IMPL")

    def empty(size: list[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return FakeTensor(mode, torch.empty(size, dtype=dtype, device="meta"), torch.device(NAME, 0))

    def empty_strided(size: list[int], stride: list[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return FakeTensor(mode, torch.empty_strided(size, stride, dtype=dtype, device="meta"), torch.device(NAME, 0))

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    mode.library = library  # which undoes it when it is freed
    fake_tensor.run_fallback_kernel = _in_place
    if reads:
        fake_impls.op_implementations_dict |= READS
    else:
        _refuse_waits()
    ages._CHUNK[NAME] = ages._CHUNK["cuda"]
    torch.Tensor.is_cuda = property(lambda self: self.device.type == NAME)
    return mode


def _number(mode: FakeTensorMode, operator: Any, tensor: Tensor) -> bool | int | float:
    return {torch.bool: False, torch.float64: 1.0}.get(tensor.dtype, 0.0 if tensor.is_floating_point() else 0)


def _everywhere(mode: FakeTensorMode, operator: Any, tensor: Tensor) -> Tensor:
    return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.int64)


READS = {
    torch.ops.aten._local_scalar_dense.default: _number,
    torch.ops.aten.nonzero.default: _everywhere,
}
"""What the host reads of the accelerator's tensors: ones of float64, else zeros; and no entry of a mask is left out."""


def _refuse_waits() -> None:
    """Refuse copies to the host, which fake tensors allow. Numbers and shapes that depend on values they refuse."""
    copy, copied = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default
    decompose = decomposition_table[copy]

    @wraps(decompose)
    def copy_elsewhere(tensor: Tensor, **options: Any) -> Tensor:
        to_host = options.get("device") is not None and torch.device(options["device"]).type == "cpu"
        assert not (to_host and tensor.device.type == NAME), "the host would wait"
        return decompose(tensor, **options)

    def copy_into(_: FakeTensorMode, __: Any, target: Tensor, source: Tensor, *___: Any, **____: Any) -> Any:
        assert target.device.type != "cpu" or source.device.type != NAME, "the host would wait"
        return NotImplemented

    decomposition_table[copy] = copy_elsewhere
    fake_impls.op_implementations_dict[copied] = copy_into


FUSED: list[str] = []
"""The fused optimizers that have run on it."""


def _in_place(mode: FakeTensorMode, operator: Any, arguments: list[Any], *_: Any) -> None:
    """The fused optimizers, which fake tensors know no shapes of. Everything they take is on one device."""
    assert "_fused_" in str(operator), f"{operator} has no fake kernel"
    FUSED.append(str(operator))
    elsewhere = [each for each in arguments if isinstance(each, Tensor) and each.device.type != NAME]
    assert not elsewhere, f"{operator} mixes devices: {elsewhere}"
