"""From a prompt to the AR model's ids: the scaffold of control tokens, and text that stays text.

Format: `GlmImageProcessor` of transformers. Unlike there, whatever a user types is tokenised
without the control and visual tokens, so that `<sop>` in a prompt is five characters.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from .errors import GLMImageError
from .grids import Grid, preview_grid

_PROMPT = "\ue000prompt\ue000"  # stands for the prompt in the template; private-use characters
_SCAFFOLD = ("bos_token", "eos_token", "image_token", "grid_bos_token", "grid_eos_token")


class PromptTokenizer:
    """The checkpoint's tokenizer and chat template, as `processor/` holds them.

    Args:
        tokenizer_json: content of tokenizer.json.
        tokenizer_config: content of tokenizer_config.json.
        chat_template: Jinja source, or None for a bare prompt.

    Raises:
        GLMImageError: a file is broken or lacks a token that the scaffold needs.
    """

    def __init__(
        self, tokenizer_json: str, tokenizer_config: dict[str, Any], chat_template: str | None
    ) -> None:
        full = _load(tokenizer_json)
        self._names = {}
        for name in _SCAFFOLD:
            token = tokenizer_config.get(name)
            token = token["content"] if isinstance(token, dict) else token
            if token is None or full.token_to_id(token) is None:
                raise GLMImageError(
                    f"The AR model's tokenizer has no {name} ({token!r}): this is not the "
                    "processor of a GLM-Image checkpoint."
                )
            self._names[name] = token
        self._ids = {name: full.token_to_id(token) for name, token in self._names.items()}
        self._control = {t.content: i for i, t in full.get_added_tokens_decoder().items()}
        self._control |= dict(zip(self._names.values(), self._ids.values(), strict=True))
        visual = re.compile(re.sub(r"\d+", r"\\d+", re.escape(self._names["bos_token"])))
        reserved = self._control.keys() | set(filter(visual.fullmatch, full.get_vocab()))
        self._text = _load(_without(reserved, tokenizer_json))
        longest_first = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._template = chat_template
        self._renderer = PreTrainedTokenizerFast(tokenizer_object=full)

    def text_to_image(self, prompt: str, grid: Grid) -> list[int]:
        """Ids of `{prompt}<sop>H W<eop><sop>h w<eop><start>` for a large grid (H, W).

        The next ids are the preview's (h, w) in raster order, then the large grid's.

        Raises:
            GLMImageError: the prompt is empty.
        """
        return [
            *self._prompt_ids(prompt),
            *self._grid_ids(grid),
            *self._grid_ids(preview_grid(grid)),
            self._ids["bos_token"],
        ]

    def _prompt_ids(self, prompt: str) -> list[int]:
        """The chat template's turn of a user who says `prompt`."""
        core = prompt.strip()
        if not core:
            raise GLMImageError("The prompt is empty: write what the image should show.")
        # Space around the prompt is left to the template, which may trim it.
        before, after = self._render(prompt.replace(core, _PROMPT, 1)).split(_PROMPT)
        *head, last = self._control_pattern.split(before)
        first, *tail = self._control_pattern.split(after)
        ids = [i for piece in head for i in self._piece_ids(piece)]
        ids += self._text_ids(last + core + first)
        return ids + [i for piece in tail for i in self._piece_ids(piece)]

    def _render(self, prompt: str) -> str:
        if self._template is None:
            return prompt
        rendered: str = self._renderer.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": prompt}]}],
            chat_template=self._template,
            tokenize=False,
            **self._names,
        )
        if rendered.count(_PROMPT) != 1:
            raise GLMImageError(
                "The AR model's chat template does not carry the prompt exactly once: "
                "take chat_template.jinja from the original checkpoint."
            )
        return rendered

    def _grid_ids(self, grid: Grid) -> list[int]:
        size = self._text_ids(f"{grid[0]} {grid[1]}")
        return [self._ids["grid_bos_token"], *size, self._ids["grid_eos_token"]]

    def _piece_ids(self, piece: str) -> list[int]:
        """Ids of a piece of the template: one control token, or text between two."""
        return [self._control[piece]] if piece in self._control else self._text_ids(piece)

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self._text.encode(text).ids
        return ids


def _load(tokenizer_json: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise GLMImageError(f"The AR model's tokenizer.json cannot be read: {error}") from error


def _without(reserved: set[str], tokenizer_json: str) -> str:
    """The same tokenizer, to which the reserved names are text like any other."""
    data = json.loads(tokenizer_json)
    data["added_tokens"] = []
    data["post_processor"] = None  # it may name added tokens, and only ever adds such
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = {token: i for token, i in vocab.items() if token not in reserved}
    return json.dumps(data)
