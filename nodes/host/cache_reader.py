"""Readers of a reference cache: in the conditioning, they give each block its keys and values."""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import comfy.conds
import torch
from torch import Tensor, nn

from ...glm_core.decoder.model import KeysValues
from ...glm_core.decoder.reference_cache import ReferenceCache
from .block_stream import BlockStream


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
        self._read = list(dict.fromkeys(self.sets))
        tensors = partial(_tensors, cache, self._read)  # not a method, which would be a cycle
        self._stream = BlockStream(tensors, len(cache.blocks), device)
        self._others: dict[torch.device, CacheReader] = {}

    def to(self, device: torch.device, *_: Any, **__: Any) -> "CacheReader":
        if device == self.device:
            return self
        if device not in self._others:
            cache = self.cache if self.streamed else _copy_to(device, self.cache)
            self._others[device] = CacheReader(cache, device, self.streamed, self.sets)
        return self._others[device]

    def __getitem__(self, block: int) -> Sequence[KeysValues]:
        tensors = _tensors(self.cache, self._read, block)
        # A host that is short of memory may have left a resident cache in host memory.
        if any(x.device != self.device for x in tensors):
            tensors = self._stream.read(block)
        each = len(tensors) // len(self._read)
        restored = {
            number: self.cache.blocks[block].sets[number].restore(tensors[i * each :][:each])
            for i, number in enumerate(self._read)
        }
        return [restored[number] for number in self.sets]

    @property
    def tokens(self) -> int:
        """The number of reference tokens in the largest set."""
        return self.cache.tokens

    def of_sets(self, sets: Sequence[int]) -> "CacheReader":
        """A reader of some of the sets that this one reads, in any order."""
        sets = [self.sets[number] for number in sets]
        return CacheReader(self.cache, self.device, self.streamed, sets)

    def end_run(self) -> None:
        """Free the fetched blocks and the copies on other devices."""
        self._stream.release()
        for reader in self._others.values():
            reader.end_run()
        self._others.clear()


def _tensors(cache: ReferenceCache, sets: Sequence[int], block: int) -> list[Tensor]:
    """The stored tensors of a block for some sets, as many for each."""
    return [tensor for number in sets for tensor in cache.blocks[block].sets[number].tensors()]


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
