"""A step's attention, split over the span of the cache and merged by the sums of exponentials.

At batch 1 there are only as many independent pieces of work as key heads. So every part of the
span is a program of its own, which leaves its maximum, its sum of exponentials and its weighted
values; a second kernel merges them (Dao et al., "Flash-Decoding for long-context inference", 2023).
Parts before the first visible position and after the last one read nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = {"tf32": 64, "ieee": 32}
"""Positions that one program attends to, by the precision of its products."""
MERGED = 16
"""Parts that are merged at a time."""
LEAST_ROWS = 16
"""Rows that Triton's matrix product needs; heads that share keys are its rows."""


def attend_in_parts(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    position: Tensor,
    first: Tensor | None = None,
) -> Tensor:
    """`operations.attend`; it goes by the positions and does not read the mask."""
    batch, length, heads, head_dim = q.shape
    kv_heads, span = keys.shape[1:3]
    precision = precision_of(q.dtype)
    sharing, parts = heads // kv_heads, triton.cdiv(span, PART[precision])
    groups, block = batch * length * kv_heads, triton.next_power_of_2(head_dim)
    q = q.contiguous()
    floats = {"device": q.device, "dtype": torch.float32}
    partial = torch.empty(groups, parts, sharing, head_dim, **floats)
    peaks = torch.empty(groups, parts, sharing, **floats)
    sums = torch.empty_like(peaks)
    padded = first is not None
    first = first if padded else position  # a pointer, which is not read
    _attend_kernel[(groups, parts)](
        q, keys, values, position, first, partial, peaks, sums, head_dim**-0.5,
        *keys.stride()[:3], *values.stride()[:3], length, kv_heads, span, parts,
        SHARING=sharing, ROWS=max(LEAST_ROWS, triton.next_power_of_2(sharing)),
        WIDTH=head_dim, BLOCK=block, PART=PART[precision], PRECISION=precision, PADDED=padded,
        num_warps=4,
    )  # fmt: skip
    out = torch.empty_like(q)
    _merge_kernel[(groups, sharing)](
        partial, peaks, sums, position, first, out, length, kv_heads,
        parts, SHARING=sharing, WIDTH=head_dim, BLOCK=block, PART=PART[precision], MERGED=MERGED,
        PADDED=padded, num_warps=4,
    )  # fmt: skip
    return out.view(batch, length, -1)


def precision_of(dtype: torch.dtype) -> str:
    """TF32 holds numbers in bf16 exactly. Not all of AMD's devices have it."""
    return "ieee" if dtype == torch.float32 or torch.version.hip else "tf32"


@triton.jit
def _attend_kernel(
    q, keys, values, position, first, partial, peaks, sums, scale,
    key_batch, key_head, key_row, value_batch, value_head, value_row,
    length, kv_heads, span, parts,
    SHARING: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PART: tl.constexpr, PRECISION: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    group, part = tl.program_id(0), tl.program_id(1)
    batch, kv_head = group // (length * kv_heads), group % kv_heads
    last = tl.load(position + group // kv_heads % length)
    begin = 0
    if PADDED:
        begin = tl.load(first + batch)
    if (part * PART <= last) & (part * PART + PART > begin):
        head, feature = tl.arange(0, ROWS), tl.arange(0, BLOCK)
        inside = (head < SHARING)[:, None] & (feature < WIDTH)[None, :]
        # Heads that share keys follow each other, so the queries of a group are one run.
        at = (group * SHARING + head)[:, None] * WIDTH + feature[None, :]
        query = tl.load(q + at, mask=inside, other=0.0).to(tl.float32)

        row = part * PART + tl.arange(0, PART)
        seen = (row >= begin) & (row <= last) & (row < span)
        held = seen[:, None] & (feature < WIDTH)[None, :]
        at = keys + batch * key_batch + kv_head * key_head
        key = tl.load(at + row[:, None] * key_row + feature[None, :], mask=held, other=0.0)
        key = tl.trans(key.to(tl.float32))
        scores = tl.dot(query, key, input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        peak = tl.max(scores, axis=1)
        weight = tl.exp(scores - peak[:, None])

        at = values + batch * value_batch + kv_head * value_head
        value = tl.load(at + row[:, None] * value_row + feature[None, :], mask=held, other=0.0)
        weighted = tl.dot(weight, value.to(tl.float32), input_precision=PRECISION)
        at = (group * parts + part) * SHARING + head
        tl.store(peaks + at, peak, mask=head < SHARING)
        tl.store(sums + at, tl.sum(weight, axis=1), mask=head < SHARING)
        tl.store(partial + at[:, None] * WIDTH + feature[None, :], weighted, mask=inside)


@triton.jit
def _merge_kernel(
    partial, peaks, sums, position, first, out, length, kv_heads, parts,
    SHARING: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PART: tl.constexpr, MERGED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    group, head = tl.program_id(0), tl.program_id(1)
    feature = tl.arange(0, BLOCK)
    inside = feature < WIDTH
    used = tl.load(position + group // kv_heads % length) // PART + 1  # the others are unwritten
    used = tl.minimum(used, parts)
    unused = 0  # parts before the first
    if PADDED:
        unused = tl.load(first + group // (length * kv_heads)) // PART
    peak = tl.full([], float("-inf"), dtype=tl.float32)
    total = tl.full([], 0.0, dtype=tl.float32)
    merged = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(unused, used, MERGED):
        part = start + tl.arange(0, MERGED)
        at = (group * parts + part) * SHARING + head
        theirs = tl.load(peaks + at, mask=part < used, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(theirs, axis=0))
        kept, weight = tl.exp(peak - higher), tl.exp(theirs - higher)
        total = total * kept + tl.sum(weight * tl.load(sums + at, mask=part < used, other=0.0), 0)
        held = (part < used)[:, None] & inside[None, :]
        values = tl.load(partial + at[:, None] * WIDTH + feature[None, :], mask=held, other=0.0)
        merged = merged * kept + tl.sum(values * weight[:, None], axis=0)
        peak = higher
    at = (group * SHARING + head) * WIDTH + feature
    tl.store(out + at, (merged / total).to(out.dtype.element_ty), mask=inside)
