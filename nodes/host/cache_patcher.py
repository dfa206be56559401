"""A reference cache under ComfyUI's patcher, so that it is loaded and evicted like a model."""

from copy import deepcopy
from typing import Any
from weakref import finalize

import comfy.model_management
import torch

from ...glm_core.decoder.reference_cache import ReferenceCache
from .devices import Placement, placement_on
from .patchers import make_patcher


def make_cache_patcher(cache: ReferenceCache, device: torch.device, streamed: bool) -> Any:
    """The patcher of a cache that is read on the device.

    Args:
        streamed: whether the cache stays in host memory, pinned if copies can then overlap.
    """
    if not streamed:
        return load_cache_patcher(cache, device, placement_on(device).offload)
    if not comfy.model_management.is_device_cpu(device):
        _pin(cache)
    host = torch.device("cpu")
    return load_cache_patcher(cache, host, host)


def _pin(cache: ReferenceCache) -> None:
    """Pin the cache where it lies, as far as the host's budget and flags allow, until it is freed.

    torch's `pin_memory` would copy it, round every size up to a power of two, and know no budget.
    """
    for parameter in cache.parameters():
        if comfy.model_management.pin_memory(parameter):
            # The view holds the memory until it is unpinned.
            unpin = comfy.model_management.unpin_memory
            finalize(parameter, unpin, parameter.detach()).atexit = False


def load_cache_patcher(
    cache: ReferenceCache,
    device: torch.device,
    offload: torch.device,
    disable_dynamic: bool = False,
) -> Any:
    """The cache's patcher; the factory with which current hosts rebuild it makes a copy.

    It is never a dynamic one: those fetch a layer's weights in the layer's own `forward`.
    """
    patcher = make_patcher(cache, Placement(device, offload), disable_dynamic=True)
    patcher.cached_patcher_init = (_copy_patcher, (cache, device, offload))
    return patcher


def _copy_patcher(
    cache: ReferenceCache, *devices: torch.device, disable_dynamic: bool = False
) -> Any:
    return load_cache_patcher(deepcopy(cache), *devices, disable_dynamic)
