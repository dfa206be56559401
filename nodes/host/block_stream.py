"""Blocks of tensors in host memory, copied to a device one ahead of the block that is computed."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from torch import Tensor


@dataclass
class _Buffer:
    """A block's tensors on the device, and the event after which they are copied."""

    tensors: list[Tensor]
    copied: Any


class BlockStream:
    """Two buffers on a device that are filled in turn, whatever the number of blocks.

    Python may run many blocks ahead of the device. So that no buffer is overwritten while it is
    read, nor read while it is written, the two streams wait for each other's events.
    """

    def __init__(
        self, tensors_of: Callable[[int], Sequence[Tensor]], blocks: int, device: torch.device
    ) -> None:
        """
        Args:
            tensors_of: the tensors of a block, of the same shapes and dtypes in all of them.
            blocks: their number.
        """
        self._tensors_of = tensors_of
        self._total = blocks
        self._device = device
        self._buffers: dict[int, _Buffer] = {}

    def read(self, block: int) -> Sequence[Tensor]:
        """A block's tensors on the device, for work that is queued before the next call.

        The next block is copied meanwhile. A device without streams copies each block as it is
        asked for.
        """
        management = comfy.model_management
        copying = management.get_offload_stream(self._device)
        if copying is None:
            tensors = self._tensors_of(block)
            return [management.cast_to_device(x, self._device, x.dtype) for x in tensors]
        computing = management.current_stream(self._device)
        following = (block + 1) % self._total
        for number in (block, following):
            if number not in self._buffers:
                self._fill(number, block, copying, computing)
        buffer = self._buffers[block]
        computing.wait_event(buffer.copied)
        return buffer.tensors

    def _fill(self, block: int, reading: int, copying: Any, computing: Any) -> None:
        """Copy a block into a new buffer, or over a block that is not the one to be read."""
        sources = self._tensors_of(block)
        if len(self._buffers) < 2:
            targets = [torch.empty_like(source, device=self._device) for source in sources]
        else:
            oldest = next(number for number in self._buffers if number != reading)
            targets = self._buffers.pop(oldest).tensors
        # What is queued by now is the last that uses these bytes, for a block or before that.
        copying.wait_event(computing.record_event())
        with _on(copying):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        self._buffers[block] = _Buffer(targets, copying.record_event())

    def release(self) -> None:
        """Free the buffers; the blocks in host memory may be freed after it too."""
        for buffer in self._buffers.values():
            buffer.copied.synchronize()
        self._buffers.clear()


def _on(stream: Any) -> AbstractContextManager:
    """A context in which a stream of the host's is the current one. XPU's and CUDA's differ."""
    return stream.as_context(stream) if hasattr(stream, "as_context") else stream
