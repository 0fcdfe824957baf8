"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34) in the half-rotation layout."""

import torch
from torch import Tensor


def rotary_table(
    start: int, length: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, head_dim] of positions start .. start + length - 1, each half of the columns the same.

    The angles are computed in float64, so the table's only error is its own rounding. At least float32 is returned.
    """
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
    positions = torch.arange(start, start + length, device=device, dtype=torch.float64)
    angles = torch.outer(positions, theta**-exponents).repeat(1, 2)
    dtype = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_dim / 2) of x [b, s, heads, head_dim] by the angles of `rotary_table`.

    These pairs are Hugging Face's, so that its checkpoints map without a permutation. The arithmetic is in the
    table's precision, the result in x's.
    """
    return _Rotate.apply(x, cos.unsqueeze(1), sin.unsqueeze(1))


class _Rotate(torch.autograd.Function):
    """Two passes over x instead of autograd's five, and as many backward: the inverse turn."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):
        return _turned(grad, *ctx.saved_tensors, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = x.shape[-1] // 2
    sin = sin[..., :half]
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin, value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin, value=direction)
    return out.to(x.dtype)
