"""Out of memory, said in a sentence: which stage and device, what it needs, what was free, what
helps."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import comfy.model_management
import torch

from ...glm_core.errors import GLMImageError
from ...glm_core.placement.plan import gib
from .devices import name_of

ALL = 1e30
"""Bytes that no device has: so much room is made by unloading every model on it."""


@contextmanager
def memory_for(
    stage: str, needs: Mapping[torch.device, float], helps: str, split: str | None = None
) -> Iterator[None]:
    """Turns the host's out-of-memory error into a sentence, and makes room for the next prompt.

    The error does not say whose memory ran out. Of several devices the sentence names those with
    less free than they need, or all where none is: then more was needed than is known here.

    Args:
        stage: what is run, as the sentence's subject.
        needs: bytes beside the weights, of each device that the stage runs on.
        helps: what the person can change.
        split: the setting that divides the stage's layers, which helps on several devices.

    Raises:
        GLMImageError: a device's memory did not suffice.
    """
    try:
        yield
    except Exception as error:
        if not _is_oom(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed pass
        free = {device: comfy.model_management.get_free_memory(device) for device in needs}
        comfy.model_management.unload_all_models()
        for device in needs:  # 0.3.75 has unloaded those on its own device only
            comfy.model_management.free_memory(ALL, device)
        comfy.model_management.soft_empty_cache()
        raise GLMImageError(_sentence(stage, needs, free, helps, split)) from None


def _sentence(
    stage: str,
    needs: Mapping[torch.device, float],
    free: Mapping[torch.device, float],
    helps: str,
    split: str | None,
) -> str:
    short = [device for device in needs if free[device] < needs[device]] or list(needs)
    places = ", or on ".join(
        f"{name_of(device)}, where it needs {gib(needs[device])} beside its weights and "
        f"{gib(free[device])} were free"
        for device in short
    )
    if split is not None and len(needs) > 1:
        helps += f", or give {' or '.join(map(name_of, short))} fewer layers in {split}"
    return f"{stage} ran out of memory on {places}; {helps}."


def _is_oom(error: Exception) -> bool:
    """Current hosts know more errors of a full device than the one that 0.3.75 names."""
    known = getattr(comfy.model_management, "is_oom", None)
    if known is not None:
        return known(error)
    return isinstance(error, comfy.model_management.OOM_EXCEPTION)
