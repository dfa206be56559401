"""Layers to build a network from, bound to one device and one dtype."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


class Layers:
    """The layers of `operations`, made on a device and in a dtype: `layers.Linear(a, b)`.

    A host gives its own `operations`, which may cast, offload or patch the weights.
    """

    def __init__(self, operations: Any, device: Any, dtype: torch.dtype | None) -> None:
        """operations: has the classes of `torch.nn` that a network uses, under the same names."""
        self._operations = operations
        self._device = device
        self._dtype = dtype

    def __getattr__(self, name: str) -> Callable[..., nn.Module]:
        layer = getattr(self._operations, name)
        return partial(layer, device=self._device, dtype=self._dtype)
