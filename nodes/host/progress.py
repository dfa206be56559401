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


def show_text(node_id: str, text: str) -> None:
    """A line under the widgets of a node, while it runs and after."""
    from server import PromptServer  # there only where a server runs

    PromptServer.instance.send_progress_text(text, node_id)
