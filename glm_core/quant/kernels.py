"""Products with packed matrices: torch's kernels, and the memory layout that each one reads.

Torch's dispatcher says which kernels a device has, and a small matrix tries each. No device is
named here.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..errors import is_out_of_memory
from .packing import GROUPS, Packing, dequantise, join_nibbles, packing, quantise, split_nibbles


class Kernel(Protocol):
    """A product with matrices of `bits` per number, in the kernel's own layout.

    `takes` says whether it can multiply a matrix. `lay_out` turns stored bytes into the layout, and
    `restore` turns them back bit for bit. `product` is x bf16 [M, K] times the transposed matrix:
    bf16 [M, N].
    """

    bits: int
    operation: str

    def takes(self, form: Packing) -> bool: ...

    def lay_out(self, form: Packing, stored: Tensor) -> Tensor: ...

    def restore(self, form: Packing, laid_out: Tensor) -> Tensor: ...

    def product(self, form: Packing, x: Tensor, laid_out: Tensor) -> Tensor: ...


class NibbleProduct(NamedTuple):
    """One of torch's products with 4-bit numbers, w = (q - 8) s + z.

    Args:
        operation: its name in `torch.ops.aten`.
        lay_out: bytes [N, K / 2] -> the layout.
        view: the layout's bytes, N, K -> the tensor that the product takes.
        read: the layout's bytes, N, K -> uint8 [N, K]; None if only the product can read them.
        rows: N must be a multiple of it.
        columns: K must be a multiple of it.
    """

    operation: str
    lay_out: Callable[[Tensor], Tensor]
    view: Callable[[Tensor, int, int], Tensor]
    read: Callable[[Tensor, int, int], Tensor] | None
    rows: int
    columns: int

    def product(self, x: Tensor, laid_out: Tensor, group: int, scales: Tensor) -> Tensor:
        """x bf16 [M, K], the layout's bytes, (scale, zero) bf16 [K / G, N, 2] -> bf16 [M, N]"""
        layout = self.view(laid_out, scales.shape[1], x.shape[1])
        return getattr(torch.ops.aten, self.operation)(x, layout, group, scales)

    def numbers(self, laid_out: Tensor, rows: int, columns: int) -> Tensor:
        """The numbers uint8 [N, K]; without `read`, from products with the unit matrix."""
        if self.read is not None:
            return self.read(laid_out, rows, columns)
        group, device = GROUPS[-1], laid_out.device
        scales = torch.tensor([1.0, 0.0], dtype=torch.bfloat16, device=device)
        scales = scales.expand(columns // group, rows, 2).contiguous()
        numbers = torch.empty(rows, columns, dtype=torch.uint8, device=device)
        unit = torch.eye(min(columns, 256), columns, dtype=torch.bfloat16, device=device)
        for start in range(0, columns, len(unit)):
            values = self.product(unit.roll(start, dims=1), laid_out, group, scales)
            numbers[:, start : start + len(unit)] = (values.T + 8)[:, : columns - start]
        return numbers


def _in_blocks(block: int) -> NibbleProduct:
    """The layout for CPUs: blocks of rows, each column by column. A byte has rows i, i + block / 2.

    A block is 64 rows with 512-bit registers and 32 with 256-bit ones.
    """

    def read(laid_out: Tensor, rows: int, columns: int) -> Tensor:
        joined = rearrange(laid_out, "(n k i) -> n k i", n=rows // block, k=columns)
        return rearrange([joined & 15, joined >> 4], "half n k i -> (n half i) k")

    return NibbleProduct(
        "_weight_int4pack_mm_for_cpu",
        lambda joined: torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            split_nibbles(joined).int(), 1
        ),
        lambda laid_out, rows, columns: laid_out.view(rows, columns // 2),
        read,
        rows=block,
        columns=GROUPS[-1],
    )


DEPTH = 8  # tiles of 16 columns side by side, the most that the kernel takes
IN_TILES = NibbleProduct(
    "_weight_int4pack_mm",
    # This layout has even columns in the high half of a byte.
    lambda joined: torch.ops.aten._convert_weight_to_int4pack(joined << 4 | joined >> 4, DEPTH),
    lambda laid_out, rows, columns: laid_out.view(torch.int32).view(
        rows // 8, columns // (16 * DEPTH), 32, DEPTH // 2
    ),
    None,
    rows=8,
    columns=16 * DEPTH,
)


class GroupedInt4:
    """int4 by a `NibbleProduct`. The layout is preceded by the scales."""

    bits = 4

    def __init__(self, nibbles: NibbleProduct) -> None:
        self.nibbles = nibbles
        self.operation = nibbles.operation

    def takes(self, form: Packing) -> bool:
        return not (form.rows % self.nibbles.rows or form.columns % self.nibbles.columns)

    def lay_out(self, form: Packing, stored: Tensor) -> Tensor:
        scales, numbers = form.split(stored)
        return _join(scales, self.nibbles.lay_out(numbers))

    def restore(self, form: Packing, laid_out: Tensor) -> Tensor:
        scales, layout = _split(form, laid_out)
        numbers = self.nibbles.numbers(layout, form.rows, form.columns)
        return _stored(form, scales, join_nibbles(numbers))

    def product(self, form: Packing, x: Tensor, laid_out: Tensor) -> Tensor:
        scales, layout = _split(form, laid_out)
        return self.nibbles.product(x, layout, form.group, scales)


class Int8InNibbles:
    """int8 by a `NibbleProduct` over 2 N rows: q = 16 (high - 8) + low.

    On GPUs it is preferred to `RowwiseInt8`, which reads memory one byte per thread there.
    """

    bits = 8

    def __init__(self, nibbles: NibbleProduct) -> None:
        self.nibbles = nibbles
        self.operation = nibbles.operation

    def takes(self, form: Packing) -> bool:
        width = math.lcm(self.nibbles.columns, GROUPS[-1])
        return not (form.rows % self.nibbles.rows or form.columns % width)

    @staticmethod
    def _halves(form: Packing) -> Packing:
        """The int4 matrix [2 N, K] of the high halves and then the low ones."""
        group = next(size for size in (256, *GROUPS) if form.columns % size == 0)
        return Packing(2 * form.rows, form.columns, 4, group)

    def lay_out(self, form: Packing, stored: Tensor) -> Tensor:
        scale, numbers = form.split(stored)
        halves = self._halves(form)
        raised = numbers.view(torch.uint8) ^ 128  # q + 128
        zero = torch.zeros_like(scale)
        scales = rearrange(
            [torch.cat([16 * scale, scale]), torch.cat([zero, 8 * scale])], "z n -> n z"
        ).expand(form.columns // halves.group, -1, -1)
        both = torch.cat([join_nibbles(raised >> 4), join_nibbles(raised & 15)])
        return _join(scales, self.nibbles.lay_out(both))

    def restore(self, form: Packing, laid_out: Tensor) -> Tensor:
        halves = self._halves(form)
        scales, layout = _split(halves, laid_out)
        high, low = self.nibbles.numbers(layout, halves.rows, halves.columns).chunk(2)
        raised = high << 4 | low
        return _stored(form, scales[0, form.rows :, 0], (raised ^ 128).view(torch.int8))

    def product(self, form: Packing, x: Tensor, laid_out: Tensor) -> Tensor:
        halves = self._halves(form)
        scales, layout = _split(halves, laid_out)
        high, low = self.nibbles.product(x, layout, halves.group, scales).chunk(2, dim=-1)
        return high + low


class RowwiseInt8:
    """int8 by torch's int8 product, which reads matrices as they are stored."""

    bits = 8
    operation = "_weight_int8pack_mm"

    def takes(self, form: Packing) -> bool:
        return form.columns % 32 == 0

    def lay_out(self, form: Packing, stored: Tensor) -> Tensor:
        return stored

    def restore(self, form: Packing, laid_out: Tensor) -> Tensor:
        return laid_out

    def product(self, form: Packing, x: Tensor, laid_out: Tensor) -> Tensor:
        scales, numbers = form.split(laid_out)
        return torch.ops.aten._weight_int8pack_mm(x, numbers, scales)


KERNELS: tuple[Kernel, ...] = (
    GroupedInt4(IN_TILES),
    GroupedInt4(_in_blocks(64)),
    GroupedInt4(_in_blocks(32)),
    Int8InNibbles(IN_TILES),
    RowwiseInt8(),
)


def _join(scales: Tensor, layout: Tensor) -> Tensor:
    return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in (scales, layout)])


def _split(form: Packing, laid_out: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero) bf16 [K / G, N, 2], and the layout's bytes."""
    scales = laid_out[: form.scale_bytes].view(torch.bfloat16)
    return scales.view(-1, form.rows, 2), laid_out[form.scale_bytes :]


def _stored(form: Packing, scales: Tensor, numbers: Tensor) -> Tensor:
    stored = torch.zeros(form.nbytes, dtype=torch.uint8, device=scales.device)
    for part, value in zip(form.split(stored), (scales, numbers), strict=True):
        part.copy_(value)
    return stored


@cache
def kernel_for(form: Packing, device: torch.device) -> Kernel | None:
    """The device's best kernel for a matrix, or None."""
    kernels = (k for k in kernels_of(device) if k.bits == form.bits and k.takes(form))
    return next(kernels, None)


@cache
def kernels_of(device: torch.device) -> tuple[Kernel, ...]:
    """The kernels that a device has and that pass a trial on it, best first."""
    return tuple(k for k in KERNELS if _has(k, device) and passes_trial(k, device))


def _has(kernel: Kernel, device: torch.device) -> bool:
    """Whether this version of torch has the product for this type of device."""
    key = torch._C._dispatch_key_for_device(device.type)
    return hasattr(
        torch.ops.aten, kernel.operation
    ) and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{kernel.operation}", key)


def passes_trial(kernel: Kernel, device: torch.device) -> bool:
    """Whether a kernel restores a small matrix bit for bit, and multiplies by it within 2 %.

    A device may list a product and refuse it (GPUs before Ampere), or order the numbers otherwise
    (CPUs without AVX). Kernels that fail are not used on that device.

    Raises:
        RuntimeError: the device is out of memory, which says nothing about the kernel.
    """
    shape = (64, 256)
    form = packing(shape, f"int{kernel.bits}")
    weight = torch.arange(math.prod(shape)).view(shape).sin() + 0.1
    stored = quantise(weight.to(device), form.name)
    x = torch.arange(2 * shape[1]).view(2, -1).cos().to(device, torch.bfloat16)
    expected = F.linear(x.float(), dequantise(stored, form, torch.float32))
    try:
        laid_out = kernel.lay_out(form, stored)
        restored = kernel.restore(form, laid_out)
        product = kernel.product(form, x, laid_out).float()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False
    error = (product - expected).norm() / expected.norm()
    return torch.equal(restored, stored) and bool(error < 0.02)
