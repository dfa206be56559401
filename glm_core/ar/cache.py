"""The AR model's KV cache, and the two kinds of attention pass over it: a block of ids, or a step.

A pass writes its own keys and values, and attends to all positions written so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fallbacks import index_copy_
from .operations import PLAIN, Operations, Rotation, rotate_together

SPAN = 256
"""A step attends to a multiple of this many positions: few shapes serve a whole image."""


class KVCache:
    """Keys and values, allocated once, each layer's on the device where it computes.

    They begin as zeros: a step gives unwritten positions the weight 0, and 0 * NaN is NaN.

    layers: for each layer a view [(k, v), B, kv_heads, length, D].
    """

    def __init__(
        self,
        segments: Sequence[tuple[torch.device, int]],
        batch: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
    ) -> None:
        """segments: devices, and how many layers in a row each computes."""
        self.length = length
        self._data = [
            torch.zeros((layers, 2, batch, kv_heads, length, head_dim), device=device, dtype=dtype)
            for device, layers in segments
        ]
        self.layers = [layer for data in self._data for layer in data]

    @property
    def nbytes(self) -> int:
        return sum(data.nbytes for data in self._data)

    def copy_prefix(
        self,
        other: "KVCache",
        length: int,
        rows: Sequence[int] | slice = slice(None),
        start: int = 0,
    ) -> None:
        """Copy the first `length` positions of `other` to those from `start` on, for some samples.

        Args:
            other: its batch is the number of `rows`, or 1.
        """
        for mine, theirs in zip(self._data, other._data, strict=True):
            mine[:, :, rows, :, start : start + length] = theirs[..., :length, :]


class AttentionPass(Protocol):
    """What the layers attend with: the cache, and the positions that this pass reads."""

    operations: Operations
    """Those of the blocks."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        """q [B, L, heads, D], k and v [B, L, kv_heads, D], not rotated -> [B, L, heads * D]"""

    def to(self, device: torch.device) -> "AttentionPass":
        """The same pass for layers that compute on that device."""


class BlockPass:
    """Ids after `start` positions of a sequence; each attends to itself and all before it.

    Args:
        first: int64 [B], the first position that a sample sees; None if it is 0 for all.
        samples: int64, those whose keys and values are written; None for all. What the pass gives
            for the others means nothing.
    """

    operations = PLAIN

    def __init__(
        self,
        cache: KVCache,
        start: int,
        first: Tensor | None = None,
        samples: Tensor | None = None,
    ) -> None:
        self.cache = cache
        self.start = start
        self.first = first
        self.samples = samples
        self._mask: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        length, heads = q.shape[1:3]
        end = self.start + length
        q, k = rotate_together(q, k, rotation)
        written = self.cache.layers[layer][..., :end, :]
        for cached, new in zip(written[..., self.start :, :], (k, v), strict=True):
            self._write(cached, new.transpose(1, 2))
        # Keys are repeated for every query head: with a mask, no kernel is as fast on shared ones.
        keys, values = written.repeat_interleave(heads // written.shape[2], dim=2)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys,
            values,
            attn_mask=self._causal(length, q.device),
            is_causal=self.start == 0 and length > 1 and self.first is None,
        )
        return out.transpose(1, 2).flatten(2)

    def _write(self, cached: Tensor, new: Tensor) -> None:
        """Keys or values [B, kv_heads, L, D] into their places in the cache."""
        if self.samples is None:
            cached.copy_(new)
        else:
            index_copy_(cached, 0, self.samples, new.index_select(0, self.samples))

    def to(self, device: torch.device) -> "BlockPass":
        """The mask is made anew on the device."""
        first, samples = moved(self.first, device), moved(self.samples, device)
        return BlockPass(self.cache, self.start, first, samples)

    def _causal(self, length: int, device: torch.device) -> Tensor | None:
        """bool [L, start + L], or [B, 1, L, start + L] where samples begin at positions of their
        own; made once a pass. A block at the start of a sequence needs none.
        """
        if self.first is None and (self.start == 0 or length == 1):
            return None
        if self._mask is None:
            ones = torch.ones(length, self.start + length, dtype=torch.bool, device=device)
            self._mask = ones.tril(self.start)
            if self.first is not None:
                self._mask = (self._mask & ~_before(self.first, ones.shape[1])).unsqueeze(1)
        return self._mask


@dataclass(frozen=True)
class StepPass:
    """A few ids for every sample, at positions in device memory: no shape depends on them.

    Args:
        position: int64 [L], of ids that follow each other.
        mask: 0 or -inf in the model's dtype, see `step_mask`.
        first: int64 [B], the first position that a sample sees; None if it is 0 for all.
    """

    cache: KVCache
    position: Tensor
    mask: Tensor
    operations: Operations = PLAIN
    first: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        cached, rest = self.cache.layers[layer], (self.position, self.mask, self.first)
        return _attend(q, k, v, rotation, cached, *rest, self.operations)

    def to(self, device: torch.device) -> "StepPass":
        """The plain operations: others are for models that are on one device."""
        first = moved(self.first, device)
        return StepPass(self.cache, self.position.to(device), self.mask.to(device), first=first)


class LayerPass:
    """A `StepPass` of one layer alone, with the plain operations.

    Args:
        cached: the layer's view of the cache.
    """

    operations = PLAIN

    def __init__(
        self, cached: Tensor, position: Tensor, mask: Tensor, first: Tensor | None
    ) -> None:
        self._rest = cached, position, mask, first

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        """The number of the layer is not read."""
        return _attend(q, k, v, rotation, *self._rest, PLAIN)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: Rotation,
    cached: Tensor,
    position: Tensor,
    mask: Tensor,
    first: Tensor | None,
    operations: Operations,
) -> Tensor:
    q = operations.rotate_write(q, k, v, rotation, cached, position)
    keys, values = cached[..., : mask.shape[-1], :]
    return operations.attend(q, keys, values, mask, position, first)


def step_mask(
    position: Tensor, sharing: int, span: int, dtype: torch.dtype, first: Tensor | None = None
) -> Tensor:
    """The mask of ids at `position`, int64 [L], over `span` positions: [L * sharing, span].

    Args:
        sharing: how many heads share keys; each id has so many queries.
        first: int64 [B], the first position that a sample sees. With it each sample has a mask,
            [B, 1, L * sharing, span].
    """
    unseen = torch.arange(span, device=position.device) > position[:, None]
    if first is not None:
        unseen = (unseen | _before(first, span)).unsqueeze(1)
    mask = torch.zeros(unseen.shape, dtype=dtype, device=position.device)
    mask.masked_fill_(unseen, -torch.inf)
    return mask.unsqueeze(-2).expand(*mask.shape[:-1], sharing, -1).flatten(-3, -2)


def _before(first: Tensor, span: int) -> Tensor:
    """bool [B, 1, span]: the positions before the first that a sample sees."""
    return torch.arange(span, device=first.device) < first[:, None, None]


def moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def span_of(positions: int) -> int:
    """`positions` rounded up to a multiple of `SPAN`."""
    return -(-positions // SPAN) * SPAN
