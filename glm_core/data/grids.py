"""Token grids: an image's large grid and preview, and the position of each cell.

Formulas: `GlmImageProcessor._get_target_shape` and `GlmImageModel.get_rope_index` of transformers.
"""

import math

import torch
from einops import repeat
from torch import Tensor

from ..errors import SizeError

Grid = tuple[int, int]
"""(rows, columns)"""

Size = tuple[int, int]
"""(height, width), in pixels unless said otherwise"""

PIXELS_PER_TOKEN = 32
PIXELS_PER_LATENT = 8
"""Along each side of a latent cell, by GLM-Image's VAE."""
PATCHES_PER_TOKEN = 2
"""The decoder's patches along each side of a token."""
TRAINED_SIDES = 1024, 2048
WEAK_SIDE = 512  # the model is known to be weak there
PREVIEW_SIDE = 16  # a preview of any aspect has about PREVIEW_SIDE**2 cells


def token_grid(height: int, width: int) -> Grid:
    """The large grid of an image of `height` x `width` pixels.

    Raises:
        GLMImageError: a side is no multiple of 32, or the aspect leaves the preview without cells.
    """
    fitting = next_multiples(height, width)
    if fitting != (height, width):
        raise SizeError(
            f"An image of {width}x{height} pixels has no grid of tokens: width and height must be "
            f"positive multiples of {PIXELS_PER_TOKEN}. Use {fitting[1]}x{fitting[0]}, and crop "
            "the image with GLM-Image Crop To Size."
        )
    grid = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    if 0 in preview_grid(grid):
        raise SizeError(
            f"An image of {width}x{height} pixels is too long for a preview: keep the longer side "
            f"within {PREVIEW_SIDE**2} times the shorter one."
        )
    return grid


def size_advice(height: int, width: int) -> list[str]:
    """Sentences about an image's size, where the model was not trained for it."""
    low, high = TRAINED_SIDES
    about = f"The image is {width}x{height}, and GLM-Image was trained for sides of {low} to {high}"
    sentences = []
    if min(height, width) < WEAK_SIDE:
        sentences.append(
            f"{about} pixels and is weak at {WEAK_SIDE}; sample a larger one and scale it down."
        )
    if max(height, width) > high:
        sentences.append(f"{about} pixels; sample a smaller one and scale it up.")
    return sentences


def next_multiples(height: int, width: int) -> Size:
    """The smallest size with a grid into which an image of `height` x `width` pixels fits."""
    height, width = (
        max(1, math.ceil(side / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN for side in (height, width)
    )
    return height, width


def preview_grid(grid: Grid) -> Grid:
    """The preview's grid for a large grid. A side is 0 if the aspect exceeds 256."""
    aspect = grid[0] / grid[1]
    return int(math.sqrt(aspect) * PREVIEW_SIDE), int(math.sqrt(1 / aspect) * PREVIEW_SIDE)


def upsample_tokens(tokens: Tensor) -> Tensor:
    """[B, h, w] at one token per 32 px to [B, 2h, 2w] at the decoder's one per 16 px."""
    return repeat(tokens, "b h w -> b (h y) (w x)", y=PATCHES_PER_TOKEN, x=PATCHES_PER_TOKEN)


def text_positions(length: int, base: int = 0) -> Tensor:
    """`base`, `base` + 1, ... on each of the three axes (t, h, w): int64 [3, length]."""
    return repeat(torch.arange(base, base + length), "l -> axes l", axes=3)


def grid_positions(grid: Grid, base: int) -> Tensor:
    """(base, base + row, base + column) of cells in raster order: int64 [3, rows * columns].

    The next grid or text starts at `base + max(grid)`.
    """
    offsets = torch.cartesian_prod(torch.arange(1), *(torch.arange(side) for side in grid))
    return base + offsets.T
