"""Guesses for a row that is not written yet, so that one step may write several of its cells.

Jacobi decoding (Santilli et al., "Accelerating Transformer Inference for Translation via Parallel
Decoding", ACL 2023) with each position's own noise: a cell's draw depends only on the cells before
it. A guess that equals the draw after right guesses is therefore the token that would have been
written cell by cell.
"""

import torch
from torch import Tensor

from ..data.grids import Grid


def guess_row(above: Tensor | None, preview: Tensor | None, grid: Grid, row: int) -> Tensor | None:
    """Guess a row from finished cells: the row above it and the preview.

    Where the preview shows the same token for both rows, the guess is the cell above; elsewhere it
    is the preview's token.

    Args:
        above: int64 [B, columns], None for the first row.
        preview: int64 [B, ph, pw] of the same image, None where there is none.

    Returns:
        int64 [B, columns], or None if there is nothing to guess from.
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
    """How many of the draws [B, W], made after the guesses [B, W], are final in every sample.

    Those up to the first that was guessed wrong, and that one itself: int64 [].
    """
    right = (draws == guesses).all(dim=0)[:-1]  # whatever the last guess was, nothing followed it
    return right.long().cumprod(dim=0).sum() + 1
