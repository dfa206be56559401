"""Glyph texts: which parts of a prompt are to be rendered, and their ByT5 ids and encodings.

Source: `GlmImagePipeline.get_glyph_texts` and `_get_glyph_embeds` in diffusers 0.42.1, and ByT5's
byte vocabulary (a byte's id is its value + 3, after pad, eos and unk).
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

PAD, EOS, BYTE_OFFSET = 0, 1, 3
MAX_LENGTH = 2048  # ids of one text, eos included

# One after the other, each over the whole prompt; an apostrophe is a quote like any other.
QUOTES = (r"'([^']*)'", r"“([^“”]*)”", r'"([^"]*)"', r"「([^「」]*)」")


def texts_to_render(prompt: str) -> list[str]:
    """The quoted parts of a prompt, by kind of quote and then by place."""
    return [text for quote in QUOTES for text in re.findall(quote, prompt)]


def is_cut(text: str) -> bool:
    """Whether `byte_ids` leaves out the end of a text."""
    return len(text.encode("utf-8", errors="replace")) >= MAX_LENGTH


def byte_ids(text: str, max_length: int = MAX_LENGTH) -> list[int]:
    """ByT5 ids of a text, with eos, at most `max_length` of them.

    Every character is bytes, those of a literal `</s>` too; half a surrogate pair becomes `?`.
    """
    ids = [byte + BYTE_OFFSET for byte in text.encode("utf-8", errors="replace")]
    return [*ids[: max_length - 1], EOS]


def glyph_ids(texts: list[str]) -> list[list[int]]:
    """The ids of each text, as the encoder was trained on them.

    No text at all is one empty text. Where the number of texts is even, each begins with one pad
    that is attended to.
    """
    texts = texts or [""]
    lead = [PAD] * ((len(texts) + 1) % 2)
    return [lead + byte_ids(text) for text in texts]


def encode_texts(
    encoder: Callable[[Tensor], Tensor],
    texts: list[str],
    device: torch.device | str | None = None,
) -> Tensor:
    """The decoder's glyph embedding: each text encoded on its own, so that nothing is padded.

    Args:
        encoder: [1, L] ids -> [1, L, d_model].
        texts: what `texts_to_render` found.
        device: where the encoder wants its ids.

    Returns:
        [1, sum of the lengths, d_model]
    """
    return torch.cat(
        [encoder(torch.tensor([ids], device=device)) for ids in glyph_ids(texts)], dim=1
    )
