"""Residual add and two RMSNorms in one pass over a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from .. import operations
from .in_place import is_in_place


def add_norm(
    x: Tensor, y: Tensor, after: nn.Module, following: nn.Module | None
) -> tuple[Tensor, Tensor | None]:
    """`operations.add_norm`. Weights that a host fetches or patches as it runs are left to it."""
    norms = [norm for norm in (after, following) if norm is not None]
    if not all(is_in_place(norm, x.device) for norm in norms):
        return operations.add_norm(x, y, after, following)
    width = x.shape[-1]
    x, y, out = x.contiguous(), y.contiguous(), torch.empty_like(x)
    normed = None if following is None else torch.empty_like(x)
    last = after if following is None else following
    _add_norm_kernel[(x.numel() // width,)](
        x, y, after.weight, last.weight, out, out if normed is None else normed,
        after.eps, last.eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), NORMS=len(norms),
        num_warps=8 if width > 2048 else 4,
    )  # fmt: skip
    return out, normed


@triton.jit
def _add_norm_kernel(
    x, y, after, following, out, normed, after_eps, following_eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + columns
    dtype = out.dtype.element_ty
    value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + after_eps)
    weight = tl.load(after + columns, mask=inside, other=0.0).to(dtype).to(tl.float32)
    value = (value * scale * weight).to(dtype).to(tl.float32)
    value = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + value).to(dtype)
    tl.store(out + at, value, mask=inside)
    if NORMS == 2:
        value = value.to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + following_eps)
        weight = tl.load(following + columns, mask=inside, other=0.0).to(dtype).to(tl.float32)
        tl.store(normed + at, (value * scale * weight).to(dtype), mask=inside)
