"""Products of groups of rows, each with a matrix of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.model.linear import product, product_over_rows


def grouped_product(x: Tensor, weights: Sequence[Tensor], ends: Tensor) -> Tensor:
    """x [n, k], whose rows up to ends[0] meet weights[0] [m, k] transposed, those from there to ends[1] the next, and
    so on: [n, m]. `ends` is int64 on x's device, and ends with n."""
    return _grouped_product(x, list(weights), ends)


@torch.library.custom_op("meristem::grouped_product", mutates_args=())
def _grouped_product(x: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    if _suits_grouped_mm(x, *weights[0].shape):
        return torch._grouped_mm(x, torch.stack(weights).transpose(1, 2), offs=ends.int())
    return torch.cat([product(rows, weight) for rows, weight in zip(_groups(x, ends), weights, strict=True)])


@_grouped_product.register_fake
def _(x: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights[0].shape[0])


@torch.library.custom_op("meristem::products_over_rows", mutates_args=())
def _products_over_rows(a: Tensor, b: Tensor, ends: Tensor) -> list[Tensor]:
    pairs = zip(_groups(a, ends), _groups(b, ends), strict=True)
    return [product_over_rows(*pair).contiguous() for pair in pairs]


@_products_over_rows.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> list[Tensor]:
    return [a.new_empty(a.shape[1], b.shape[1]) for _ in range(ends.shape[0])]


def _grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> list[Tensor]:
    """a [n, m] transposed times b [n, k] for each group of rows: [m, k] each."""
    if _suits_grouped_mm(a, a.shape[1], b.shape[1]):
        return list(torch._grouped_mm(a.t(), b, offs=ends.int()).unbind())
    return _products_over_rows(a, b, ends)


def _save(ctx, inputs: tuple[Tensor, list[Tensor], Tensor], output: Tensor) -> None:
    x, weights, ends = inputs
    ctx.save_for_backward(x, ends, *weights)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, list[Tensor], None]:
    x, ends, *weights = ctx.saved_tensors
    grad = grad.contiguous()
    by_input = _grouped_product(grad, [weight.t() for weight in weights], ends)
    return by_input, _grouped_outer(grad, x, ends), None


_grouped_product.register_autograd(_backward, setup_context=_save)


def _groups(x: Tensor, ends: Tensor) -> list[Tensor]:
    stops = ends.tolist()
    return [x[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def _suits_grouped_mm(x: Tensor, *widths: int) -> bool:
    """torch's kernel is for bf16 on a GPU, with rows of multiples of 16 bytes."""
    return x.is_cuda and x.dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)
