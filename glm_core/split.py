"""Layers that lie apart from their network: on a device of their own, under its keys."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

Stretch = tuple[torch.device, Iterable[tuple[int, nn.Module]]]
"""Layers with their numbers that follow each other on one device."""


class LayerRange(nn.ModuleDict):
    """Some layers that follow each other.

    They are no part of the network's module tree, so that a host can load and free them apart; the
    keys of this module's state dict are those that the whole network gives the layers.
    """

    def __init__(
        self, path: str, numbers: range, home: torch.device, make: Callable[[int], nn.Module]
    ) -> None:
        """
        Args:
            path: before a layer's number in the network's keys, as in `transformer_blocks`.
            numbers: of the layers.
            home: where they compute, wherever their weights lie between uses.
            make: builds a layer from its number.
        """
        layers = {str(i): make(i) for i in numbers}
        root, *parents = path.split(".")
        tree = nn.ModuleDict(layers)
        for name in reversed(parents):
            tree = nn.ModuleDict({name: tree})
        super().__init__({root: tree})
        self.numbers = numbers
        self.home = home
        self._prefixes = tuple(f"{path}.{i}." for i in numbers)
        self.layers = tuple(layers.values())  # in a tuple they are not registered once more

    def holds(self, key: str) -> bool:
        """Whether a key of the network's belongs to these layers."""
        return key.startswith(self._prefixes)


def own_layers(total: int, ranges: Sequence[LayerRange]) -> int:
    """How many layers a network keeps of `total`, where ranges hold the others."""
    return ranges[0].numbers.start if ranges else total


def stretches(
    own: Iterable[nn.Module], home: torch.device, ranges: Sequence[LayerRange]
) -> Iterator[Stretch]:
    """All layers of a network whose own compute at `home`, in order."""
    yield home, enumerate(own)
    for part in ranges:
        yield part.home, zip(part.numbers, part.layers, strict=True)


def hop(x: Tensor, device: torch.device) -> Tensor:
    """To where the next layers compute; nothing where that is here."""
    return x.to(device)


def current(device: torch.device) -> AbstractContextManager:
    """Makes a device torch's current one, whose streams and kernels are meant where none is named:
    by graphs, by hosts that fetch weights beside the work, and by kernels that are not torch's.

    Kinds of which there is one at most have no such thing.
    """
    enter = getattr(getattr(torch, device.type, None), "device", None)
    return nullcontext() if enter is None or device.index is None else enter(device)


def visiting(device: torch.device, home: torch.device) -> AbstractContextManager:
    """`current` for layers away from home, which is the current device already."""
    return nullcontext() if device == home else current(device)
