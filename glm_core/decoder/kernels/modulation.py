"""Gated residual and modulated norm of text and image, joined, in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operations import ATTENTION, EPS, FEED_FORWARD


def modulate(txt: Tensor, img: Tensor, vectors: Tensor, first: int = ATTENTION) -> Tensor:
    """`operations.modulate`"""
    txt, img = txt.contiguous(), img.contiguous()
    joint = _joint(txt, img)
    _modulate(txt, img, joint, vectors, txt, img, joint, first, gated=False)
    return joint


def add_modulate(
    txt: Tensor, img: Tensor, attended: Tensor, vectors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`operations.add_modulate`"""
    txt, img, attended = txt.contiguous(), img.contiguous(), attended.contiguous()
    txt_out, img_out, joint = torch.empty_like(txt), torch.empty_like(img), _joint(txt, img)
    _modulate(txt, img, attended, vectors, txt_out, img_out, joint, FEED_FORWARD, gated=True)
    return txt_out, img_out, joint


def _joint(txt: Tensor, img: Tensor) -> Tensor:
    batch, length, width = img.shape
    return img.new_empty(batch, txt.shape[1] + length, width)


def _modulate(
    txt: Tensor,
    img: Tensor,
    attended: Tensor,
    vectors: Tensor,
    txt_out: Tensor,
    img_out: Tensor,
    joint: Tensor,
    first: int,
    *,
    gated: bool,
) -> None:
    vectors = vectors.contiguous()
    batch, length, width = joint.shape
    stride = vectors.stride(0) if vectors.shape[0] > 1 else 0
    _modulate_kernel[(batch * length,)](
        txt, img, attended, vectors, txt_out, img_out, joint, stride, txt.shape[1], length, EPS,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), FIRST=first, GATED=gated,
        numwarps=warps(width),
    )  # fmt: skip


def warps(numbers: int) -> int:
    """About 16 numbers a thread."""
    return max(1, min(16, triton.next_power_of_2(numbers) // 512))


@triton.jit(do_not_specialize=["text", "length"])  # else it is compiled for every kind of prompt
def _modulate_kernel(
    txt, img, attended, vectors, txt_out, img_out, joint, vector_stride, text, length, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, place = row // length, row % length
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    dtype = joint.dtype.element_ty
    if place < text:
        kind = 1
        at = (batch * text + place) * WIDTH + columns
        value = tl.load(txt + at, mask=inside, other=0.0).to(tl.float32)
    else:
        kind = 0
        at = (batch * (length - text) + place - text) * WIDTH + columns
        value = tl.load(img + at, mask=inside, other=0.0).to(tl.float32)
    vector = vectors + batch * vector_stride + kind * WIDTH + columns
    if GATED:
        out = tl.load(attended + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(vector + (FIRST - 2) * WIDTH, mask=inside, other=0.0).to(tl.float32)
        value = (value + gate * out).to(dtype)
        if place < text:
            tl.store(txt_out + at, value, mask=inside)
        else:
            tl.store(img_out + at, value, mask=inside)
        value = value.to(tl.float32)
    mean = tl.sum(value, axis=0) / WIDTH
    value = tl.where(inside, value - mean, 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
    value = value.to(dtype).to(tl.float32)
    shift = tl.load(vector + FIRST * WIDTH, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(vector + (FIRST + 2) * WIDTH, mask=inside, other=0.0).to(tl.float32)
    scale = (1 + scale).to(dtype).to(tl.float32)
    tl.store(joint + row * WIDTH + columns, (shift + value * scale).to(dtype), mask=inside)
