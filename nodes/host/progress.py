"""ComfyUI's progress bar, live preview and interrupt, as callables for glm_core."""

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
    """Raises ComfyUI's InterruptProcessingException if the user has asked to stop."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def progress_bar(total: int) -> Callable[[int, int], None]:
    """`progress(done, total)` for the running node."""
    return comfy.utils.ProgressBar(total).update_absolute


class TokenProgress:
    """Progress of a node that writes tokens, with a live picture of the grid.

    At most four pictures a second, and one of the whole grid at the end; none if ComfyUI's previews
    are off.
    """

    def __init__(self, palette: CodePalette, parts: int = 1) -> None:
        """parts: how many runs one bar shows."""
        self._bar = comfy.utils.ProgressBar(0)  # `update` sets the total
        self._parts, self._part = parts, 0
        self._palette = palette
        self._on = args.preview_method != LatentPreviewMethod.NoPreviews
        self._due = time.monotonic()
        self._picture: Image.Image | None = None

    def show(self, grids: list[Tensor]) -> None:
        """Draws a picture for the next update; for `grids` see `sample_tokens`."""
        now = time.monotonic()
        if self._on and (now >= self._due or not (grids[-1] == UNKNOWN).any()):
            self._due = now + PICTURE_SECONDS
            written = next((grid for grid in grids if (grid == UNKNOWN).any()), grids[-1])
            self._picture = _picture(written, self._palette.colours, args.preview_size)

    def update(self, done: int, total: int) -> None:
        preview = self._picture and ("PNG", self._picture, None)
        self._bar.update_absolute(self._part * total + done, self._parts * total, preview)
        self._picture = None

    def next_part(self) -> None:
        """The run has ended."""
        self._part += 1


def _picture(tokens: Tensor, palette: Tensor, side: int) -> Image.Image:
    """A sheet of grids [B, rows, columns], its longer side about `side` pixels."""
    rows, columns = tokens.shape[1:]
    below, beside = sheet_grid(*tokens.shape)
    cell_size = max(1, side // max(below * (rows + 1), beside * (columns + 1)))
    sheet = draw_sheet(tokens, palette, cell_size)
    return Image.fromarray((255 * sheet).round().to(torch.uint8).numpy())


def show_text(node_id: str, text: str) -> None:
    """Shows lines under the widgets of a node, also one of ComfyUI's own, while it runs.

    Current pages take them away when the prompt ends; what a node says itself is its `ui`.
    """
    from server import PromptServer  # only a running server has it

    PromptServer.instance.send_progress_text(text, node_id)
