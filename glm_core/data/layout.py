"""Editing grids: masks as grid cells, locking, pasting, and which sizes a layout fits."""

import math
from dataclasses import replace
from itertools import product
from typing import TypeVar

import torch
from einops import repeat
from torch import Tensor

from ..errors import BatchError, InputError, SizeError, TokensError
from .cells import parse_cells
from .grids import PIXELS_PER_TOKEN, Grid, Size, preview_grid, token_grid
from .tokens import Forced, Layout, SemanticTokens

HALVES = ("left", "right", "top", "bottom")
LOCKS = ("whole", "masked", "outside mask", "none", *HALVES)
MAX_SUGGESTIONS = 3  # of sizes that a layout fits, in an error sentence
NAMES = {Layout: "layouts", SemanticTokens: "tokens"}
Grids = TypeVar("Grids", Layout, SemanticTokens)


def mask_to_grid(mask: Tensor, grid: Grid) -> Tensor:
    """The cells that a mask covers by at least half.

    Args:
        mask: float [H, W] or [1, ..., H, W] of any size, 0 to 1, stretched over the grid.

    Returns:
        bool [rows, columns], on the CPU.

    Raises:
        GLMImageError: there are several masks, or none; a pixel is NaN or infinite.
    """
    masks = mask.shape[:-2].numel()
    if masks != 1:
        raise BatchError(f"There are {masks} masks in the batch: connect a single one.")
    pixels = mask.reshape(mask.shape[-2:]).to("cpu", torch.float64)
    if not pixels.isfinite().all():
        raise InputError(
            "The mask holds pixels that are no numbers (NaN or infinite): check what made it."
        )
    rows, columns = (_shares(n, cells) for n, cells in zip(pixels.shape, grid, strict=True))
    return rows @ pixels @ columns.T >= 0.5 - 1e-9  # rounding may leave an exact half below 0.5


def grid_to_mask(cells: Tensor, size: Size) -> Tensor:
    """Cells as a mask of `size`: float32 [height, width], 1 in the cells and 0 outside.

    Args:
        cells: bool [rows, columns].
    """
    row, column = (
        torch.arange(side) * n // side for side, n in zip(size, cells.shape, strict=True)
    )
    return cells[row][:, column].float()


