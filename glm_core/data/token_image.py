"""Pictures of tokens: a colour for each code, a square for each cell, a sheet for a batch."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from .tokens import UNKNOWN

DARK = 0.12  # unknown cells and gaps
LIGHT = 1.0  # outlines of locked cells, numbers
DIGITS = ("75557", "26227", "71747", "71717", "55711", "74717", "74757", "71111", "75757", "75717")
"""Rows of three dots, as bits."""


def codebook_palette(embedding: Tensor) -> Tensor:
    """Colours by the first three principal components, so that similar codes look similar.

    Codes are compared by direction, as the quantiser does. A channel spans two standard deviations
    on either side of the mean.

    Args:
        embedding: [codebook, dim], the VQ codebook.

    Returns:
        float32 [codebook, 3], 0 to 1.
    """
    directions = F.normalize(embedding.float(), dim=-1)
    centred = directions - directions.mean(dim=0)
    components = centred @ _principal_axes(centred)
    components = components / components.std(dim=0).clamp(min=1e-12)
    return (0.5 + components / 4).clamp(0, 1)


def _principal_axes(centred: Tensor) -> Tensor:
    """[n, dim] to [dim, 3], each axis with its largest entry positive.

    Subspace iteration from a fixed start; a full decomposition would take half a minute.
    """
    width = min(8, centred.shape[1])  # more than the 3 that are returned, to converge sooner
    block = torch.randn(centred.shape[1], width, generator=torch.Generator().manual_seed(0))
    for _ in range(6):
        block = torch.linalg.qr(centred.T @ (centred @ block)).Q
    axes = block @ torch.linalg.svd(centred @ block, full_matrices=False).Vh[:3].T
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return axes * largest.sign()


def hash_palette(codebook: int) -> Tensor:
    """A fixed colour for each id, unrelated to its code: float32 [codebook, 3], 0 to 1.

    Points of the R3 sequence (M. Roberts, 2018): evenly spread, neighbouring ids far apart.
    """
    root = 1.2207440846057596  # x**4 = x + 1
    steps = torch.tensor([1 / root, 1 / root**2, 1 / root**3], dtype=torch.float64)
    points = (0.5 + torch.arange(codebook, dtype=torch.float64)[:, None] * steps) % 1
    return (DARK + (1 - DARK) * points).float()


def cell_colours(ids: Tensor, palette: Tensor) -> Tensor:
    """The colour of each cell: ids int [...] to uint8 [..., 3]."""
    return (255 * palette[ids.cpu().long()]).round().to(torch.uint8)


def draw_sheet(
    tokens: Tensor,
    palette: Tensor,
    cell_size: int,
    locked: Tensor | None = None,
    *,
    numbered: bool = False,
) -> Tensor:
    """A batch of grids, drawn row by row on a roughly square sheet.

    Args:
        tokens: int [B, rows, columns]; `UNKNOWN` cells are dark.
        palette: float32 [codebook, 3].
        cell_size: side of a cell in pixels.
        locked: bool [rows, columns], cells to outline in every grid.
        numbered: whether each grid of several has its number in its corner, from 0.

    Returns:
        float32 [height, width, 3], 0 to 1.
    """
    tokens = tokens.cpu().long()
    cells = torch.where(tokens[..., None] == UNKNOWN, DARK, palette[tokens.clamp(min=0)])
    pictures = repeat(cells, "b h w c -> b (h y) (w x) c", y=cell_size, x=cell_size)
    if locked is not None:
        pictures = torch.where(_outline(locked, cell_size), LIGHT, pictures)
    if numbered and len(tokens) > 1:
        for i, picture in enumerate(pictures):
            _write_number(i, picture)
    return _sheet(pictures, gap=max(1, cell_size // 2))


def sheet_grid(batch: int, rows: int, columns: int) -> tuple[int, int]:
    """How many pictures of rows x columns cells a sheet has down and across."""
    across = min(batch, math.ceil(math.sqrt(batch * rows / columns)))
    return math.ceil(batch / across), across


def _outline(locked: Tensor, cell_size: int) -> Tensor:
    """bool [height, width, 1]: the borders of locked cells, an eighth of a cell wide."""
    border = torch.ones(cell_size, cell_size, dtype=torch.bool)
    width = max(1, cell_size // 8)
    border[width:-width, width:-width] = False
    outline = locked[:, None, :, None] & border[:, None]
    return rearrange(outline, "h y w x -> (h y) (w x) 1")


def _write_number(value: int, picture: Tensor) -> None:
    """Writes light digits on a dark ground into the corner of a picture [height, width, 3]."""
    digits = [DIGITS[int(digit)] for digit in str(value)]
    rows = ["".join(f"{int(digit[row]):03b}0" for digit in digits) for row in range(5)]
    dots = F.pad(torch.tensor([[int(bit) for bit in row] for row in rows]), (1, 0, 1, 1))
    height, width = picture.shape[:2]
    side = max(1, min(height, width) // 64)
    number = repeat(dots, "r c -> (r y) (c x) 1", y=side, x=side)[:height, :width]
    picture[: number.shape[0], : number.shape[1]] = torch.where(number == 1, LIGHT, DARK)


def _sheet(pictures: Tensor, gap: int) -> Tensor:
    """[B, h, w, 3] as one picture [height, width, 3], dark where the batch leaves gaps."""
    batch, height, width, _ = pictures.shape
    down, across = sheet_grid(batch, height, width)
    sheet = torch.full((down * across, height + gap, width + gap, 3), DARK)
    sheet[:batch, :height, :width] = pictures
    sheet = rearrange(sheet, "(r c) h w rgb -> (r h) (c w) rgb", c=across)
    return sheet[:-gap, :-gap]
