"""ComfyUI's progress bar and interrupt, in the form that glm_core takes them."""

from collections.abc import Callable

import comfy.model_management
import comfy.utils


def check_interrupt() -> None:
    """Raises the host's InterruptProcessingException where the user has asked to stop."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def progress_bar(total: int) -> Callable[[int, int], None]:
    """`progress(done, total)` of the node that is running."""
    return comfy.utils.ProgressBar(total).update_absolute