def _shares(pixels: int, cells: int) -> Tensor:
    """The share of each cell that each pixel covers along a side: float64 [cells, pixels]."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    starts = torch.arange(pixels, dtype=torch.float64)
    ends = torch.minimum(edges[1:, None], starts + 1)
    covered = (ends - torch.maximum(edges[:-1, None], starts)).clamp(min=0)
    return covered * cells / pixels


def lock(
    layout: Layout, how: str, batch_index: int = 0, mask: Tensor | None = None, cells: str = ""
) -> Layout:
    """A layout with more cells locked, or with none locked, or with those of a text.

    Args:
        how: one of `LOCKS`; "masked" and "outside mask" need a `mask`, see `mask_to_grid`. A half
            is one of `half`.
        batch_index: the layout of the batch to return, from 0; -1 returns all.
        cells: if not empty, exactly these are locked, whatever `how` and `mask` say; see `cells`.

    Raises:
        GLMImageError: the batch has no such layout, `how` needs a mask, or the cells do not fit.
    """
    batch = len(layout.preview)
    if batch_index >= batch:
        found = (
            "is one layout; use 0" if batch == 1 else f"are {batch} layouts; use 0 to {batch - 1}"
        )
        raise BatchError(f"batch_index is {batch_index} and there {found}, or -1 for all.")
    preview = layout.preview if batch_index < 0 else layout.preview[batch_index, None]
    if cells.strip():
        locked = parse_cells(cells, tuple(layout.locked.shape))
    else:
        locked = _locked(layout.locked, how, mask)
    return replace(layout, preview=preview, locked=locked)


def _locked(before: Tensor, how: str, mask: Tensor | None) -> Tensor:
    if how == "whole":
        return torch.ones_like(before)
    if how == "none":
        return torch.zeros_like(before)
    if how in HALVES:
        return before | half(how, tuple(before.shape))
    if mask is None:
        raise InputError(f"To lock '{how}', connect a mask; 'whole' needs none.")
    masked = mask_to_grid(mask, tuple(before.shape))
    return before | (masked if how == "masked" else ~masked)


def half(side: str, grid: Grid) -> Tensor:
    """The cells of one of `HALVES`: bool [rows, columns].

    The middle one of an odd number of rows is in the top half; of columns, in the left one. So top
    and bottom share no cell and leave none out, and neither do left and right.
    """
    rows, columns = grid
    cells = torch.zeros(grid, dtype=torch.bool)
    if side in ("top", "bottom"):
        cells[: (rows + 1) // 2] = True
    else:
        cells[:, : (columns + 1) // 2] = True
    return cells if side in ("top", "left") else ~cells


def compose(
    base: Grids, source: Grids, row: int = 0, column: int = 0, mask: Tensor | None = None
) -> Grids:
    """`base` with cells of `source` pasted into it; cells that fall outside are cut off.

    A cell of a layout is locked if it was locked in `base`, or if the cell pasted there was in
    `source`. Tokens have no note of how they were made: no prompt was that of the whole.

    Args:
        base, source: two layouts or two tokens of one codebook, and of equal batches unless one
            batch is single.
        row, column: where the first cell of `source` goes in `base`; may be negative.
        mask: the part of `source` to paste, see `mask_to_grid`; None pastes all of it.

    Raises:
        GLMImageError: the kinds, codebooks or batches differ, or no cell lands in `base`.
    """
    name, other_name = NAMES[type(base)], NAMES[type(source)]
    if name != other_name:
        raise InputError(
            f"The base is {name} and the source {other_name}: connect two layouts, or the tokens "
            "of two pictures."
        )
    if base.codebook != source.codebook:
        raise TokensError(
            f"The base has a codebook of {base.codebook} and the source one of {source.codebook}: "
            f"compose {name} of one AR model."
        )
    batch = common_batch(f"base {name}", len(base.ids), f"source {name}", len(source.ids))
    grid, pasted = tuple(base.ids.shape[1:]), tuple(source.ids.shape[1:])
    chosen = torch.ones(pasted, dtype=torch.bool) if mask is None else mask_to_grid(mask, pasted)
    rows, source_rows = _overlap("row", row, grid[0], pasted[0])
    columns, source_columns = _overlap("column", column, grid[1], pasted[1])
    chosen = chosen[source_rows, source_columns]

    ids = base.ids.repeat(batch // len(base.ids), 1, 1)
    new = source.ids[:, source_rows, source_columns]
    ids[:, rows, columns] = torch.where(chosen, new, ids[:, rows, columns])
    if isinstance(base, SemanticTokens):
        return replace(base, tokens=ids, info={}, numbers=None, origin=None)
    locked = base.locked.clone()
    locked[rows, columns] |= chosen & source.locked[source_rows, source_columns]
    return replace(base, preview=ids, locked=locked)


def _overlap(name: str, offset: int, length: int, pasted: int) -> tuple[slice, slice]:
    """Slices of `length` cells and of `pasted` cells, for the overlap when pasted at `offset`."""
    start, stop = max(offset, 0), min(offset + pasted, length)
    if start >= stop:
        raise SizeError(
            f"At {name} {offset} no cell of the source lands in the base: use {1 - pasted} to "
            f"{length - 1}."
        )
    return slice(start, stop), slice(start - offset, stop - offset)


def to_tokens(layout: Layout | SemanticTokens) -> SemanticTokens:
    """The previews as the tokens of small images, with 32 px per cell; tokens as they are."""
    if isinstance(layout, SemanticTokens):
        return layout
    height, width = (side * PIXELS_PER_TOKEN for side in layout.locked.shape)
    return SemanticTokens(layout.preview, layout.codebook, height, width, palette=layout.palette)


def locked_cells(layout: Layout, samples: int) -> Forced:
    """A layout's locked cells for `samples` samples, a multiple of its batch.

    Sample i has the cells of layout i modulo the batch.
    """
    return Forced(_for_samples(layout.preview, samples), layout.locked)


def cells_outside(mask: Tensor | None, tokens: SemanticTokens, samples: int) -> Forced:
    """The cells outside a mask (see `mask_to_grid`), for samples as in `locked_cells`.

    Without a mask these are all cells.
    """
    grid = tuple(tokens.tokens.shape[1:])
    inside = torch.zeros(grid, dtype=torch.bool) if mask is None else mask_to_grid(mask, grid)
    return Forced(_for_samples(tokens.tokens, samples), ~inside)


def _for_samples(grids: Tensor, samples: int) -> Tensor:
    return repeat(grids, "b h w -> (again b) h w", again=samples // len(grids))


def common_batch(name: str, count: int, other_name: str, other_count: int) -> int:
    """The larger of two batches that are equal, or one of which is single.

    Raises:
        GLMImageError: they differ and neither is single.
    """
    if count != other_count and 1 not in (count, other_count):
        raise BatchError(
            f"There are {count} {name} and {other_count} {other_name}: give as many of each, or "
            "a single one."
        )
    return max(count, other_count)


def require_one_origin(layout: object | None, references: object | None) -> None:
    """
    Raises:
        InputError: there are both a layout and references.
    """
    if layout is not None and references is not None:
        raise InputError(
            "A layout and references cannot be used together, because an image from references "
            "has no preview stage; disconnect one of them."
        )


def require_layout_fits(layout: Layout, codebook: int, height: int, width: int) -> None:
    """
    Raises:
        GLMImageError: the layout has another codebook, or its preview another shape than that of
            an image of `height` x `width`. The sentence names the layout's own size, and then
            others that would fit.
    """
    require_codebook("layout", layout.codebook, codebook)
    wanted, found = preview_grid(token_grid(height, width)), tuple(layout.locked.shape)
    if found != wanted:
        own, *others = (f"{w}x{h}" for h, w in sizes_that_fit(layout, height * width))
        sizes = (
            f"{own}, another size of that shape such as {' or '.join(others)}" if others else own
        )
        raise SizeError(
            f"The layout is of an image of {own} pixels: its preview has {found[0]}x{found[1]} "
            f"cells (rows x columns), and that of {width}x{height} pixels has "
            f"{wanted[0]}x{wanted[1]}. Use {sizes}, or another layout."
        )


def require_tokens_fit(tokens: SemanticTokens, codebook: int, height: int, width: int) -> None:
    """
    Raises:
        GLMImageError: the tokens have another codebook, or their images another size.
    """
    require_codebook("tokens", tokens.codebook, codebook)
    if (tokens.height, tokens.width) != (height, width):
        raise SizeError(
            f"The tokens are of images of {tokens.width}x{tokens.height} pixels, but {width}x"
            f"{height} are asked for: set the width and height to the tokens' own."
        )


def require_codebook(name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise TokensError(
            f"The codebook of the {name} is {found} and the AR model's {wanted}: make the {name} "
            "with this model."
        )


def sizes_that_fit(layout: Layout, pixels: int) -> list[Size]:
    """Up to `MAX_SUGGESTIONS` image sizes that a layout fits.

    The layout's own is the first; those nearest to `pixels` follow.
    """
    own = token_grid(layout.height, layout.width)
    sides = range(1, 2 * math.isqrt(pixels) // PIXELS_PER_TOKEN + 1)
    fitting = {grid for grid in product(sides, sides) if preview_grid(grid) == preview_grid(own)}
    cells = pixels / PIXELS_PER_TOKEN**2
    nearest = sorted(fitting - {own}, key=lambda grid: abs(math.log(math.prod(grid) / cells)))
    return [
        (rows * PIXELS_PER_TOKEN, columns * PIXELS_PER_TOKEN)
        for rows, columns in [own, *nearest][:MAX_SUGGESTIONS]
    ]
