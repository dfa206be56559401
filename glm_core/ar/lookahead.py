"""Guesses for a row that is not written yet, so that one step may write several of its cells.

Jacobi decoding (Santilli et al., "Accelerating Transformer Inference for Translation via Parallel
Decoding", ACL 2023) with each position's own noise: a cell's draw depends only on the cells before
it. So if all guesses before a cell are right, its draw is the token that one step for each cell
would have written.
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
    here = _preview_row(preview, grid, row)
    if above is None:
        return here
    return torch.where(here == _preview_row(preview, grid, row - 1), above, here)


def _preview_row(preview: Tensor, grid: Grid, row: int) -> Tensor:
    """The preview's tokens [B, columns] at the cells of a row of the large grid."""
    rows, columns = preview.shape[1:]
    cells = torch.arange(grid[1], device=preview.device) * columns // grid[1]
    return preview[:, row * rows // grid[0], cells]


def count_final(draws: Tensor, guesses: Tensor) -> Tensor:
    """int64 []: how many of the draws [B, W] are final, given the guesses [B, W] for these cells.

    A draw is final if all guesses before it were right, in every sample. So the first cell that was
    guessed wrong is the last that is final.
    """
    right = (draws == guesses).all(dim=0)[:-1]  # no draw depends on the last guess
    return right.long().cumprod(dim=0).sum() + 1
