"""`launch.pretrain` as it would run on a GPU, on tensors without data: `python -m tests.phantom_launch CONFIG ...`."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import _create_fake_pg

from launch import pretrain
from runtime import session
from runtime.checkpoint.staging import Staging
from runtime.parallel.mesh import Layout, Mesh, build
from tests import accelerator


def disguise() -> None:
    """What torch asks a GPU, and the two places where the runtime asks whether there is one: the backend of collectives
    and the device of a mesh. Host memory is not pinned."""
    accelerator.install(reads=True)
    torch.cuda.current_stream = lambda *_: accelerator._Stream()
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    dist.Backend.register_backend("nothing", _create_fake_pg, extended_api=True, devices=[accelerator.NAME])
    initialize = dist.init_process_group

    def init_process_group(_: str, **options: Any) -> None:
        initialize(f"cpu:gloo,{accelerator.NAME}:nothing", **options)

    def build_on_accelerator(layout: Layout, _: str) -> Mesh:
        return build(layout, accelerator.NAME)

    def buffer(self: Staging, _: str, local: Tensor) -> Tensor:
        return torch.empty(local.shape, dtype=local.dtype)

    dist.init_process_group, session.build, Staging._buffer = init_process_group, build_on_accelerator, buffer


if __name__ == "__main__":
    disguise()
    code = pretrain.main(sys.argv[1:])
    assert accelerator.FUSED, "no optimizer has run on the accelerator"
    sys.exit(code)
