"""A step's queries, keys and values as one product; each matrix is read where it lies.

The matrices of keys and values are small: a product of their own takes mostly the time of its
launch. Joining the three would hold them twice, and a host patches and offloads each by itself.
"""

import triton
import triton.language as tl
from torch import Tensor, nn

from .. import operations
from .attention import precision_of
from .in_place import is_in_place

ROWS = 16
"""Rows of the input at most, and as many as Triton's product needs at least."""
FEATURES, COLUMNS = 16, 256
"""Of a matrix: rows that a program multiplies, and how many numbers of them at a time."""


def project(
    x: Tensor, q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    """`operations.project`. Layers whose weights are not plain numbers in place are called, and so
    are all where the input has more than `ROWS` rows."""
    layers = (q_proj, k_proj, v_proj)
    rows = x.numel() // x.shape[-1]
    if rows > ROWS or not _may_be_joined(layers, x):
        return operations.project(x, *layers)
    x = x.contiguous()
    out = [x.new_empty(*x.shape[:-1], len(layer.weight)) for layer in layers]
    blocks = [triton.cdiv(part.shape[-1], FEATURES) for part in out]
    biased = q_proj.bias is not None
    biases = [layer.bias if biased else layer.weight for layer in layers]  # pointers, not read
    _project_kernel[(sum(blocks),)](
        x, *(layer.weight for layer in layers), *biases, *out,
        *(part.shape[-1] for part in out), rows, blocks[0], blocks[0] + blocks[1],
        WIDTH=x.shape[-1], BIASED=biased, ROWS=ROWS, FEATURES=FEATURES, COLUMNS=COLUMNS,
        PRECISION=precision_of(x.dtype), num_warps=4, num_stages=4,
    )  # fmt: skip
    return tuple(out)


def _may_be_joined(layers: tuple[nn.Module, ...], x: Tensor) -> bool:
    """Whether these are linear layers in the input's dtype, in place, all with a bias or none."""
    return (
        all(isinstance(layer, nn.Linear) and is_in_place(layer, x.device) for layer in layers)
        and all(layer.weight.is_contiguous() for layer in layers)
        and {part.dtype for layer in layers for part in layer.parameters()} == {x.dtype}
        and len({layer.bias is None for layer in layers}) == 1
    )


@triton.jit
def _project_kernel(
    x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, q, k, v,
    q_width, k_width, v_width, rows, keys_from, values_from,
    WIDTH: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if block < keys_from:
        _product(
            x, q_weight, q_bias, q, block, q_width, rows,
            WIDTH, BIASED, ROWS, FEATURES, COLUMNS, PRECISION,
        )  # fmt: skip
    elif block < values_from:
        block -= keys_from
        _product(
            x, k_weight, k_bias, k, block, k_width, rows,
            WIDTH, BIASED, ROWS, FEATURES, COLUMNS, PRECISION,
        )  # fmt: skip
    else:
        block -= values_from
        _product(
            x, v_weight, v_bias, v, block, v_width, rows,
            WIDTH, BIASED, ROWS, FEATURES, COLUMNS, PRECISION,
        )  # fmt: skip


@triton.jit
def _product(
    x, weight, bias, out, block, width, rows,
    WIDTH: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some features of all rows; sums are float32, in the order of the columns."""
    row, feature = tl.arange(0, ROWS), block * FEATURES + tl.arange(0, FEATURES)
    at_row, at_feature = row[:, None] * WIDTH, feature.to(tl.int64)[None, :] * WIDTH
    total = tl.zeros([ROWS, FEATURES], dtype=tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        held = (row < rows)[:, None] & (column < WIDTH)[None, :]
        numbers = tl.load(x + at_row + column[None, :], mask=held, other=0.0).to(tl.float32)
        held = (column < WIDTH)[:, None] & (feature < width)[None, :]
        weights = tl.load(weight + at_feature + column[:, None], mask=held, other=0.0)
        total = tl.dot(numbers, weights.to(tl.float32), total, input_precision=PRECISION)
    if BIASED:
        total += tl.load(bias + feature, mask=feature < width, other=0.0).to(tl.float32)[None, :]
    held = (row < rows)[:, None] & (feature < width)[None, :]
    tl.store(out + row[:, None] * width + feature[None, :], total.to(out.dtype.element_ty), held)
