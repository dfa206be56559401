"""One reading of tokens by an AR model on this machine, for their scores."""

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...glm_core.ar.prompt import Prompt, PromptTokenizer
from ...glm_core.ar.score import BLOCK_IDS, ScoringRun, cell_scores
from ...glm_core.data.grids import Size, token_grid
from ...glm_core.split import on_device
from .out_of_memory import explain_out_of_memory, require_room
from .patchers import with_segments
from .progress import check_interrupt, progress_bar

SMALLER_BATCH = "score fewer images at once, or use weight_dtype fp8_e4m3fn, int8 or int4"


def prompt_pairs(
    tokenizer: PromptTokenizer,
    prompt: str,
    against: str | None,
    size: Size,
    sets: Sequence[Sequence[Tensor] | None],
) -> list[tuple[Prompt, Prompt | None]]:
    """Both prompts as ids, for each set of references; see `AnyAR.cell_scores`."""
    grid, read = token_grid(*size), tokenizer.read
    return [
        (
            read(prompt, grid, one),
            None if against is None else read(against, grid, one, may_be_empty=True),
        )
        for one in sets
    ]


def score_run(
    ar: Any, prompts: Sequence[tuple[Prompt, Prompt | None]], grids: dict[str, Tensor]
) -> dict[str, Tensor]:
    """`cell_scores` of grids [B, rows, columns]; sample i has pair i modulo their number.

    Args:
        ar: a HostAR.
    """
    samples = len(next(iter(grids.values())))
    batch = -(-samples // len(prompts))
    cells = sum(grid.shape[1] * grid.shape[2] for grid in grids.values())
    read = [prompt for pair in prompts for prompt in pair if prompt is not None]
    longest = max(map(len, read))
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
        passes = len(read) // len(prompts)
        total = sum(map(len, read)) + passes * samples * cells
        run = ScoringRun(device, ar.dtype, _counting(total), check_interrupt)
        scored = {kind: torch.empty(grid.shape) for kind, grid in grids.items()}
        for i, (prompt, against) in enumerate(prompts):
            own = slice(i, None, len(prompts))
            found = cell_scores(
                ar.patcher.model, prompt, against, [grid[own] for grid in grids.values()], run
            )
            for into, scores in zip(scored.values(), found, strict=True):
                into[own] = scores
        return scored


def _counting(total: int) -> Callable[[int], None]:
    """Progress by what was read since the last call."""
    progress, read = progress_bar(total), 0

    def more(count: int) -> None:
        nonlocal read
        read += count
        progress(read, total)

    return more
