"""Layers that lie apart from their network: on a device of their own, under its keys."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

Segment = tuple[torch.device, Iterable[tuple[int, nn.Module]]]
"""Layers with their numbers that follow each other on one device."""


class LayerSegment(nn.ModuleDict):
    """Some layers that follow each other.

    They are no part of the network's module tree, so that a host can load and free them apart; the
    keys of this module's state dict are those that the whole network gives the layers.
    """

    def __init__(
        self, path: str, numbers: range, device: torch.device, make: Callable[[int], nn.Module]
    ) -> None:
        """
        Args:
            path: before a layer's number in the network's keys, as in `transformer_blocks`.
            numbers: of the layers.
            device: where they compute, wherever their weights lie between uses.
            make: builds a layer from its number.
        """
        layers = {str(i): make(i) for i in numbers}
        root, *parents = path.split(".")
        tree = nn.ModuleDict(layers)
        for name in reversed(parents):
            tree = nn.ModuleDict({name: tree})
        super().__init__({root: tree})
        self.numbers = numbers
        self.compute_device = device  # `device` is an attribute that hosts set
        self._prefixes = tuple(f"{path}.{i}." for i in numbers)
        self.layers = tuple(layers.values())  # in a tuple they are not registered once more

    def holds(self, key: str) -> bool:
        """Whether a key of the network's belongs to these layers."""
        return key.startswith(self._prefixes)


def own_layers(total: int, segments: Sequence[LayerSegment]) -> int:
    """How many layers a network keeps of `total`, where segments hold the others."""
    return segments[0].numbers.start if segments else total


def all_segments(
    own: Iterable[nn.Module], device: torch.device, segments: Sequence[LayerSegment]
) -> Iterator[Segment]:
    """All layers of a network in order: its own, which compute on `device`, then the segments'."""
    yield device, enumerate(own)
    for segment in segments:
        yield segment.compute_device, zip(segment.numbers, segment.layers, strict=True)


def on_device(
    device: torch.device, current: torch.device | None = None
) -> AbstractContextManager[None]:
    """Makes a device torch's current one, on which torch allocates graphs and streams, hosts fetch
    weights, and Triton launches kernels where no device is named.

    Kinds of which there is one at most have no such thing.

    Args:
        current: the device that is the current one already, where that is known.
    """
    enter = getattr(getattr(torch, device.type, None), "device", None)
    if device == current or enter is None or device.index is None:
        return nullcontext()
    return enter(device)
