"""Token files: semantic tokens and their layout as one safetensors file.

Tensors `tokens` int32 [B, h, w], optionally `preview` int32 [B, ph, pw] and `locked` uint8
[ph, pw]; metadata `format`, `version`, `width`, `height`, `codebook` and `info` (JSON).
"""

import json
import os
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import GLMImageError
from .grids import preview_grid, token_grid
from .tokens import Layout, SemanticTokens

FORMAT = "glm_image_tokens"
VERSION = 1
MAX_FILE_BYTES = 64 * 2**20  # a 2048x2048 image takes 17 KiB


def save_tokens(path: Path | str, tokens: SemanticTokens, layout: Layout | None = None) -> None:
    """Write a token file. A write that fails leaves no partial file.

    Raises:
        GLMImageError: the layout does not belong to the tokens.
    """
    path = Path(path)
    tensors = {"tokens": tokens.tokens}
    if layout is not None:
        _require_match(tokens, layout)
        tensors |= {"preview": layout.preview, "locked": layout.locked.to(torch.uint8)}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "width": str(tokens.width),
        "height": str(tokens.height),
        "codebook": str(tokens.codebook),
        "info": json.dumps(tokens.info),
    }
    # Copied, as safetensors refuses tensors that share memory: a layout's tokens are its preview.
    data = save({name: t.cpu().contiguous().clone() for name, t in tensors.items()}, metadata)
    unfinished = path.with_name(f".{uuid.uuid4().hex}.tmp")  # short, as file systems limit names
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _require_match(tokens: SemanticTokens, layout: Layout) -> None:
    """Refuse a layout of another codebook, or with a preview of another shape.

    A file holds only the tokens' size. The layout's size may differ, if its preview has the same
    shape: a layout saved alone has its preview as the tokens of a small image.
    """
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
    """Read a token file. The layout is None if the file has no preview.

    Raises:
        GLMImageError: the file is missing, too large, corrupt, no token file, of another version,
            or its tensors do not fit its sizes and codebook.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    if metadata.get("format") != FORMAT or "tokens" not in tensors:
        raise GLMImageError(f"{path.name} holds no semantic tokens (its format is not {FORMAT}).")
    if metadata.get("version") != str(VERSION):
        raise GLMImageError(
            f"{path.name} is of version {metadata.get('version')}, but this pack reads version "
            f"{VERSION}: update the pack or save the tokens again."
        )
    try:
        size_and_codebook = {name: int(metadata[name]) for name in ("codebook", "height", "width")}
        info = dict(json.loads(metadata.get("info", "{}")))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise GLMImageError(f"{path.name} has broken metadata: {error}.") from error
    try:
        tokens = SemanticTokens(tensors["tokens"], info=info, **size_and_codebook)
        return tokens, _layout(tensors, size_and_codebook)
    except GLMImageError as error:
        raise GLMImageError(f"{path.name}: {error}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file of at most `MAX_FILE_BYTES`."""
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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise GLMImageError(f"{path.name} is corrupt or no safetensors file: {error}.") from error


def _layout(tensors: dict[str, Tensor], size_and_codebook: dict[str, int]) -> Layout | None:
    if "preview" not in tensors:
        return None
    preview = tensors["preview"]
    locked = tensors.get("locked", torch.zeros(preview.shape[1:], dtype=torch.uint8))
    return Layout(preview, locked.to(torch.bool), **size_and_codebook)
