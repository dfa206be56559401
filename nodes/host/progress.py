"""ComfyUI's progress bar, live preview and interrupt, in the form that glm_core takes them."""

import time
from collections.abc import Callable

import comfy.model_management
import comfy.utils
import torch
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image
from torch import Tensor

from ...glm_core.data.token_image import draw_sheet, sheet_grid
from ...glm_core.data.tokens import UNKNOWN
from .palette import CodePalette

PICTURE_SECONDS = 0.25


def check_interrupt() -> None:
    """Raises the host's InterruptProcessingException where the user has asked to stop."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def progress_bar(total: int) -> Callable[[int, int], None]:
    """`progress(done, total)` of the node that is running."""
    return comfy.utils.ProgressBar(total).update_absolute


class TokenProgress:
    """Progress of the node that writes tokens, with the grid being written as its live preview.

    There is no picture where the host's previews are off, and else at most four a second and one
    of all cells at the end.
    """

    def __init__(self, palette: CodePalette) -> None:
        self._bar = comfy.utils.ProgressBar(0)  # `update` brings the total
        self._palette = palette
        self._on = args.preview_method != LatentPreviewMethod.NoPreviews
        self._due = time.monotonic()
        self._picture: Image.Image | None = None

    def show(self, grids: list[Tensor]) -> None:
        """Keep a picture for the next update; for `grids` see `sample_tokens`."""
        now = time.monotonic()
        if self._on and (now >= self._due or not (grids[-1] == UNKNOWN).any()):
            self._due = now + PICTURE_SECONDS
            written = next((grid for grid in grids if (grid == UNKNOWN).any()), grids[-1])
            self._picture = _picture(written, self._palette.colours, args.preview_size)

    def update(self, done: int, total: int) -> None:
        preview = self._picture and ("PNG", self._picture, None)
        self._bar.update_absolute(done, total, preview)
        self._picture = None


def _picture(tokens: Tensor, palette: Tensor, side: int) -> Image.Image:
    """A sheet of grids [B, rows, columns] with sides of about `side` pixels."""
    rows, columns = tokens.shape[1:]
    below, beside = sheet_grid(*tokens.shape)
    cell_size = max(1, side // max(below * (rows + 1), beside * (columns + 1)))
    sheet = draw_sheet(tokens, palette, cell_size)
    return Image.fromarray((255 * sheet).round().to(torch.uint8).numpy())


def show_text(node_id: str, text: str) -> None:
    """A line under the widgets of a node, while it runs and after."""
    from server import PromptServer  # there only where a server runs

    PromptServer.instance.send_progress_text(text, node_id)
