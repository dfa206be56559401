"""Semantic tokens and layouts as data, and the file they are shared in.

File: safetensors with `tokens` int32 [B, h, w], optionally `preview` int32 [B, ph, pw] and `locked`
uint8 [ph, pw]; metadata `format`, `version`, `width`, `height`, `codebook` and `info` (JSON).
"""

import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import GLMImageError
from .grids import preview_grid, token_grid

FORMAT = "glm_image_tokens"
VERSION = 1
UNKNOWN = -1  # in grids that are still being written: a cell that has no token yet
MAX_CODEBOOK = 2**16  # GLM-Image's is 2**14; colours and the like are made for every id
MAX_FILE_BYTES = 64 * 2**20  # a 2048x2048 image takes 17 KiB


@dataclass(frozen=True, eq=False)
class SemanticTokens:
    """The large grids of a batch of images.

    tokens: int32 [B, h, w], one per 32 px.
    codebook: number of codes; every id is below it.
    height, width: of the images, in pixels.
    info: how they were made, as JSON has it.
    """

    tokens: Tensor
    codebook: int
    height: int
    width: int
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        grid = token_grid(self.height, self.width)
        _check("tokens", self.tokens, grid, self.codebook, self.height, self.width)


@dataclass(frozen=True, eq=False)
class Layout:
    """The previews of a batch of images, and the cells of them that are locked.

    preview: int32 [B, ph, pw].
    locked: bool [ph, pw], alike for the batch.
    codebook, height, width: as in SemanticTokens; the size is the image's, not the preview's.
    """

    preview: Tensor
    locked: Tensor
    codebook: int
    height: int
    width: int

    def __post_init__(self) -> None:
        grid = preview_grid(token_grid(self.height, self.width))
        _check("preview", self.preview, grid, self.codebook, self.height, self.width)
        if tuple(self.locked.shape) != grid or self.locked.dtype != torch.bool:
            raise GLMImageError(
                f"The locks of a layout are {self.locked.dtype} {list(self.locked.shape)}, but its "
                f"preview needs torch.bool {list(grid)}."
            )


@dataclass(frozen=True, eq=False)
class Forced:
    """Cells of a grid that are given instead of drawn.

    values: int64 [B or 1, rows, columns], read where the mask holds.
    mask: bool [rows, columns], on the CPU.
    """

    values: Tensor
    mask: Tensor


def save_tokens(path: Path | str, tokens: SemanticTokens, layout: Layout | None = None) -> None:
    """Write a token file; it appears whole or not at all.

    Raises:
        GLMImageError: the layout is of other images than the tokens.
    """
    path = Path(path)
    tensors = {"tokens": tokens.tokens}
    if layout is not None:
        _require_together(tokens, layout)
        tensors |= {"preview": layout.preview, "locked": layout.locked.to(torch.uint8)}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "width": str(tokens.width),
        "height": str(tokens.height),
        "codebook": str(tokens.codebook),
        "info": json.dumps(tokens.info),
    }
    # Copies: a layout kept alone shares its preview with the tokens, which safetensors refuses.
    data = save({name: t.cpu().contiguous().clone() for name, t in tensors.items()}, metadata)
    unfinished = path.with_name(f".{uuid.uuid4().hex}.tmp")  # short whatever the file's name is
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _require_together(tokens: SemanticTokens, layout: Layout) -> None:
    """A file has one size, the tokens': the layout's own may be another of the same preview, as it
    is where a layout alone is kept, with its preview as the tokens of a small image."""
    if tokens.codebook != layout.codebook:
        raise GLMImageError(
            f"The tokens' codebook is {tokens.codebook} and the layout's {layout.codebook}: save a "
            "layout with tokens of its own model."
        )
    wanted = preview_grid(token_grid(tokens.height, tokens.width))
    found = tuple(layout.locked.shape)
    if wanted != found:
        raise GLMImageError(
            f"The layout is a grid of {found[0]}x{found[1]} and images of {tokens.width}x"
            f"{tokens.height} pixels have one of {wanted[0]}x{wanted[1]}: save a layout with the "
            "tokens that were made from it."
        )


def load_tokens(path: Path | str) -> tuple[SemanticTokens, Layout | None]:
    """Read a token file; the layout is None where the file has no preview.

    Raises:
        GLMImageError: the file is missing, too large, corrupt, no token file, of another version,
            or its tensors do not fit its sizes and codebook.
    """
    path = Path(path)
    if not path.is_file():
        raise GLMImageError(f"There is no token file {path.name}.")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise GLMImageError(
            f"{path.name} has {size / 2**20:.0f} MiB, but a token file has at most "
            f"{MAX_FILE_BYTES / 2**20:.0f}: choose a file saved by GLM-Image Save Tokens."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise GLMImageError(f"{path.name} is corrupt or no safetensors file: {error}.") from error
    if metadata.get("format") != FORMAT or "tokens" not in tensors:
        raise GLMImageError(f"{path.name} holds no semantic tokens (its format is not {FORMAT}).")
    if metadata.get("version") != str(VERSION):
        raise GLMImageError(
            f"{path.name} is of version {metadata.get('version')}, but this pack reads version "
            f"{VERSION}: update the pack or save the tokens again."
        )
    try:
        size_and_codes = {name: int(metadata[name]) for name in ("codebook", "height", "width")}
        info = dict(json.loads(metadata.get("info", "{}")))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise GLMImageError(f"{path.name} has broken metadata: {error}.") from error
    try:
        tokens = SemanticTokens(tensors["tokens"], info=info, **size_and_codes)
        return tokens, _layout(tensors, size_and_codes)
    except GLMImageError as error:
        raise GLMImageError(f"{path.name}: {error}") from error


def _layout(tensors: dict[str, Tensor], size_and_codes: dict[str, int]) -> Layout | None:
    if "preview" not in tensors:
        return None
    preview = tensors["preview"]
    locked = tensors.get("locked", torch.zeros(preview.shape[1:], dtype=torch.uint8))
    return Layout(preview, locked.to(torch.bool), **size_and_codes)


def _check(
    name: str, ids: Tensor, grid: tuple[int, int], codebook: int, height: int, width: int
) -> None:
    if not 1 <= codebook <= MAX_CODEBOOK:
        raise GLMImageError(
            f"The codebook is said to have {codebook} ids, but one has 1 to {MAX_CODEBOOK}: take "
            "the tokens from a GLM-Image model, or from an undamaged file."
        )
    if ids.dtype != torch.int32 or ids.ndim != 3 or tuple(ids.shape[1:]) != grid or not len(ids):
        raise GLMImageError(
            f"The {name} tensor is {ids.dtype} {list(ids.shape)}, but {width}x{height} pixels need "
            f"torch.int32 [batch, {grid[0]}, {grid[1]}]."
        )
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= codebook:
        raise GLMImageError(
            f"The {name} tensor holds the id {low if low < 0 else high}, but the codebook has only "
            f"the ids 0 to {codebook - 1}."
        )
