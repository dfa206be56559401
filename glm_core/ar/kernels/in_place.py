"""Whether a kernel may read a layer's parameters."""

import torch
from torch import nn


def is_in_place(layer: nn.Module, device: torch.device) -> bool:
    """Whether parameters lie on the device as they are to be used.

    A host may fetch, cast or patch them in the layer's call, pack them, or replace or surround the
    call. Such a layer has to be called.
    """
    hooks = layer._forward_pre_hooks or layer._forward_hooks
    called_plainly = not ("forward" in vars(layer) or hooks)
    functions = (getattr(layer, name, None) for name in ("weight_function", "bias_function"))
    return (
        called_plainly
        and not any(functions)
        and all(
            type(parameter) is nn.Parameter and parameter.device == device
            for parameter in layer.parameters(recurse=False)
        )
    )
