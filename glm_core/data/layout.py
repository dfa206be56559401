"""Editing layouts: locking cells, pasting one layout into another, masks brought to the grid."""

import math
from dataclasses import replace
from itertools import product

import torch
from einops import repeat
from torch import Tensor

from ..errors import GLMImageError
from .grids import PIXELS_PER_TOKEN, Grid, preview_grid, token_grid
from .tokens import Forced, Layout, SemanticTokens

LOCKS = ("whole", "masked", "outside mask", "none")
SIZES_NAMED = 3


def mask_to_grid(mask: Tensor, grid: Grid) -> Tensor:
    """Cells of which a mask covers at least half.

    Args:
        mask: float [H, W] or [1, H, W] of any size, 0 to 1, stretched over the grid.

    Returns:
        bool [rows, columns], on the CPU.

    Raises:
        GLMImageError: there are several masks, or none.
    """
    if mask.ndim == 3 and len(mask) != 1:
        raise GLMImageError(f"There are {len(mask)} masks in the batch: connect a single one.")
    whole = mask.reshape(mask.shape[-2:]).to("cpu", torch.float64)
    rows, columns = (_overlaps(n, cells) for n, cells in zip(whole.shape, grid, strict=True))
    return rows @ whole @ columns.T >= 0.5 - 1e-9  # what rounding takes off an exact half


def _overlaps(pixels: int, cells: int) -> Tensor:
    """Share of each cell that each pixel covers, along one side: float64 [cells, pixels]."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    starts = torch.arange(pixels, dtype=torch.float64)
    ends = torch.minimum(edges[1:, None], starts + 1)
    covered = (ends - torch.maximum(edges[:-1, None], starts)).clamp(min=0)
    return covered * cells / pixels


def lock(layout: Layout, how: str, batch_index: int = 0, mask: Tensor | None = None) -> Layout:
    """Lock cells beside those that are locked already, or unlock all.

    Args:
        how: of `LOCKS`; masked and outside mask need `mask`, see `mask_to_grid`.
        batch_index: which layout of the batch, from 0; -1 keeps all.

    Raises:
        GLMImageError: there is no such layout, or no mask where one is needed.
    """
    batch = len(layout.preview)
    if batch_index >= batch:
        raise GLMImageError(
            f"batch_index is {batch_index} and there are {batch} layouts; use 0 to {batch - 1}, "
            "or -1 for all."
        )
    preview = layout.preview if batch_index < 0 else layout.preview[batch_index, None]
    return replace(layout, preview=preview, locked=_locked(layout.locked, how, mask))


def _locked(before: Tensor, how: str, mask: Tensor | None) -> Tensor:
    if how == "whole":
        return torch.ones_like(before)
    if how == "none":
        return torch.zeros_like(before)
    if mask is None:
        raise GLMImageError(f"To lock '{how}', connect a mask; 'whole' needs none.")
    masked = mask_to_grid(mask, tuple(before.shape))
    return before | (masked if how == "masked" else ~masked)


def compose(
    base: Layout, source: Layout, row: int = 0, column: int = 0, mask: Tensor | None = None
) -> Layout:
    """Paste cells of `source` into `base`; what falls outside of it is cut off.

    Locks are kept: a cell is locked where it was in `base`, or where what is pasted was in
    `source`.

    Args:
        base, source: of one codebook; batches alike, or a single one for all of the other's.
        row, column: cell of `base` under the source's first; may be negative.
        mask: which part of `source` is pasted, see `mask_to_grid`; all of it without one.

    Raises:
        GLMImageError: the codebooks or batches differ, or no cell lands in `base`.
    """
    if base.codebook != source.codebook:
        raise GLMImageError(
            f"The base has a codebook of {base.codebook} and the source one of {source.codebook}: "
            "compose layouts of one AR model."
        )
    batch = common_batch("base layouts", len(base.preview), "source layouts", len(source.preview))
    grid, piece = tuple(base.locked.shape), tuple(source.locked.shape)
    chosen = torch.ones(piece, dtype=torch.bool) if mask is None else mask_to_grid(mask, piece)
    rows, source_rows = _overlap("row", row, grid[0], piece[0])
    columns, source_columns = _overlap("column", column, grid[1], piece[1])
    chosen = chosen[source_rows, source_columns]

    preview = base.preview.repeat(batch // len(base.preview), 1, 1)
    here, there = (slice(None), rows, columns), (slice(None), source_rows, source_columns)
    preview[here] = torch.where(chosen, source.preview[there], preview[here])
    locked = base.locked.clone()
    locked[rows, columns] |= chosen & source.locked[source_rows, source_columns]
    return replace(base, preview=preview, locked=locked)


def _overlap(name: str, offset: int, length: int, piece: int) -> tuple[slice, slice]:
    """Where a piece at `offset` lies in `length` cells: the slice there, and of the piece."""
    start, stop = max(offset, 0), min(offset + piece, length)
    if start >= stop:
        raise GLMImageError(
            f"At {name} {offset} no cell of the source lands in the base: use {1 - piece} to "
            f"{length - 1}."
        )
    return slice(start, stop), slice(start - offset, stop - offset)


def to_tokens(layout: Layout) -> SemanticTokens:
    """The previews as the tokens of small images, 32 px a cell."""
    height, width = (side * PIXELS_PER_TOKEN for side in layout.locked.shape)
    return SemanticTokens(layout.preview, layout.codebook, height, width)


def locked_cells(layout: Layout, samples: int) -> Forced:
    """A layout's locked cells for `samples` samples, a multiple of its batch.

    Sample i has layout i modulo their number: all layouts once, then all again.
    """
    return Forced(_for_samples(layout.preview, samples), layout.locked)


def cells_outside(mask: Tensor, tokens: SemanticTokens, samples: int) -> Forced:
    """All cells but those under a mask (see `mask_to_grid`), each sample's as `locked_cells`."""
    inside = mask_to_grid(mask, tuple(tokens.tokens.shape[1:]))
    return Forced(_for_samples(tokens.tokens, samples), ~inside)


