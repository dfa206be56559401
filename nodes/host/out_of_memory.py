"""Out of memory as a sentence: which stage and device, what it needs, what was free, what helps."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import comfy.model_management
import torch

from ...glm_core.errors import LowMemoryError
from ...glm_core.placement.plan import gib
from .devices import name_of, usable

ALL = 1e30
"""More bytes than any device has: to free so many, the host unloads every model."""


@contextmanager
def explain_out_of_memory(
    stage: str, needs: Mapping[torch.device, float], helps: str, split: str | None = None
) -> Iterator[None]:
    """Replaces the host's out-of-memory error by a sentence, and frees memory for the next prompt.

    The error does not say which device ran out. The sentence names the devices with less free than
    the stage needs, or all of them if none has less: then `needs` was too low.

    Args:
        stage: the subject of the sentence.
        needs: bytes beside the weights, for each device that the stage runs on.
        helps: what the user can change.
        split: the input that divides the stage's layers; fewer layers help if devices are several.

    Raises:
        GLMImageError: a device ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if not _is_oom(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they reference tensors of the failed pass
        free = {device: comfy.model_management.get_free_memory(device) for device in needs}
        comfy.model_management.unload_all_models()
        for device in needs:  # 0.3.75 unloaded only those on its own device
            comfy.model_management.free_memory(ALL, device)
        comfy.model_management.soft_empty_cache()
        raise LowMemoryError(_sentence(stage, needs, free, helps, split)) from None


def require_room(stage: str, needs: Mapping[torch.device, float], helps: str) -> None:
    """Refuses what no device has room for, before anything is allocated.

    Host memory is not refused by the system when it is asked for, but when it is used: then the
    whole server dies.

    Args:
        stage, needs, helps: as in `explain_out_of_memory`.

    Raises:
        GLMImageError: a device has less memory than is needed, even without any model on it.
    """
    for device, need in needs.items():
        free = usable(device)
        if need > free:
            raise LowMemoryError(
                f"{stage} needs {gib(need)} on {name_of(device)}, and {gib(free)} are free; "
                f"{helps}."
            )


def _sentence(
    stage: str,
    needs: Mapping[torch.device, float],
    free: Mapping[torch.device, float],
    helps: str,
    split: str | None,
) -> str:
    short = [device for device in needs if free[device] < needs[device]] or list(needs)
    devices = ", or on ".join(
        f"{name_of(device)}, where it needs {gib(needs[device])} beside its weights and "
        f"{gib(free[device])} were free"
        for device in short
    )
    if split is not None and len(needs) > 1:
        helps += f", or give {' or '.join(map(name_of, short))} fewer layers in {split}"
    return f"{stage} ran out of memory on {devices}; {helps}."


def _is_oom(error: Exception) -> bool:
    """Current hosts recognise more errors of a full device than 0.3.75, which names one type."""
    is_oom = getattr(comfy.model_management, "is_oom", None)
    if is_oom is not None:
        return is_oom(error)
    return isinstance(error, comfy.model_management.OOM_EXCEPTION)
