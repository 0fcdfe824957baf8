"""Bias-free linear layers, with oneDNN's matrix product for float32 on a CPU with AVX-512.

torch's own float32 product on a CPU is MKL's, which takes narrow vector paths on processors that are not Intel's. On an
AMD EPYC with AVX-512 oneDNN's does 220 GFLOP/s a core where MKL's does 100 (2048 x 256 x 688). On one that has AVX2
alone both are as fast at that size, and MKL's is 1.3 times as fast over a step of narrow layers. oneDNN's is wrapped as
an operator of its own so that it differentiates and compiles; everything else (other dtypes, GPUs, distributed tensors,
a few rows) takes torch's.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_PREFERS_ONEDNN = _HAS_ONEDNN and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
_FEWEST_ROWS = 16
"""Below this, oneDNN's preparations cost more than they save."""


# `torch.library.custom_op` would load torch's compiler at the first call.
_LIBRARY = torch.library.Library("meristem", "DEF")
_LIBRARY.define("product(Tensor a, Tensor b) -> Tensor")
_product = torch.ops.meristem.product.default


@torch.library.impl(_LIBRARY, "product", "CPU")
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


@torch.library.register_fake("meristem::product", lib=_LIBRARY)
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


def _save(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    a, b = inputs
    needs_a, needs_b, *_ = ctx.needs_input_grad
    ctx.save_for_backward(a if needs_b else None, b if needs_a else None)  # a frozen layer keeps no activations


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    needs_a, needs_b = ctx.needs_input_grad
    return _product(grad, b.t()) if needs_a else None, _product_over_rows(grad, a).contiguous() if needs_b else None


torch.library.register_autograd("meristem::product", _backward, setup_context=_save, lib=_LIBRARY)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] times b [m, k] transposed: [n, m], differentiable."""
    return _product(a, b) if _suits_onednn(a, b) else F.linear(a, b)


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """a [n, m] transposed times b [n, k]: [m, k], summed over the rows. Its columns may be what is contiguous."""
    return _product_over_rows(a, b) if _suits_onednn(a, b) else a.t() @ b


def _product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[1] > b.shape[1]:  # oneDNN is faster with the longer side last
        return _product(b.t(), a.t()).t()
    return _product(a.t(), b.t())


def zero_sum(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros like a weight [m, k] to add what `product_over_rows` gives to, in the order that this has in memory."""
    if _suits_onednn(weight, weight) and weight.shape[0] > weight.shape[1]:
        return weight.new_zeros(weight.shape[::-1], dtype=dtype).t()
    return torch.zeros_like(weight, dtype=dtype)


def _suits_onednn(a: Tensor, b: Tensor) -> bool:
    plain = type(a) in (Tensor, nn.Parameter) and type(b) in (Tensor, nn.Parameter)
    return _PREFERS_ONEDNN and plain and a.is_cpu and a.dtype == b.dtype == torch.float32 and a.shape[0] >= _FEWEST_ROWS


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k] times weight [m, k] transposed."""
    if type(x) is not Tensor or not x.is_cpu:
        return F.linear(x, weight)
    return product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


class Delta(NamedTuple):
    """A change of a linear layer: `out` [m, rank] times `into` [rank, k], or without `into` the inputs' sums over the
    groups of equal index mod rank."""

    into: Tensor | None
    out: Tensor


def narrowed(x: Tensor, delta: Delta, first: int = 0) -> Tensor:
    """x [..., k] to [..., rank]; of a layer's inputs these are k from number `first`."""
    if delta.into is not None:
        return linear(x, delta.into)
    rank = delta.out.shape[1]
    before = first % rank
    after = -(before + x.shape[-1]) % rank
    if before or after:
        x = F.pad(x, (before, after))
    return x.unflatten(-1, (-1, rank)).sum(-2)


class _Unfilled:
    """A layer that draws no first values on the meta device, where torch would load its compiler for them."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(_Unfilled, nn.Embedding):
    """A table of vectors."""


class Linear(_Unfilled, nn.Linear):
    """A linear layer without a bias."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor, delta: Delta | None = None) -> Tensor:
        """`delta` is added to the weight."""
        y = linear(x, self.weight)
        return y if delta is None else y + linear(narrowed(x, delta), delta.out)
