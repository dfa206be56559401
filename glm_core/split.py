"""Segments: layers of a network on a device of their own, outside its module tree."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

Segment = tuple[torch.device, Iterable[tuple[int, nn.Module]]]
"""A device and the layers, with their numbers, that follow each other on it."""


class LayerSegment(nn.ModuleDict):
    """Layers of a split network that follow each other on one device.

    They are outside the network's module tree, so that a host can load and free them separately.
    This module's state dict has the keys that the layers have in the whole network.
    """

    def __init__(
        self, path: str, numbers: range, device: torch.device, make: Callable[[int], nn.Module]
    ) -> None:
        """
        Args:
            path: what precedes a layer's number in the network's keys, as in `transformer_blocks`.
            numbers: the layers' numbers in the network.
            device: where the layers compute; their weights may wait elsewhere.
            make: builds a layer from its number.
        """
        layers = {str(i): make(i) for i in numbers}
        root, *parents = path.split(".")
        tree = nn.ModuleDict(layers)
        for name in reversed(parents):
            tree = nn.ModuleDict({name: tree})
        super().__init__({root: tree})
        self.numbers = numbers
        self.compute_device = device  # hosts set an attribute `device`
        self._prefixes = tuple(f"{path}.{i}." for i in numbers)
        self.layers = tuple(layers.values())  # a tuple, so that they are not registered twice

    def holds(self, key: str) -> bool:
        """Whether a key of the network belongs to these layers."""
        return key.startswith(self._prefixes)


def own_layers(total: int, segments: Sequence[LayerSegment]) -> int:
    """How many of `total` layers the network itself has; the segments have the others."""
    return segments[0].numbers.start if segments else total


def all_segments(
    own: Iterable[nn.Module], device: torch.device, segments: Sequence[LayerSegment]
) -> Iterator[Segment]:
    """All layers of a network in order: its own on `device`, then those of its segments."""
    yield device, enumerate(own)
    for segment in segments:
        yield segment.compute_device, zip(segment.numbers, segment.layers, strict=True)


def on_device(
    device: torch.device, current: torch.device | None = None
) -> AbstractContextManager[None]:
    """A context in which a device is torch's current one.

    Graphs, streams, Triton kernels and weights that a host fetches go to the current device unless
    one is named. CPUs, and other kinds without a current device, are left as they are.

    Args:
        current: the current device, if the caller knows it.
    """
    enter = getattr(getattr(torch, device.type, None), "device", None)
    if device == current or enter is None or device.index is None:
        return nullcontext()
    return enter(device)
