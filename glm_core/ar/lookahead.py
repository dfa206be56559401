"""Guesses for a row that is not written yet, by which one pass may write several of its cells.

Jacobi decoding (Santilli et al., "Accelerating Transformer Inference for Translation via Parallel
Decoding", ACL 2023) with each position's own noise: a cell's draw is fixed by what comes before it,
so a guess that equals its own draw is the token that cell by cell would have been written.
"""

import torch
from torch import Tensor

from ..data.grids import Grid


def guess_row(above: Tensor | None, preview: Tensor | None, grid: Grid, row: int) -> Tensor | None:
    """A row of a grid from what is finished: the row above it, or the preview under it.

    The row above, where the preview shows the same in both rows; else the preview's own token.

    Args:
        above: int64 [B, columns], None for the first row.
        preview: int64 [B, ph, pw] of the same image, None where there is none.

    Returns:
        int64 [B, columns], or None where there is nothing to guess from.
    """
    if preview is None:
        return above
    here = _under(preview, grid, row)
    if above is None:
        return here
    return torch.where(here == _under(preview, grid, row - 1), above, here)


def _under(preview: Tensor, grid: Grid, row: int) -> Tensor:
    """The preview's tokens [B, columns] at the cells of a row of the large grid."""
    rows, columns = preview.shape[1:]
    cells = torch.arange(grid[1], device=preview.device) * columns // grid[1]
    return preview[:, row * rows // grid[0], cells]


def accepted(draws: Tensor, guesses: Tensor) -> Tensor:
    """How many of the draws [B, W] are final in every sample, given the guesses [B, W] that they
    were drawn after: those up to the first that was guessed wrong, and that one. int64 [].
    """
    right = (draws == guesses).all(dim=0)[:-1]  # whatever the last guess was, nothing followed it
    return right.long().cumprod(dim=0).sum() + 1
