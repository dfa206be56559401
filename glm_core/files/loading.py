"""From a component on disk to a network that holds its weights."""

from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import WeightsError
from .component import Component

Network = TypeVar("Network", bound=nn.Module)


def load_network(
    network: type[Network],
    config: Any,
    component: Component,
    device: torch.device,
    dtype: torch.dtype,
    ignored: tuple[str, ...] = (),
) -> Network:
    """A network of plain layers with a component's weights.

    Args:
        config: the class of the network's config.
        ignored: prefixes of stored keys that belong to another network.

    Raises:
        GLMImageError: the component is quantised, or does not fit its config.
    """
    require_plain(component)
    empty = network(config.from_dict(component.config), device="meta")
    component.check({key: value.shape for key, value in empty.state_dict().items()}, ignored)
    empty.load_state_dict(component.state_dict(ignored), assign=True)
    return empty.to(device, dtype).eval().requires_grad_(False)


def require_plain(component: Component) -> None:
    """Refuse a component that is stored in a quantised format."""
    if component.quantisation is not None:
        raise WeightsError(
            f"{component.path} holds the {component.title} in {component.quantisation}, which "
            "plain layers cannot hold; load the snapshot it was made from."
        )
