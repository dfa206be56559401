"""Out of memory, said in a sentence: which stage, how much it needed, what was free, what helps."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import torch

from ...glm_core.errors import GLMImageError
from ...glm_core.placement import gib


@contextmanager
def memory_for(stage: str, device: torch.device, needed: float, helps: str) -> Iterator[None]:
    """Turns the host's out-of-memory error into a sentence, and makes room for the next prompt.

    Args:
        stage: what is run, as the sentence's subject.
        needed: bytes, beside the weights.
        helps: what the person can change.

    Raises:
        GLMImageError: the device's memory did not suffice.
    """
    try:
        yield
    except Exception as error:
        if not _is_oom(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed pass
        free = comfy.model_management.get_free_memory(device)
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        raise GLMImageError(
            f"{stage} ran out of memory on {device}: it needs {gib(needed)} beside its "
            f"weights, and {gib(free)} were free; {helps}."
        ) from None


def _is_oom(error: Exception) -> bool:
    """Current hosts know more errors of a full device than the one that 0.3.75 names."""
    known = getattr(comfy.model_management, "is_oom", None)
    if known is not None:
        return known(error)
    return isinstance(error, comfy.model_management.OOM_EXCEPTION)
