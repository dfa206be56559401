"""Semantic tokens, layouts and forced cells as checked data."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import TokensError
from .grids import Grid, preview_grid, token_grid

UNKNOWN = -1  # the id of a cell that is not yet written
MAX_CODEBOOK = 2**16  # GLM-Image has 2**14 ids; a palette has a colour for each


@dataclass(frozen=True, eq=False)
class SemanticTokens:
    """The large grids of a batch of images.

    tokens: int32 [B, h, w], one per 32 px.
    codebook: number of codes; every id is below it.
    height, width: of the images, in pixels.
    info: how they were made, as values of JSON.
    palette: float32 [codebook, 3], 0 to 1: the model's colours, where the model is known.
    numbers: of each image in the batch that it was taken out of, all different; None counts from 0.
        An image keeps its noise, its latent and its references by it.
    origin: the `root` of that batch; None if this is one.
    """

    tokens: Tensor
    codebook: int
    height: int
    width: int
    info: dict[str, Any] = field(default_factory=dict)
    palette: Tensor | None = field(default=None, repr=False)
    numbers: tuple[int, ...] | None = None
    origin: str | None = None

    def __post_init__(self) -> None:
        grid = token_grid(self.height, self.width)
        _check("tokens", self.tokens, grid, self.codebook, self.height, self.width)

    @property
    def root(self) -> str:
        """Names the batch that `numbers` count in, by its content."""
        return self.origin or " ".join(content_hashes(self.tokens, self.codebook))

    @property
    def image_numbers(self) -> tuple[int, ...]:
        """`numbers`, also where they count from 0."""
        return tuple(range(len(self.tokens))) if self.numbers is None else self.numbers

    @property
    def ids(self) -> Tensor:
        """The grids, by the name that layouts have for theirs too."""
        return self.tokens


@dataclass(frozen=True, eq=False)
class Layout:
    """The previews of a batch of images, and which of their cells are locked.

    preview: int32 [B, ph, pw].
    locked: bool [ph, pw], the same for the whole batch.
    codebook, height, width: as in SemanticTokens; the size is the image's, not the preview's.
    palette: as in SemanticTokens.
    """

    preview: Tensor
    locked: Tensor
    codebook: int
    height: int
    width: int
    palette: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        grid = preview_grid(token_grid(self.height, self.width))
        _check("preview", self.preview, grid, self.codebook, self.height, self.width)
        if tuple(self.locked.shape) != grid or self.locked.dtype != torch.bool:
            raise TokensError(
                f"The locks of a layout are {self.locked.dtype} {list(self.locked.shape)}, but its "
                f"preview needs torch.bool {list(grid)}."
            )

    @property
    def ids(self) -> Tensor:
        """The grids, by the name that tokens have for theirs too."""
        return self.preview


@dataclass(frozen=True, eq=False)
class Forced:
    """Cells of a grid that are given instead of drawn.

    values: int64 [B or 1, rows, columns], read where the mask is True.
    mask: bool [rows, columns], on the CPU.
    """

    values: Tensor
    mask: Tensor


def content_hashes(ids: Tensor, codebook: int) -> list[str]:
    """A short hash of each grid of a batch [B, rows, columns]: of its shape, ids and codebook."""
    about = f"{codebook} {list(ids.shape[1:])} ".encode()
    grids = ids.to("cpu", torch.int32).contiguous().numpy()
    return [hashlib.sha256(about + grid.tobytes()).hexdigest()[:12] for grid in grids]


def _check(name: str, ids: Tensor, grid: Grid, codebook: int, height: int, width: int) -> None:
    if not 1 <= codebook <= MAX_CODEBOOK:
        raise TokensError(
            f"The codebook is said to have {codebook} ids, but one has 1 to {MAX_CODEBOOK}: take "
            "the tokens from a GLM-Image model, or from an undamaged file."
        )
    if ids.dtype != torch.int32 or ids.ndim != 3 or tuple(ids.shape[1:]) != grid or not len(ids):
        raise TokensError(
            f"The {name} tensor is {ids.dtype} {list(ids.shape)}, but {width}x{height} pixels need "
            f"torch.int32 [batch, {grid[0]}, {grid[1]}]."
        )
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= codebook:
        raise TokensError(
            f"The {name} tensor holds the id {low if low < 0 else high}, but the codebook has only "
            f"the ids 0 to {codebook - 1}."
        )
