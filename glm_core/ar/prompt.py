"""From a prompt to the AR model's input: control tokens from the template, text from the user.

Format: `GlmImageProcessor` of transformers. Here the user's text is tokenised without the control
and visual tokens, so that `<sop>` in a prompt is five characters.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from tokenizers import Tokenizer
from torch import Tensor

from ..data.grids import Grid, grid_positions, preview_grid, text_positions
from ..errors import CheckpointError, PromptError, ReferenceImageError, quoted
from ..foreign import parse_json, wall, within
from ..schema import OBJECT, Kind, many, read, whole
from .chat_template import ChatTemplate

_PROMPT = "\ue000prompt\ue000"  # replaced by the prompt after rendering; private-use characters
_FILE = "The AR model's tokenizer.json"
_ADVICE = "download the processor folder again"
TEXT_SECONDS = 10
"""For the ids of one text. A pattern that tries every way to split a text takes hours."""
MAX_ID = 2**20  # GLM-Image's vocabulary has 168,064 ids
_ID = whole(0, MAX_ID)
_VOCABULARY = Kind(
    f"but must be an object of ids up to {MAX_ID}",
    lambda value: isinstance(value, dict) and all(map(_ID.fits, value.values())),
)
_ADDED = Kind(
    f"but must be an object with a content and an id up to {MAX_ID}",
    lambda value: (
        isinstance(value, dict)
        and isinstance(value.get("content"), str)
        and _ID.fits(value.get("id"))
    ),
)
_TOKENIZER = {
    "model": OBJECT,
    "model.vocab": _VOCABULARY,
    "added_tokens": many(_ADDED, 1, MAX_ID),
}
_CONTROL_TOKENS = ("bos_token", "eos_token", "image_token", "grid_bos_token", "grid_eos_token")


@dataclass(frozen=True, eq=False)
class Prompt:
    """The AR model's input before the first cell.

    ids: int64 [L].
    positions: int64 [3, L], on the axes (t, h, w).
    """

    ids: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def end(self) -> int:
        """The position of the first grid after the prompt."""
        return int(self.positions[0, -1]) + 1


class PromptTokenizer:
    """The checkpoint's tokenizer and chat template, from its folder `processor/`.

    Args:
        tokenizer_json: content of tokenizer.json.
        tokenizer_config: content of tokenizer_config.json.
        chat_template: Jinja source, or None for a prompt without one.

    Raises:
        GLMImageError: the tokenizer is broken or lacks a control token.
    """

    def __init__(
        self, tokenizer_json: str, tokenizer_config: dict[str, Any], chat_template: str | None
    ) -> None:
        data = _parse(tokenizer_json)
        full = _load(data)
        self._names = _control_names(full, tokenizer_config)
        self._ids = {name: full.token_to_id(token) for name, token in self._names.items()}
        self._control = {t.content: i for i, t in full.get_added_tokens_decoder().items()}
        self._control |= dict(zip(self._names.values(), self._ids.values(), strict=True))
        # Visual tokens are named like bos_token, with other numbers.
        visual = re.compile(re.sub(r"\d+", r"\\d+", re.escape(self._names["bos_token"])))
        reserved = self._control.keys() | set(filter(visual.fullmatch, full.get_vocab()))
        self._text = _load(_without(reserved, data))
        longest_first = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._template = None if chat_template is None else ChatTemplate(chat_template)

    def read(
        self,
        prompt: str,
        grid: Grid,
        references: Sequence[Tensor] | None = None,
        *,
        may_be_empty: bool = False,
    ) -> Prompt:
        """`image_to_image` if there are references, else `text_to_image`."""
        if references:
            return self.image_to_image(prompt, grid, references, may_be_empty=may_be_empty)
        return self.text_to_image(prompt, grid, may_be_empty=may_be_empty)

    def text_to_image(self, prompt: str, grid: Grid, *, may_be_empty: bool = False) -> Prompt:
        """`{prompt}<sop>H W<eop><sop>h w<eop><start>` for a large grid (H, W).

        The next ids are the preview's (h, w) in raster order, then the large grid's.

        Raises:
            GLMImageError: the prompt is empty and may not be.
        """
        grids = self._grid_ids(grid) + self._grid_ids(preview_grid(grid))
        turn = self._turn(prompt, [], may_be_empty)
        return _joined([*turn, grids, [self._ids["bos_token"]]])

    def image_to_image(
        self, prompt: str, grid: Grid, references: Sequence[Tensor], *, may_be_empty: bool = False
    ) -> Prompt:
        """`<start>codes<end>` per reference, then `{prompt}<sop>H W<eop><start>`.

        The next ids are the large grid's (H, W): there is no preview.

        Args:
            references: each one's semantic tokens, int [h, w].

        Raises:
            GLMImageError: the prompt is empty and may not be, or there are no references.
        """
        if not references:
            raise ReferenceImageError("There are no reference images: encode one, or connect none.")
        turn = self._turn(prompt, references, may_be_empty)
        return _joined([*turn, self._grid_ids(grid), [self._ids["bos_token"]]])

    def _turn(
        self, prompt: str, references: Sequence[Tensor], may_be_empty: bool
    ) -> list[list[int] | Tensor]:
        """The chat template's user turn with `references` and `prompt`.

        Returns:
            Pieces in order: ids of text, and the references.
        """
        core = prompt.strip()
        if not core and not may_be_empty:
            raise PromptError("The prompt is empty: write what the image should show.")
        # The template sees the space around the prompt, as it may trim it.
        marked = prompt.replace(core, _PROMPT, 1) if core else _PROMPT
        rendered = self._render(marked, len(references))
        before, after = rendered.split(_PROMPT)
        *head, last = self._control_pattern.split(before)
        first, *tail = self._control_pattern.split(after)
        remaining = iter(references)
        return [
            *(self._piece(piece, remaining) for piece in head),
            self._text_ids(last + core + first),  # together, as a token may span their borders
            *(self._piece(piece, remaining) for piece in tail),
        ]

    def _render(self, prompt: str, references: int) -> str:
        image = self._names["image_token"]
        if self._template is None:
            reference = self._names["bos_token"] + image + self._names["eos_token"]
            return references * reference + prompt
        images = [{"type": "image"}] * references
        content = [*images, {"type": "text", "text": prompt}]
        rendered = self._template.render([{"role": "user", "content": content}], self._names)
        if rendered.count(_PROMPT) != 1 or rendered.count(image) != references:
            raise CheckpointError(
                "The AR model's chat template does not carry the prompt and every reference image "
                "exactly once: take chat_template.jinja from the original checkpoint."
            )
        return rendered

    def _grid_ids(self, grid: Grid) -> list[int]:
        size = self._text_ids(f"{grid[0]} {grid[1]}")
        return [self._ids["grid_bos_token"], *size, self._ids["grid_eos_token"]]

    def _piece(self, piece: str, references: Iterator[Tensor]) -> list[int] | Tensor:
        """A piece of the template: the next reference, a control token, or text."""
        if piece == self._names["image_token"]:
            return next(references)
        return [self._control[piece]] if piece in self._control else self._text_ids(piece)

    def _text_ids(self, text: str) -> list[int]:
        """Ids of text. Half a surrogate pair, which the tokenizer refuses, becomes `?`."""
        text = text.encode(errors="replace").decode()
        with wall("The AR model's tokenizer fails at this prompt, or is endless", _ADVICE):
            # `encode` would hold Python's lock, and nothing else in the process could run.
            (encoding,) = within(TEXT_SECONDS, lambda: self._text.encode_batch([text]))
        ids: list[int] = encoding.ids
        return ids


def positions_with_grids(prompt: Prompt, grids: Sequence[Grid]) -> Tensor:
    """int64 [3, L] of a prompt and of the grids after it."""
    positions, base = [prompt.positions], prompt.end
    for grid in grids:
        positions.append(grid_positions(grid, base))
        base += max(grid)
    return torch.cat(positions, dim=1)


def _joined(pieces: list[list[int] | Tensor]) -> Prompt:
    """The pieces as one prompt. Positions count up along text, and follow a reference's grid."""
    ids, positions, base = [], [], 0
    for piece in pieces:
        if isinstance(piece, Tensor):
            ids.append(rearrange(piece, "h w -> (h w)").to("cpu", torch.int64))
            positions.append(grid_positions(tuple(piece.shape), base))
            base += max(piece.shape)
        else:
            ids.append(torch.tensor(piece, dtype=torch.int64))
            positions.append(text_positions(len(piece), base))
            base += len(piece)
    return Prompt(torch.cat(ids), torch.cat(positions, dim=1))


