"""How likely tokens are under a prompt, and how much more likely than under another one.

The tokens are read, not drawn (teacher forcing): one pass gives the logits of every cell.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .cache import BlockPass
from .model import ARModel, rope_table
from .prompt import Prompt, positions_with_grids

BLOCK_IDS = 2048
"""Ids that are read together, over all samples: their logits are the largest tensor."""


@dataclass(frozen=True)
class ScoringRun:
    """Where and in what to compute, and whom to notify.

    Args:
        progress: called with the ids read since the last call.
        check_interrupt: called before every pass of the model; raises to stop.
    """

    device: torch.device
    dtype: torch.dtype
    progress: Callable[[int], None] = lambda read: None
    check_interrupt: Callable[[], None] = lambda: None


def cell_scores(
    model: ARModel,
    prompt: Prompt,
    against: Prompt | None,
    grids: Sequence[Tensor],
    run: ScoringRun,
) -> list[Tensor]:
    """log p(cell | prompt, cells before it) - log p(cell | against, cells before it).

    Args:
        against: None leaves the second term out, and the time that it takes.
        grids: int [B, rows, columns] in the order in which they were written: the preview and the
            large grid, or one of them.

    Returns:
        float32 [B, rows, columns] for each grid, on the CPU, in nats.
    """
    with_prompt = log_likelihoods(model, prompt, grids, run)
    if against is None:
        return with_prompt
    with_other = log_likelihoods(model, against, grids, run)
    return [one - other for one, other in zip(with_prompt, with_other, strict=True)]


def log_likelihoods(
    model: ARModel, prompt: Prompt, grids: Sequence[Tensor], run: ScoringRun
) -> list[Tensor]:
    """log p(cell | prompt, cells before it), without temperature, top-k and top-p.

    Args and returns as `cell_scores`.
    """
    shapes = [(grid.shape[1], grid.shape[2]) for grid in grids]
    cells = torch.cat([rearrange(grid, "b h w -> b (h w)") for grid in grids], dim=1)
    cells = cells.to(run.device, torch.int64)
    positions = positions_with_grids(prompt, shapes).to(run.device)
    rope = rope_table(model.config, positions, run.dtype)
    found = torch.cat(list(_read(model, prompt, cells, rope, run)), dim=1).cpu()
    flat = found.split([rows * columns for rows, columns in shapes], dim=1)
    return [
        rearrange(part, "b (h w) -> b h w", h=rows)
        for part, (rows, _) in zip(flat, shapes, strict=True)
    ]


def _read(model: ARModel, prompt: Prompt, cells: Tensor, rope: Tensor, run: ScoringRun):
    """Yields the log-likelihoods of consecutive cells, float32 [B, n]."""
    batch, count = cells.shape
    start = len(prompt)
    run.check_interrupt()
    alone = model.new_cache(1, start, run.device, run.dtype)
    ids = prompt.ids[None].to(run.device)
    logits = model(ids, rope[:, :start], BlockPass(alone, 0), run.dtype)
    yield _log_likelihood(logits.expand(batch, -1, -1), cells[:, :1])
    cache = model.new_cache(batch, start + count, run.device, run.dtype)
    cache.copy_prefix(alone, start)
    run.progress(start + batch)
    step = max(1, BLOCK_IDS // batch)
    for first in range(0, count - 1, step):
        run.check_interrupt()
        last = min(first + step, count - 1)
        positions = slice(start + first, start + last)
        block = BlockPass(cache, positions.start)
        ids = cells[:, first:last]
        logits = model(ids, rope[:, positions], block, run.dtype, tail=last - first)
        yield _log_likelihood(logits, cells[:, first + 1 : last + 1])
        run.progress(ids.numel())


def _log_likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """The logarithm of the share that the softmax of [B, n, codebook] gives ids [B, n]."""
    chosen = logits.gather(-1, ids[..., None])[..., 0].float()
    return chosen - logits.float().logsumexp(dim=-1)


def mean_of_cells(values: Sequence[Tensor], counted: Sequence[Tensor]) -> Tensor:
    """One mean a sample over the counted cells of all grids; NaN if there are none.

    Args:
        values: float32 [B, rows, columns] for each grid.
        counted: bool [B or 1, rows, columns] for each grid.

    Returns:
        float64 [B]
    """
    sums = [
        torch.where(mask, value.double(), 0).sum((1, 2))
        for value, mask in zip(values, counted, strict=True)
    ]
    return sum(sums) / sum(mask.sum((1, 2)) for mask in counted)
