"""What an AR service and its clients send each other: requests and results as JSON and token files.

`docs/service-protocol.md` is the description. Both sides use these functions, so what is sent is
what is read.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..data import token_file
from ..data.cells import format_cells, parse_cells
from ..data.grids import PIXELS_PER_TOKEN, token_grid
from ..data.layout import require_codebook, require_layout_fits, require_tokens_fit
from ..data.tokens import Forced, Layout, SemanticTokens
from ..errors import BatchError, FileError, InputError, quoted, shown
from ..foreign import wall
from ..schema import FLAG, REQUIRED, TEXT, Kind, many, number, optional, whole
from .requests import KINDS, SampleRequest, Written
from .step import SamplingOptions

VERSION = 1
MAX_SIDE = 16384  # as in the nodes
MAX_REFERENCES = 64
LARGEST_SEED = 2**64 - 1

_KIND = Kind(f"but must be {' or '.join(KINDS)}", KINDS.__contains__, "tokens")
_FILE = optional(Kind("but must be a token file in base64", TEXT.fits))
_FILES = optional(many(Kind("but must be a token file in base64", TEXT.fits), 0, MAX_REFERENCES))
_SIDE = whole(32, MAX_SIDE)
SAMPLE = {
    "prompt": TEXT,
    "width": _SIDE,
    "height": _SIDE,
    "seed": whole(0, LARGEST_SEED),
    "temperature": optional(number(0, 5), SamplingOptions.temperature),
    "top_p": optional(number(0, 1), SamplingOptions.top_p),
    "top_k": optional(whole(0, 2**20), SamplingOptions.top_k),
    "lookahead": optional(whole(1, 64), 1),
    "kind": _KIND,
    "layout": _FILE,
    "tokens": _FILE,
    "cells": optional(TEXT),
    "references": _FILES,
}
SCORE = {
    "prompt": TEXT,
    "against": optional(TEXT),
    "compare": optional(FLAG, True),
    "tokens": Kind(_FILE.wanted, TEXT.fits),
    "kind": _KIND,
    "references": _FILES,
}
IMAGES, PREVIEW, TOKENS = "images", "preview", "tokens"


# ---- samples -------------------------------------------------------------------------------------


def sample_to_json(request: SampleRequest, codebook: int) -> dict[str, Any]:
    """A sample as an entry of `samples`."""
    data: dict[str, Any] = {
        "prompt": request.prompt,
        "width": request.width,
        "height": request.height,
        "seed": request.seed % 2**64,
        **vars(request.options),
        "lookahead": request.lookahead,
        "kind": request.kind,
    }
    size = {"codebook": codebook, "height": request.height, "width": request.width}
    if request.preview is not None:
        layout = Layout(_ids(request.preview.values), request.preview.mask, **size)
        data["layout"] = _layout_to_text(layout)
    if request.large is not None:
        data["tokens"] = _to_text(SemanticTokens(_ids(request.large.values), **size))
        data["cells"] = format_cells(~request.large.mask)
    if request.references:
        data["references"] = [_reference_to_text(one, codebook) for one in request.references]
    return data


def sample_from_json(data: Any, codebook: int) -> SampleRequest:
    """An entry of `samples`, checked as in the nodes.

    Raises:
        GLMImageError: a value is missing, unknown or wrong, or a token file does not fit.
    """
    values = _read(data, SAMPLE, "The sample")
    height, width = values["height"], values["width"]
    token_grid(height, width)
    options = SamplingOptions(*(values[name] for name in ("temperature", "top_p", "top_k")))
    return SampleRequest(
        values["prompt"],
        height,
        width,
        values["seed"],
        options,
        kind=values["kind"],
        preview=_locked(values["layout"], codebook, height, width),
        large=_kept(values["tokens"], values["cells"], codebook, height, width),
        references=_references_from_text(values["references"], codebook),
        lookahead=values["lookahead"],
    )


def _locked(text: str | None, codebook: int, height: int, width: int) -> Forced | None:
    if text is None:
        return None
    _, layout = _from_text(text, "The layout's token file")
    if layout is None:
        raise FileError("The layout's token file has no preview: send one that has.")
    require_layout_fits(layout, codebook, height, width)
    return Forced(_single("layout", layout.preview), layout.locked)


def _kept(
    text: str | None, cells: str | None, codebook: int, height: int, width: int
) -> Forced | None:
    if (text is None) != (cells is None):
        raise InputError(
            "tokens and cells belong together: send both to draw part of an image anew, or neither."
        )
    if text is None:
        return None
    tokens, _ = _from_text(text, "The token file of tokens")
    require_tokens_fit(tokens, codebook, height, width)
    drawn = parse_cells(cells, token_grid(height, width))
    return Forced(_single("tokens", tokens.tokens), ~drawn)


# ---- what was written ----------------------------------------------------------------------------


def written_to_text(written: Written, request: SampleRequest, codebook: int) -> str:
    """What came of a request as a token file, with how it was made, in base64."""
    size = {"codebook": codebook, "height": request.height, "width": request.width}
    layout = None
    if written.preview is not None:
        locked = request.preview.mask if request.preview else torch.zeros_like(written.preview) > 0
        layout = Layout(written.preview[None], locked, **size)
    if written.tokens is None:
        return _layout_to_text(layout, request.note)
    return _to_text(SemanticTokens(written.tokens[None], info=request.note, **size), layout)


def written_from_text(text: str, request: SampleRequest, codebook: int) -> Written:
    """The opposite of `written_to_text`.

    Raises:
        GLMImageError: the file is broken, or is not of this request.
    """
    tokens, layout = _from_text(text, "The service's token file")
    require_tokens_fit(tokens, codebook, request.height, request.width)
    if (layout is None) != bool(request.references):
        raise FileError("The service's token file is not of what was asked for.")
    return Written(
        None if request.kind == "layout" else _single("service's tokens", tokens.tokens)[0],
        None if layout is None else _single("service's layout", layout.preview)[0],
    )


# ---- scores --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Grids to score under a prompt and under another one.

    Args:
        against: None compares with no other prompt.
        tokens: of B images; None where layouts alone are scored.
        layout: their previews; None with references.
        references: semantic tokens of each reference image, int [h, w], the same for all B.
    """

    prompt: str
    against: str | None
    tokens: SemanticTokens | None
    layout: Layout | None
    references: tuple[Tensor, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        image = self.layout if self.tokens is None else self.tokens
        return image.height, image.width

    @property
    def grids(self) -> dict[str, Tensor]:
        """What is scored, int32 [B, rows, columns], in the order in which it was written."""
        grids = {}
        if self.layout is not None:
            grids[PREVIEW] = self.layout.preview
        if self.tokens is not None:
            grids[TOKENS] = self.tokens.tokens
        return grids


def score_to_json(request: ScoreRequest, codebook: int) -> dict[str, Any]:
    """The body of a request for scores."""
    alone = request.tokens is None
    return {
        "prompt": request.prompt,
        "against": request.against,
        "compare": request.against is not None,
        "kind": "layout" if alone else "tokens",
        "tokens": _layout_to_text(request.layout)
        if alone
        else _to_text(request.tokens, request.layout),
        "references": [_reference_to_text(one, codebook) for one in request.references],
    }


def score_from_json(data: Any, codebook: int) -> ScoreRequest:
    """
    Raises:
        GLMImageError: a value is missing, unknown or wrong, or a token file does not fit.
    """
    values = _read(data, SCORE, "The request")
    tokens, layout = _from_text(values["tokens"], "The token file of tokens")
    require_codebook("tokens", tokens.codebook, codebook)
    references = _references_from_text(values["references"], codebook)
    prompts = values["prompt"], _against(values["against"], values["compare"])
    if references:
        if values["kind"] == "layout":
            raise InputError("An image made from references has no layout: score its tokens.")
        return ScoreRequest(*prompts, tokens, None, references)
    if layout is None:
        raise InputError(
            "The tokens were written after a preview, which their score needs; send a token file "
            "with a preview, or the references they were made from."
        )
    if values["kind"] == "layout":
        return ScoreRequest(*prompts, None, layout)
    require_layout_fits(layout, codebook, tokens.height, tokens.width)
    if len(layout.preview) != len(tokens.tokens):
        raise BatchError(
            f"The token file has tokens of {len(tokens.tokens)} images and previews of "
            f"{len(layout.preview)}: send each image's tokens with its own preview."
        )
    return ScoreRequest(*prompts, tokens, layout)


def _against(against: str | None, compare: bool) -> str | None:
    if compare:
        return against or ""
    if against:
        raise InputError(
            f"The request's against is {quoted(against)}, but compare is false: leave one out."
        )
    return None


def tensors_to_text(tensors: Mapping[str, Tensor]) -> str:
    """A safetensors file in base64."""
    return _base64(tensors_to_bytes(tensors))


def tensors_from_text(text: str, name: str) -> dict[str, Tensor]:
    """
    Raises:
        GLMImageError: the text is no safetensors file in base64; `name` names it.
    """
    return tensors_from_bytes(_bytes(text, name), name)


# ---- images --------------------------------------------------------------------------------------


def images_from_bytes(data: bytes) -> Tensor:
    """Images float32 [B, H, W, 3] between 0 and 1.

    Raises:
        GLMImageError: the body is no safetensors file of such images with sides of 32 pixels.
    """
    images = tensors_from_bytes(data, "The body").get(IMAGES)
    if images is None or images.dtype != torch.float32 or images.ndim != 4 or not images.numel():
        found = "nothing" if images is None else f"{images.dtype} {list(images.shape)}"
        raise InputError(f"images is {found}, but must be torch.float32 [batch, H, W, 3].")
    if images.shape[-1] != 3 or not bool(((images >= 0) & (images <= 1)).all()):
        raise InputError("images must have 3 channels of values between 0 and 1.")
    token_grid(*images.shape[1:3])
    return images


def encoded_to_text(tokens: Tensor, codebook: int) -> str:
    """Tokens int32 [B, h, w] of images as a token file in base64."""
    height, width = (PIXELS_PER_TOKEN * side for side in tokens.shape[1:])
    return _to_text(SemanticTokens(tokens, codebook, height, width, {"made_from": "image"}))


def encoded_from_text(text: str, codebook: int) -> Tensor:
    """
    Raises:
        GLMImageError: the file is broken, or of another model.
    """
    tokens, _ = _from_text(text, "The service's token file")
    require_codebook("service's tokens", tokens.codebook, codebook)
    return tokens.tokens


# ---- files in base64 -----------------------------------------------------------------------------


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file."""
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def tensors_from_bytes(data: bytes, name: str) -> dict[str, Tensor]:
    """
    Raises:
        GLMImageError: the data is no safetensors file; `name` names it.
    """
    with wall(f"{name} is no safetensors file", "send one"):
        return load(data)


def _to_text(tokens: SemanticTokens, layout: Layout | None = None) -> str:
    return _base64(token_file.to_bytes(tokens, layout))


def _layout_to_text(layout: Layout, info: dict[str, Any] | None = None) -> str:
    """A layout of an image whose tokens are not known: they are all 0."""
    grid = token_grid(layout.height, layout.width)
    tokens = torch.zeros(len(layout.preview), *grid, dtype=torch.int32)
    size = {"codebook": layout.codebook, "height": layout.height, "width": layout.width}
    return _to_text(SemanticTokens(tokens, info=info or {}, **size), layout)


def _reference_to_text(tokens: Tensor, codebook: int) -> str:
    height, width = (PIXELS_PER_TOKEN * side for side in tokens.shape)
    return _to_text(SemanticTokens(_ids(tokens)[None], codebook, height, width))


def _references_from_text(texts: list[str] | None, codebook: int) -> tuple[Tensor, ...]:
    references = []
    for i, text in enumerate(texts or ()):
        tokens, _ = _from_text(text, f"The token file of reference {i}")
        require_codebook("references", tokens.codebook, codebook)
        references.append(_single(f"reference {i}", tokens.tokens)[0])
    return tuple(references)


def _from_text(text: str, name: str) -> tuple[SemanticTokens, Layout | None]:
    return token_file.from_bytes(_bytes(text, name), name)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FileError(f"{name} is not in base64: encode the file's bytes so.") from error


def _ids(values: Tensor) -> Tensor:
    return values.to("cpu", torch.int32)


def _single(name: str, grids: Tensor) -> Tensor:
    if len(grids) != 1:
        raise BatchError(f"The {name} has {len(grids)} images, but a sample takes one: send one.")
    return grids


def _read(data: Any, table: Mapping[str, Kind], source: str) -> dict[str, Any]:
    """The values of a table's keys.

    Raises:
        InputError: the data is no object, or a value is missing, unknown, or does not fit.
    """
    if not isinstance(data, dict):
        raise InputError(f"{source} is {quoted(data)}, but must be a JSON object.")
    if unknown := [key for key in data if key not in table]:
        known = ", ".join(table)
        raise InputError(f"{source} has the key '{shown(unknown[0])}'; it may have {known}.")
    values = {}
    for key, kind in table.items():
        value = data.get(key)
        if value is None and kind.default is REQUIRED:
            raise InputError(f"{source} has no {key}, {kind.wanted}.")
        if value is not None and not kind.fits(value):
            raise InputError(f"{source}'s {key} is {quoted(value)}, {kind.wanted}.")
        values[key] = kind.default if value is None else value
    return values
