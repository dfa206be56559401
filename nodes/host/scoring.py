"""How much tokens speak for their prompt, by the AR model that wrote them."""

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import torch
from torch import Tensor

from ...glm_core.ar.prompt import Prompt
from ...glm_core.ar.score import BLOCK_IDS, ScoringRun, log_ratios, mean_of_cells
from ...glm_core.data.cells import parse_cells
from ...glm_core.data.grids import token_grid
from ...glm_core.data.layout import (
    common_batch,
    require_codebook,
    require_layout_fits,
    require_one_origin,
)
from ...glm_core.data.references import References
from ...glm_core.data.tokens import Layout, SemanticTokens
from ...glm_core.errors import InputError
from ...glm_core.split import on_device
from .ar import HostAR
from .out_of_memory import explain_out_of_memory, require_room
from .patchers import with_segments
from .progress import check_interrupt, progress_bar

SMALLER_BATCH = "score fewer images at once, or use weight_dtype fp8_e4m3fn, int8 or int4"
PREVIEW, LARGE = "preview", "tokens"


@dataclass(frozen=True)
class Grids:
    """Grids of one kind, for every sample, and which of their cells were drawn.

    cells: int32 [B, rows, columns].
    drawn: bool [rows, columns]; the others were locked or forced.
    """

    cells: Tensor
    drawn: Tensor


@dataclass(frozen=True)
class Scores:
    """The scores of a batch.

    means: nats a drawn cell, NaN where no cell was drawn, for each sample.
    ratios: float32 [B, rows, columns] of nats for each kind of grid, in the order of writing.
    grids: what was scored.
    """

    means: list[float]
    ratios: dict[str, Tensor]
    grids: dict[str, Grids]

    def mean(self, kind: str, sample: int) -> float:
        """Of the drawn cells of one grid."""
        ratios = self.ratios[kind][sample, None]
        return mean_of_cells([ratios], [self.grids[kind].drawn]).item()


def score_tokens(
    ar: HostAR,
    prompt: str,
    against: str,
    tokens: SemanticTokens | None,
    layout: Layout | None,
    references: References | None,
) -> Scores:
    """
    Args:
        against: the prompt to compare with; empty is the scaffold without text.

    Raises:
        GLMImageError: the prompt is empty; what was connected does not belong together, or is of
            another model.
    """
    grids, (height, width) = _grids(ar, tokens, layout, references)
    grid, sets = token_grid(height, width), [None] if references is None else references.sets

    def read(text: str, images: tuple | None, may_be_empty: bool = False) -> Prompt:
        if images is None:
            return ar.tokenizer.text_to_image(text, grid, may_be_empty=may_be_empty)
        cells = [image.tokens for image in images]
        return ar.tokenizer.image_to_image(text, grid, cells, may_be_empty=may_be_empty)

    prompts = [(read(prompt, one), read(against, one, may_be_empty=True)) for one in sets]
    ratios = _ratios(ar, prompts, {kind: one.cells for kind, one in grids.items()})
    means = mean_of_cells(list(ratios.values()), [one.drawn for one in grids.values()])
    return Scores(means.tolist(), ratios, grids)


def _grids(
    ar: HostAR,
    tokens: SemanticTokens | None,
    layout: Layout | None,
    references: References | None,
) -> tuple[dict[str, Grids], tuple[int, int]]:
    """What is scored, in the order of writing, for as many samples each; and the image's size."""
    require_one_origin(layout, references)
    if tokens is None:
        if layout is None:
            raise InputError(
                "Score Tokens has nothing to score; connect a layout, or tokens with their layout."
            )
        require_codebook("layout", layout.codebook, ar.config.codebook)
        return {PREVIEW: _preview(layout)}, (layout.height, layout.width)
    require_codebook("tokens", tokens.codebook, ar.config.codebook)
    size = tokens.height, tokens.width
    large = Grids(tokens.tokens, ~_forced(tokens))
    if references is not None:
        require_codebook("references", references.codebook, ar.config.codebook)
        count = common_batch(
            "images in tokens", len(large.cells), "reference sets", len(references.sets)
        )
        return {LARGE: _repeated(large, count)}, size
    if layout is None:
        raise InputError(
            "The tokens were written after a preview, which their score needs; connect the layout "
            "that GLM-Image Sample Tokens gave with them, or the references they were made from."
        )
    require_layout_fits(layout, ar.config.codebook, *size)
    count = common_batch("images in tokens", len(large.cells), "layouts", len(layout.preview))
    return {PREVIEW: _repeated(_preview(layout), count), LARGE: _repeated(large, count)}, size


def _preview(layout: Layout) -> Grids:
    return Grids(layout.preview, ~layout.locked)


def _forced(tokens: SemanticTokens) -> Tensor:
    """bool [rows, columns]: the cells that a sampler was given, by its own note."""
    noted = tokens.info.get("forced", "") if isinstance(tokens.info, dict) else ""
    return parse_cells(noted if isinstance(noted, str) else "", tuple(tokens.tokens.shape[1:]))


def _repeated(grids: Grids, count: int) -> Grids:
    return Grids(grids.cells.repeat(count // len(grids.cells), 1, 1), grids.drawn)


def _ratios(
    ar: HostAR, prompts: list[tuple[Prompt, Prompt]], grids: dict[str, Tensor]
) -> dict[str, Tensor]:
    """`log_ratios` of grids [B, rows, columns]; sample i has pair i modulo their number."""
    samples = len(next(iter(grids.values())))
    batch = -(-samples // len(prompts))
    cells = sum(grid.shape[1] * grid.shape[2] for grid in grids.values())
    longest = max(len(prompt) for pair in prompts for prompt in pair)
    block = max(longest, batch, BLOCK_IDS)
    logits = 3 * block * ar.config.visual_size * torch.float32.itemsize
    needs = {
        device: need + logits
        for device, need in ar.memory_required(batch, longest + cells, block).items()
    }
    require_room("The AR model", needs, SMALLER_BATCH)
    device = ar.patcher.load_device
    with (
        on_device(device),
        explain_out_of_memory("The AR model", needs, SMALLER_BATCH, split="ar_split"),
    ):
        comfy.model_management.load_models_gpu(
            with_segments(ar.patcher), memory_required=max(needs.values())
        )
        total = sum(len(p) + len(q) for p, q in prompts) + 2 * samples * cells
        run = ScoringRun(device, ar.dtype, _counting(total), check_interrupt)
        scored = {kind: torch.empty(grid.shape) for kind, grid in grids.items()}
        for i, (prompt, against) in enumerate(prompts):
            own = slice(i, None, len(prompts))
            found = log_ratios(
                ar.patcher.model, prompt, against, [grid[own] for grid in grids.values()], run
            )
            for into, ratios in zip(scored.values(), found, strict=True):
                into[own] = ratios
        return scored


def _counting(total: int) -> Callable[[int], None]:
    """Progress by what was read since the last call."""
    progress, read = progress_bar(total), 0

    def more(count: int) -> None:
        nonlocal read
        read += count
        progress(read, total)

    return more
