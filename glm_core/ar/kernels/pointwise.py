"""Rotation with the writes into the cache, and the MLP's gate, each in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operations import Rotation

GATE_BLOCK = 512


def rotate_write(
    q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, layer: Tensor, position: Tensor
) -> Tensor:
    """`operations.rotate_write`: one program for every head of queries, keys and values."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    cos, sin = rotation.cos, rotation.sin  # of each sample, or one for all
    rope_batch = cos.stride(0) if cos.ndim == 4 and cos.shape[0] > 1 else 0
    out = torch.empty_like(q)
    _rotate_write_kernel[(batch * length, heads + 2 * kv_heads)](
        q, k, v, cos, sin, out, layer, position, *layer.stride()[:4], rope_batch, cos.stride(-3),
        length,
        HEADS=heads, KV_HEADS=kv_heads, HALF=rotation.width // 2, WIDTH=head_dim,
        BLOCK=triton.next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _rotate_write_kernel(
    q, k, v, cos, sin, out, layer, position, kind_stride, batch_stride, head_stride, row_stride,
    rope_batch, rope_row, length,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    step = row % length
    feature = tl.arange(0, BLOCK)
    inside = feature < WIDTH
    kv_head = (head - HEADS) % KV_HEADS
    cached = (row // length) * batch_stride + kv_head * head_stride
    cached = cached + tl.load(position + step) * row_stride + feature
    kv_row = (row * KV_HEADS + kv_head) * WIDTH
    if head >= HEADS + KV_HEADS:
        copied = tl.load(v + kv_row + feature, mask=inside)
        tl.store(layer + kind_stride + cached, copied, mask=inside)
    else:
        turn = (row // length) * rope_batch + step * rope_row + feature
        cosine = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
        if head < HEADS:
            source, target = q + (row * HEADS + head) * WIDTH, out + (row * HEADS + head) * WIDTH
            rotated = _rotated(source, feature, inside, cosine, sine, HALF)
            tl.store(target + feature, rotated, mask=inside)
        else:
            rotated = _rotated(k + kv_row, feature, inside, cosine, sine, HALF)
            tl.store(layer + cached, rotated, mask=inside)


@triton.jit
def _rotated(source, feature, inside, cosine, sine, HALF: tl.constexpr):
    """The pair of feature i is i + HALF, and the other way round."""
    pair = tl.where(feature < HALF, feature + HALF, feature - HALF)
    pair = tl.where(feature < 2 * HALF, pair, feature)
    value = tl.load(source + feature, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source + pair, mask=inside, other=0.0).to(tl.float32)
    dtype = source.dtype.element_ty
    kept = (value * cosine).to(dtype).to(tl.float32)
    return (kept + other * sine).to(dtype)


def gate(gate_up: Tensor) -> Tensor:
    """`operations.gate`"""
    width = gate_up.shape[-1] // 2
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    grid = (out.numel() // width, triton.cdiv(width, GATE_BLOCK))
    _gate_kernel[grid](gate_up, out, width, BLOCK=GATE_BLOCK, num_warps=4)
    return out


@triton.jit
def _gate_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * 2 * width + column
    value = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    value = (value / (1 + tl.exp(-value))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, (value * up).to(out.dtype.element_ty), mask=inside)
