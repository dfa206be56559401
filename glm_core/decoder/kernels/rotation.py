"""Queries and keys of every head normalised and rotated, in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..embeddings import Rope
from ..operations import EPS
from .modulation import warps


def norm_rotate(q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """`operations.norm_rotate`"""
    batch, length, heads, width = q.shape
    q, k = q.contiguous(), k.contiguous()
    cos, sin = (table.contiguous() for table in rope)
    outs = torch.empty_like(q), torch.empty_like(k)
    _norm_rotate_kernel[(batch * length, 2)](
        q, k, cos, sin, *outs, length, EPS,
        HEADS=heads, ROWS=triton.next_power_of_2(heads), WIDTH=width,
        BLOCK=triton.next_power_of_2(width), numwarps=warps(heads * width),
    )  # fmt: skip
    return outs


@triton.jit(do_not_specialize=["length"])  # else it is compiled for every kind of prompt
def _norm_rotate_kernel(
    q, k, cos, sin, q_out, k_out, length, eps,
    HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, feature = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS) & (feature < WIDTH)
    pair = tl.where(feature < WIDTH // 2, feature + WIDTH // 2, feature - WIDTH // 2)
    at = (row * HEADS + head) * WIDTH
    table = row % length * WIDTH + feature
    cosine = tl.load(cos + table, mask=feature < WIDTH, other=0.0)
    sine = tl.load(sin + table, mask=feature < WIDTH, other=0.0)
    if tl.program_id(1) == 0:
        _norm_rotate(q, q_out, at, feature, pair, inside, cosine, sine, eps, WIDTH)
    else:
        _norm_rotate(k, k_out, at, feature, pair, inside, cosine, sine, eps, WIDTH)


@triton.jit
def _norm_rotate(source, target, at, feature, pair, inside, cosine, sine, eps, WIDTH: tl.constexpr):
    """The second load is of the same lines, so it comes from the cache."""
    dtype = target.dtype.element_ty
    value = tl.load(source + at + feature, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source + at + pair, mask=inside, other=0.0).to(tl.float32)
    mean = (tl.sum(value, axis=1) / WIDTH)[:, None]
    value, other = tl.where(inside, value - mean, 0.0), other - mean
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)[:, None]
    value = (value * scale).to(dtype).to(tl.float32)
    other = (other * scale).to(dtype).to(tl.float32)
    tl.store(target + at + feature, (value * cosine + other * sine).to(dtype), mask=inside)
