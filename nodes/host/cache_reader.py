"""Readers of a reference cache: in the conditioning, they give each block its keys and values."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import comfy.conds
import comfy.model_management
import torch
from torch import Tensor, nn

from ...glm_core.decoder.model import KeysValues
from ...glm_core.decoder.reference_cache import ReferenceCache

Fetched = tuple[int, Any, list[tuple[Tensor, ...]]]
"""A block's number, the stream that copies its tensors, and the copies for each set."""


class CacheReader:
    """Reads a cache on one device: `reader[i]` has the keys and values of block i for each set.

    A reader has no dtype, so that no host casts it, and is compared by identity. A host that splits
    work over devices calls `to` at every step, so the reader of each device is made once.
    """

    def __init__(
        self,
        cache: ReferenceCache,
        device: torch.device,
        streamed: bool,
        sets: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            streamed: whether the cache stays in host memory and is fetched block by block.
            sets: the numbers of the sets of references to read; None for all.
        """
        self.cache = cache
        self.device = device
        self.streamed = streamed
        self.sets = range(len(cache.blocks[0].sets)) if sets is None else sets
        self._prefetched: Fetched | None = None
        self._others: dict[torch.device, CacheReader] = {}

    def to(self, device: torch.device, *_: Any, **__: Any) -> "CacheReader":
        if device == self.device:
            return self
        if device not in self._others:
            cache = self.cache if self.streamed else _copy_to(device, self.cache)
            self._others[device] = CacheReader(cache, device, self.streamed, self.sets)
        return self._others[device]

    def __getitem__(self, block: int) -> Sequence[KeysValues]:
        pairs = self._pairs(block)
        tensors = [pair.tensors() for pair in pairs]
        # A host that is short of memory may have left a resident cache in host memory.
        if self.streamed or any(x.device != self.device for pair in tensors for x in pair):
            tensors = self._stream(block)
        return [pair.restore(copy) for pair, copy in zip(pairs, tensors, strict=True)]

    def _stream(self, block: int) -> list[tuple[Tensor, ...]]:
        """A block's tensors, fetched during the block before; begins to fetch those of the next."""
        if self._prefetched is None or self._prefetched[0] != block:
            self._prefetched = self._fetch(block)
        _, stream, tensors = self._prefetched
        comfy.model_management.sync_stream(self.device, stream)
        if stream is not None:  # else the allocator may reuse their memory before they are read
            reading = comfy.model_management.current_stream(self.device)
            for tensor in (tensor for pair in tensors for tensor in pair):
                tensor.record_stream(reading)
        self._prefetched = self._fetch((block + 1) % len(self.cache.blocks))
        return tensors

    def _fetch(self, block: int) -> Fetched:
        stream = comfy.model_management.get_offload_stream(self.device)
        tensors = [
            tuple(
                comfy.model_management.cast_to(
                    tensor, None, self.device, non_blocking=True, stream=stream
                )
                for tensor in pair.tensors()
            )
            for pair in self._pairs(block)
        ]
        return block, stream, tensors

    def _pairs(self, block: int) -> list[Any]:
        sets = self.cache.blocks[block].sets
        return [sets[number] for number in self.sets]

    @property
    def tokens(self) -> int:
        """The number of reference tokens in the largest set."""
        return self.cache.tokens

    def of_sets(self, sets: Sequence[int]) -> "CacheReader":
        """A reader of some of the sets that this one reads, in any order."""
        sets = [self.sets[number] for number in sets]
        return CacheReader(self.cache, self.device, self.streamed, sets)

    def end_run(self) -> None:
        """Free the prefetched block and the copies on other devices."""
        self._prefetched = None
        self._others.clear()


def _copy_to(device: torch.device, cache: ReferenceCache) -> ReferenceCache:
    """A copy on the device, made tensor by tensor, with no second copy on the cache's own."""
    copies = {id(p): nn.Parameter(p.to(device), requires_grad=False) for p in cache.parameters()}
    return deepcopy(cache, copies)


class SplitReader:
    """The readers of a split decoder, each on the device of its blocks."""

    def __init__(self, readers: Sequence[tuple[range, CacheReader]]) -> None:
        self.readers = readers

    def to(self, *_: Any, **__: Any) -> "SplitReader":
        return self

    def __getitem__(self, block: int) -> Sequence[KeysValues]:
        numbers, reader = next(entry for entry in self.readers if block in entry[0])
        return reader[block - numbers.start]

    @property
    def tokens(self) -> int:
        return self.readers[0][1].tokens

    def of_sets(self, sets: Sequence[int]) -> "SplitReader":
        return SplitReader([(numbers, reader.of_sets(sets)) for numbers, reader in self.readers])

    def end_run(self) -> None:
        for _, reader in self.readers:
            reader.end_run()


class ReferencesCondition(comfy.conds.CONDConstant):
    """A reader as a condition; its size is the reference tokens, for the host's memory estimate."""

    def size(self) -> list[int]:
        return [1, self.cond.tokens]
