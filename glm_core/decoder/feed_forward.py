"""The decoder's linear layers under the names of its checkpoint: projections and feed-forwards."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Layers


class Projection(nn.Module):
    """A linear layer under the key `proj`."""

    def __init__(self, dim: int, hidden: int, layers: Layers) -> None:
        super().__init__()
        self.proj = layers.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class FeedForward(nn.Module):
    """Linear, activation, linear, under the checkpoint's keys `net.0.proj` and `net.2`."""

    def __init__(
        self,
        dim: int,
        inner: int,
        out: int,
        activation: Callable[[Tensor], Tensor],
        layers: Layers,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.net = nn.ModuleList(
            [Projection(dim, inner, layers), nn.Identity(), layers.Linear(inner, out)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.activation(self.net[0](x)))


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