def _parse(tokenizer_json: str) -> dict[str, Any]:
    """tokenizer.json without what would pad, cut or add to a prompt."""
    data = parse_json(tokenizer_json, _FILE)
    read(data, _TOKENIZER, _FILE, _ADVICE)
    return data | {"padding": None, "truncation": None, "post_processor": None}


def _load(data: dict[str, Any]) -> Tokenizer:
    with wall(f"{_FILE} cannot be read", _ADVICE):
        return Tokenizer.from_str(json.dumps(data))


def _control_names(tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, str]:
    """The names of `_CONTROL_TOKENS` in the tokenizer's vocabulary."""
    names = {}
    for name in _CONTROL_TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if not _is_token(token) or tokenizer.token_to_id(token) is None:
            raise CheckpointError(
                f"The AR model's tokenizer has no {name} ({quoted(token)}): this is not the "
                "processor of a GLM-Image checkpoint; download the processor folder again."
            )
        names[name] = token
    return names


def _is_token(token: Any) -> bool:
    """Whether the tokenizer may be asked for a token: half a surrogate pair would be refused."""
    return isinstance(token, str) and token == token.encode(errors="replace").decode()


def _without(reserved: set[str], data: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer without the reserved tokens, so that their names are plain text."""
    vocab = {token: i for token, i in data["model"]["vocab"].items() if token not in reserved}
    return data | {"added_tokens": [], "model": data["model"] | {"vocab": vocab}}
