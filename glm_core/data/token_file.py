"""Token files: semantic tokens and their layout as one safetensors file.

Tensors `tokens` int32 [B, h, w], optionally `preview` int32 [B, ph, pw] and `locked` uint8
[ph, pw]; metadata `format`, `version`, `width`, `height`, `codebook` and `info` (JSON). A layout of
another size than the tokens has `layout_width` and `layout_height` too.
"""

import json
import os
import re
import time
import uuid
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..errors import FileError, GLMImageError, SizeError, TokensError, shown
from ..foreign import parse_json, wall
from ..schema import Kind, optional, read
from .grids import preview_grid, token_grid
from .tokens import Layout, SemanticTokens

FORMAT = "glm_image_tokens"
VERSION = 1
_NUMBER = Kind(
    "but must be a whole number below 10,000,000",
    lambda value: re.fullmatch("[0-9]{1,7}", value) is not None,
)
METADATA = {
    "codebook": _NUMBER,
    "width": _NUMBER,
    "height": _NUMBER,
    "info": optional(Kind("but must be JSON", bool), "{}"),
    "layout_width": optional(_NUMBER),
    "layout_height": optional(_NUMBER),
}
UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.tmp")
MAX_FILE_BYTES = 64 * 2**20  # a 2048x2048 image takes 17 KiB


def save_tokens(path: Path | str, tokens: SemanticTokens, layout: Layout | None = None) -> None:
    """Write a token file. A write that fails leaves no partial file.

    Raises:
        GLMImageError: the layout does not belong to the tokens.
    """
    path = Path(path)
    data = to_bytes(tokens, layout)
    _remove_unfinished(path.parent)
    unfinished = path.with_name(f".{uuid.uuid4().hex}.tmp")  # short, as file systems limit names
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def to_bytes(tokens: SemanticTokens, layout: Layout | None = None) -> bytes:
    """The content of a token file.

    Raises:
        GLMImageError: the layout does not belong to the tokens.
    """
    tensors = {"tokens": tokens.tokens}
    layout_size = {}
    if layout is not None:
        _require_match(tokens, layout)
        tensors |= {"preview": layout.preview, "locked": layout.locked.to(torch.uint8)}
        if (layout.height, layout.width) != (tokens.height, tokens.width):
            sides = {"layout_height": layout.height, "layout_width": layout.width}
            layout_size = {name: str(side) for name, side in sides.items()}
    metadata = layout_size | {
        "format": FORMAT,
        "version": str(VERSION),
        "width": str(tokens.width),
        "height": str(tokens.height),
        "codebook": str(tokens.codebook),
        "info": json.dumps(tokens.info, sort_keys=True),
    }
    # Copied, as safetensors refuses tensors that share memory: a layout's tokens are its preview.
    data = save({name: t.cpu().contiguous().clone() for name, t in tensors.items()}, metadata)
    return _in_one_order(data)


def _in_one_order(data: bytes) -> bytes:
    """The file with a sorted header, as safetensors writes metadata in a random order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _remove_unfinished(folder: Path) -> None:
    """Remove what saves left that were killed more than an hour ago."""
    for file in folder.glob(".*.tmp"):
        with suppress(OSError):  # another save may remove it too
            if UNFINISHED.fullmatch(file.name) and time.time() - file.stat().st_mtime > 3600:
                file.unlink()


def _require_match(tokens: SemanticTokens, layout: Layout) -> None:
    """Refuse a layout of another codebook, or with a preview that is not the tokens'.

    It may be the preview of an image of their size, or the tokens themselves, which is how a layout
    is saved alone.
    """
    if tokens.codebook != layout.codebook:
        raise TokensError(
            f"The tokens' codebook is {tokens.codebook} and the layout's {layout.codebook}: save a "
            "layout with tokens of its own model."
        )
    grid = token_grid(tokens.height, tokens.width)
    wanted, found = preview_grid(grid), tuple(layout.locked.shape)
    if found not in (wanted, grid):
        raise SizeError(
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
    return from_bytes(_read(path), path.name)


def from_bytes(data: bytes, name: str) -> tuple[SemanticTokens, Layout | None]:
    """`load_tokens` of a file's content; `name` is the file's in a sentence."""
    tensors, metadata = _parts(data, name)
    if metadata.get("format") != FORMAT or "tokens" not in tensors:
        raise FileError(f"{name} holds no semantic tokens (its format is not {FORMAT}).")
    if metadata.get("version") != str(VERSION):
        raise FileError(
            f"{name} is of version {shown(metadata.get('version', 'none'))}, but this pack "
            f"reads version {VERSION}: update the pack or save the tokens again."
        )
    values = read(metadata, METADATA, name, "save the tokens again")
    size_and_codebook = {key: int(values[key]) for key in ("codebook", "height", "width")}
    layout_size = {
        side: int(values[f"layout_{side}"] or values[side]) for side in ("height", "width")
    }
    info = parse_json(values["info"], f"The info of {name}")
    try:
        with wall("the tensors are not those of a token file", "save the tokens again"):
            tokens = SemanticTokens(tensors["tokens"], info=info, **size_and_codebook)
            return tokens, _layout(tensors, size_and_codebook | layout_size)
    except GLMImageError as error:
        raise FileError(f"{name}: {error.sentence}") from error


def _read(path: Path) -> bytes:
    """The content of a file of at most `MAX_FILE_BYTES`.

    It is read whole, not mapped: a mapped file that another program shortens ends the process.
    """
    with wall(f"{path.name} cannot be read", "choose another file"):
        if not path.is_file():
            raise FileError(f"There is no token file {path.name}.")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise FileError(
                f"{path.name} has {size / 2**20:.0f} MiB, but a token file has at most "
                f"{MAX_FILE_BYTES / 2**20:.0f}: choose a file saved by GLM-Image Save Tokens."
            )
        with path.open("rb") as file:
            return file.read(size)


def _parts(data: bytes, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file."""
    with wall(f"{name} is corrupt or no safetensors file", "save the tokens again"):
        tensors = load(data)  # refuses a broken header
        end = 8 + int.from_bytes(data[:8], "little")
        return tensors, json.loads(data[8:end]).get("__metadata__") or {}


def _layout(tensors: dict[str, Tensor], size_and_codebook: dict[str, int]) -> Layout | None:
    if "preview" not in tensors:
        return None
    preview = tensors["preview"]
    locked = tensors.get("locked", torch.zeros(preview.shape[1:], dtype=torch.uint8))
    return Layout(preview, locked.to(torch.bool), **size_and_codebook)
