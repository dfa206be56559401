"""Weight-only int8 and int4: a matrix as one run of bytes, the same on every device.

A single uint8 tensor holds the scales and then the quantised numbers. So code that moves, pins,
backs up or replaces a layer's `weight` handles both together:

    int8   bf16 scale [N], int8 [N, K]:                     w = q s
    int4   bf16 (scale, zero) [K / G, N, 2], two per byte:  w = (q - 8) s + z,   q from 0 to 15
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ..errors import WeightsError

FORMATS = ("int8", "int4")
GROUPS = (128, 64, 32)  # numbers of a row that share an int4 scale: the first that divides K
ALIGNMENT = 64  # bytes; packed matrices are padded to it, so that the next one in a file is aligned
SLICE = 1 << 20  # numbers quantised at a time; their float32 copies stay below 50 MB
TINY = torch.finfo(torch.bfloat16).tiny  # the least scale, for numbers that are all the same


class Packing(NamedTuple):
    """How a matrix [rows, columns] is packed: `bits` per number, a scale per `group` of a row."""

    rows: int
    columns: int
    bits: int
    group: int

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def scale_bytes(self) -> int:
        numbers = self.rows if self.bits == 8 else 2 * self.rows * self.columns // self.group
        return 2 * numbers

    @property
    def number_bytes(self) -> int:
        return self.rows * self.columns * self.bits // 8

    @property
    def nbytes(self) -> int:
        return -(-(self.scale_bytes + self.number_bytes) // ALIGNMENT) * ALIGNMENT

    def split(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Views: scales bf16 [N] and numbers int8 [N, K], or [K / G, N, 2] and bytes [N, K / 2]."""
        scales = stored[: self.scale_bytes].view(torch.bfloat16)
        numbers = stored[self.scale_bytes : self.scale_bytes + self.number_bytes]
        if self.bits == 8:
            return scales, numbers.view(torch.int8).view(self.rows, self.columns)
        groups = self.columns // self.group
        return scales.view(groups, self.rows, 2), numbers.view(self.rows, self.columns // 2)


def packing(shape: tuple[int, int], name: str) -> Packing:
    """How a matrix [N, K] is packed in one of `FORMATS`.

    Raises:
        GLMImageError: no int4 group divides its width.
    """
    rows, columns = shape
    if name == "int8":
        return Packing(rows, columns, 8, columns)
    group = next((size for size in GROUPS if columns % size == 0), None)
    if group is None:
        raise WeightsError(
            f"int4 takes layers whose width is a multiple of {GROUPS[-1]}, and this model has one "
            f"of width {columns}; choose int8."
        )
    return Packing(rows, columns, 4, group)


def quantise(weight: Tensor, name: str) -> Tensor:
    """A matrix [N, K] of any float dtype, packed in one of `FORMATS`: uint8 [bytes].

    Each number is rounded to the nearest one of the format. Rows are quantised in slices, which
    need only megabytes beside the result.

    Raises:
        GLMImageError: no int4 group divides its width.
    """
    form = packing(tuple(weight.shape), name)
    stored = torch.zeros(form.nbytes, dtype=torch.uint8, device=weight.device)
    scales, numbers = form.split(stored)
    step = max(1, SLICE // form.columns)
    for start in range(0, form.rows, step):
        rows = slice(start, start + step)
        if form.bits == 8:
            scales[rows], numbers[rows] = _int8(weight[rows].float())
        else:
            scales[:, rows], numbers[rows] = _int4(weight[rows].float(), form.group)
    return stored


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale per row: bf16 [N], int8 [N, K].

    As the scale is rounded to bf16, the largest number may be 127.25 scales. Its error is still
    below half a scale.
    """
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=TINY).bfloat16()
    numbers = (weight / scale.float()[:, None]).round().clamp(-127, 127)
    return scale, numbers.to(torch.int8)


def _int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Even steps between each group's extremes: bf16 [K / G, N, 2], bytes [N, K / 2]."""
    grouped = rearrange(weight, "n (k g) -> n k g", g=group)
    low, high = grouped.aminmax(dim=-1)
    scale = ((high - low) / 15).clamp(min=TINY).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    numbers = (grouped - zero.float()[..., None]) / scale.float()[..., None]
    numbers = (numbers.round() + 8).clamp(0, 15).to(torch.uint8)
    scales = rearrange([scale, zero], "z n k -> k n z")
    return scales, join_nibbles(rearrange(numbers, "n k g -> n (k g)"))


def join_nibbles(numbers: Tensor) -> Tensor:
    """uint8 [N, K], all below 16 -> bytes [N, K / 2], even columns in the low half."""
    return numbers[:, ::2] | numbers[:, 1::2] << 4


def split_nibbles(joined: Tensor) -> Tensor:
    """bytes [N, K / 2] -> uint8 [N, K]"""
    return torch.stack([joined & 15, joined >> 4], dim=-1).flatten(-2)


def dequantise(stored: Tensor, form: Packing, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K], computed in `dtype`."""
    scales, numbers = form.split(stored)
    if form.bits == 8:
        return numbers.to(dtype).mul_(scales.to(dtype)[:, None])
    scale, zero = rearrange(scales.to(dtype), "k n z -> z n k 1")
    grouped = rearrange(split_nibbles(numbers), "n (k g) -> n k g", g=form.group).to(dtype)
    return grouped.sub_(8).mul_(scale).add_(zero).view(form.rows, form.columns)