def _for_samples(grids: Tensor, samples: int) -> Tensor:
    return repeat(grids, "b h w -> (again b) h w", again=samples // len(grids))


def common_batch(name: str, count: int, other_name: str, other_count: int) -> int:
    """The batch of two inputs of which each is single or as large as the other.

    Raises:
        GLMImageError: they are not.
    """
    if count != other_count and 1 not in (count, other_count):
        raise GLMImageError(
            f"There are {count} {name} and {other_count} {other_name}: give as many of each, or "
            "a single one."
        )
    return max(count, other_count)


def require_layout_fits(layout: Layout, codebook: int, height: int, width: int) -> None:
    """
    Raises:
        GLMImageError: the layout is of another codebook, or its preview of another shape than that
            of an image of `height` x `width`; names sizes that would fit.
    """
    require_codebook("layout", layout.codebook, codebook)
    wanted, found = preview_grid(token_grid(height, width)), tuple(layout.locked.shape)
    if found != wanted:
        sizes = " or ".join(f"{w}x{h}" for h, w in sizes_that_fit(layout, height * width))
        raise GLMImageError(
            f"The layout's preview has {found[0]}x{found[1]} cells (rows x columns), but that of "
            f"an image of {width}x{height} pixels has {wanted[0]}x{wanted[1]}: use a size such as "
            f"{sizes}, or another layout."
        )


def require_tokens_fit(tokens: SemanticTokens, codebook: int, height: int, width: int) -> None:
    """
    Raises:
        GLMImageError: the tokens are of another codebook or of images of another size.
    """
    require_codebook("tokens", tokens.codebook, codebook)
    if (tokens.height, tokens.width) != (height, width):
        raise GLMImageError(
            f"The tokens are of images of {tokens.width}x{tokens.height} pixels, but {width}x"
            f"{height} are asked for: set the width and height to the tokens' own."
        )


def require_codebook(name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise GLMImageError(
            f"The codebook of the {name} is {found} and the AR model's {wanted}: make the {name} "
            "with this model."
        )


def sizes_that_fit(layout: Layout, pixels: int) -> list[tuple[int, int]]:
    """Up to `SIZES_NAMED` sizes (height, width) of images that a layout fits.

    Its own is among those considered; those with about as many `pixels` come first.
    """
    own = token_grid(layout.height, layout.width)
    sides = range(1, 2 * math.isqrt(pixels) // PIXELS_PER_TOKEN + 1)
    fitting = {grid for grid in product(sides, sides) if preview_grid(grid) == preview_grid(own)}
    cells = pixels / PIXELS_PER_TOKEN**2
    nearest = sorted(fitting | {own}, key=lambda grid: abs(math.log(math.prod(grid) / cells)))
    return [
        (rows * PIXELS_PER_TOKEN, columns * PIXELS_PER_TOKEN)
        for rows, columns in nearest[:SIZES_NAMED]
    ]
