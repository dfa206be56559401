"""Glyph texts: the quoted parts of a prompt, their ByT5 ids and their encodings.

Source: `GlmImagePipeline.get_glyph_texts` and `_get_glyph_embeds` in diffusers 0.42.1, and ByT5's
byte vocabulary (a byte's id is its value + 3, after pad, eos and unk).
"""

import re
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

PAD, EOS, BYTE_OFFSET = 0, 1, 3
MAX_LENGTH = 2048  # ids of one text, eos included
MAX_TEXTS = 256  # of one image; each is a pass of the encoder
MAX_IDS = 8 * MAX_LENGTH  # of all texts of one image, which the decoder attends to

# Each is searched over the whole prompt in turn. An apostrophe counts as a quote.
QUOTES = (r"'([^']*)'", r"“([^“”]*)”", r'"([^"]*)"', r"「([^「」]*)」")


def texts_to_render(prompt: str) -> list[str]:
    """The quoted parts of a prompt, by kind of quote and then by position."""
    return [text for quote in QUOTES for text in re.findall(quote, prompt)]


def texts_that_fit(texts: list[str]) -> list[str]:
    """The first texts, as many as `MAX_TEXTS` and `MAX_IDS` allow."""
    lengths = accumulate(len(byte_ids(text)) for text in texts[:MAX_TEXTS])
    return texts[: sum(length <= MAX_IDS for length in lengths)]


def is_cut(text: str) -> bool:
    """Whether `byte_ids` leaves out the end of a text."""
    return len(text.encode("utf-8", errors="replace")) >= MAX_LENGTH


def byte_ids(text: str, max_length: int = MAX_LENGTH) -> list[int]:
    """ByT5 ids of a text with eos, at most `max_length` of them.

    A literal `</s>` is bytes like any other text. Half a surrogate pair becomes `?`.
    """
    ids = [byte + BYTE_OFFSET for byte in text.encode("utf-8", errors="replace")]
    return [*ids[: max_length - 1], EOS]


def glyph_ids(texts: list[str]) -> list[list[int]]:
    """The ids of each text, in the form that the model was trained with.

    Without texts there is one empty text. If the number of texts is even, each begins with a pad,
    which the encoder attends to.
    """
    texts = texts or [""]
    lead = [PAD] * ((len(texts) + 1) % 2)
    return [lead + byte_ids(text) for text in texts]


def encode_texts(
    encoder: Callable[[Tensor], Tensor],
    texts: list[str],
    device: torch.device | str | None = None,
) -> Tensor:
    """The decoder's glyph embedding. Each text is encoded on its own, without padding.

    Args:
        encoder: [1, L] ids -> [1, L, d_model].
        texts: from `texts_to_render`.
        device: where the encoder takes its ids.

    Returns:
        [1, sum of the lengths, d_model]
    """
    return torch.cat(
        [encoder(torch.tensor([ids], device=device)) for ids in glyph_ids(texts)], dim=1
    )
