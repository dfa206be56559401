"""Which part of the tokens' picture a latent is, where a tile upscaler tells it.

Tile upscalers sample each tile with the whole picture's conditioning. Ultimate SD Upscale crops
what is like a picture in it, latents of references among it. So a map of places stands there:
cropped with a tile, it says which tokens are the tile's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from ...glm_core.data.grids import PIXELS_PER_LATENT, PIXELS_PER_TOKEN, Grid, Size
from ...glm_core.errors import BatchError, SizeError

LATENTS_PER_TOKEN = PIXELS_PER_TOKEN // PIXELS_PER_LATENT
PLACES = "reference_latents"
"""The entry of a conditioning: a list of latents, the map of places among them."""
TAKEN = "glm_places"
"""The entry for the map alone, while a sampler runs."""
AXES = 2  # the map's channels: row and column; no model has latents of two channels
TOLERANCE = 0.25
"""Cells of tokens by which a latent may miss the whole picture; tiles are cut at whole latents."""
LEAST, MOST = 0.65, 1.5
"""Cells of the tokens' picture for a cell of the tile; further off, they are of another scale."""


def with_places(latents: Any, grid: Grid) -> list[Tensor]:
    """The entry PLACES for tokens of a grid, beside what other nodes have put there."""
    return [_map_of(grid), *without_places(latents)]


def without_places(latents: Any) -> list[Any]:
    """What other nodes have put into the entry."""
    latents = latents if isinstance(latents, (list, tuple)) else []
    return [latent for latent in latents if not _is_map(latent)]


def take_places(
    conds: dict[str, list[dict[str, Any]]],
) -> dict[str, list[dict[str, Any]]]:
    """Conditionings, as a guider has them by name, with the maps in an entry of their own.

    ComfyUI's training fails at a list of tensors.
    """
    return {name: [_taken(entry) for entry in entries] for name, entries in conds.items()}


def _taken(entry: dict[str, Any]) -> dict[str, Any]:
    places = places_of(entry)
    if places is None:
        return entry
    taken = {key: value for key, value in entry.items() if key != PLACES} | {TAKEN: places}
    others = without_places(entry.get(PLACES))
    return {**taken, PLACES: others} if others else taken


def places_of(entry: dict[str, Any]) -> Tensor | None:
    """The map of a conditioning's entry."""
    taken = entry.get(TAKEN)
    return next(filter(_is_map, entry.get(PLACES) or []), None) if taken is None else taken


def tokens_of_tile(
    tokens: Tensor, size: Size, latents: torch.Size, places: Tensor | None
) -> tuple[Tensor, Size]:
    """The tokens [B, h, w] and the size in pixels of what latents [N, C, H, W] show.

    Args:
        places: the conditioning's map, if it has one.

    Returns:
        tokens and size as they are, unless the latents are said to be a tile

    Raises:
        GLMImageError: a tile is of a picture of another scale, or is not alone in its batch.
    """
    if places is None or places.shape[-2:] != latents[-2:]:
        return tokens, size
    lines = [_line(places[0, 0].mean(1)), _line(places[0, 1].mean(0))]
    sides = list(zip(lines, tokens.shape[1:], strict=True))
    if all(abs(start) + abs(length - cells) < TOLERANCE for (start, length), cells in sides):
        return tokens, size
    tile = [side // LATENTS_PER_TOKEN for side in latents[-2:]]
    if tile != [side / LATENTS_PER_TOKEN for side in latents[-2:]]:
        return tokens, size  # which do not fit, as the check of sizes says
    _check_scale([length for _, length in lines], tile, size)
    if latents[0] != len(tokens):
        raise BatchError(
            f"A batch of {latents[0]} tiles is painted with semantic tokens of {len(tokens)}, and "
            "only the place of the first is known; set the tile upscaler's batch_size to 1."
        )
    rows, columns = (
        ((torch.arange(cells) + 0.5) * length / cells + start).long().clamp(0, side - 1)
        for ((start, length), side), cells in zip(sides, tile, strict=True)
    )
    height, width = (cells * PIXELS_PER_TOKEN for cells in tile)
    return tokens[:, rows][:, :, columns], (height, width)


def _check_scale(shown: Sequence[float], tile: Sequence[int], size: Size) -> None:
    """
    Args:
        shown: the height and width that a tile shows, in cells of the tokens' picture.
        tile: its own, in cells.
        size: of the tokens' picture, in pixels.
    """
    if all(LEAST <= length / cells <= MOST for length, cells in zip(shown, tile, strict=True)):
        return
    shown_height, shown_width = (round(length * PIXELS_PER_TOKEN) for length in shown)
    height, width = (cells * PIXELS_PER_TOKEN for cells in tile)
    raise SizeError(
        f"The latent is a tile of {width} x {height} pixels, and shows {shown_width} x "
        f"{shown_height} of the {size[1]} x {size[0]} that the semantic tokens are of; give the "
        "scaled picture to GLM-Image Encode Tokens at its own size and choose tiles that divide "
        "it, or start from the workflow 'Upscale in tiles'."
    )


def _map_of(grid: Grid) -> Tensor:
    """The centre of each latent in cells of the grid: float32 [1, AXES, H, W]."""
    rows, columns = (
        (torch.arange(cells * LATENTS_PER_TOKEN) + 0.5) / LATENTS_PER_TOKEN for cells in grid
    )
    height, width = len(rows), len(columns)
    return torch.stack(
        (repeat(rows, "h -> 1 h w", w=width), repeat(columns, "w -> 1 h w", h=height)), dim=1
    )


def _is_map(latent: Any) -> bool:
    return isinstance(latent, Tensor) and latent.ndim == 4 and latent.shape[1] == AXES


def _line(centres: Tensor) -> tuple[float, float]:
    """Where a line of latents begins and how long it is, in cells, from its latents' centres.

    Two inner ones are read: scaling a map up repeats its outermost.
    """
    first = len(centres) // 4
    last = len(centres) - 1 - first
    step = ((centres[last] - centres[first]) / max(last - first, 1)).item()
    return centres[first].item() - (first + 0.5) * step, step * len(centres)
