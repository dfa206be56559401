"""Semantic tokens, the image's size and references in a CONDITIONING, beside the glyph states."""

from typing import Any, NamedTuple

import torch
from einops import repeat
from torch import Tensor

from ...glm_core.data.grids import PIXELS_PER_LATENT, PIXELS_PER_TOKEN, next_multiples
from ...glm_core.data.tokens import SemanticTokens
from ...glm_core.decoder.model import DROPPED, DecoderConfig
from ...glm_core.errors import SizeError, TokensError
from .batches import drawn_numbers, pictures_of, pictures_of_latent
from .glyph import EMPTY
from .reference_cache import HostReferenceCache
from .tiles import LATENTS_PER_TOKEN, PLACES, places_of, tokens_of_tile, with_places

Conditioning = list[list[Any]]

TOKENS = "glm_tokens"
SIZE = "glm_size"
CODEBOOK = "glm_codebook"
IMAGES = "glm_images"
"""The tokens' numbers in the batch that they were taken out of."""
ROOT = "glm_root"
"""Of that batch."""
REFERENCES = "glm_references"
PICTURES = "glm_pictures"
"""For each latent, the place of the tokens that it is painted with, where a node has the LATENT."""
REPLACED = (REFERENCES, "additional_models")  # entries that an earlier Apply Tokens left


def with_tokens(
    conditioning: Conditioning,
    tokens: SemanticTokens,
    references: HostReferenceCache | None = None,
) -> Conditioning:
    """The conditioning of the conditional pass: with the tokens, and references to attend to.

    The cache's patchers are listed for ComfyUI, which loads them beside the decoder.
    """
    conditional = _with(conditioning, tokens, tokens.tokens)
    if references is None:
        return conditional
    entries = {REFERENCES: references, "additional_models": references.patchers}
    return [[states, {**values, **entries}] for states, values in conditional]


def without_prior(conditioning: Conditioning, tokens: SemanticTokens) -> Conditioning:
    """The conditioning of the unconditional pass: the same grid with every token dropped."""
    return _with(conditioning, tokens, torch.full_like(tokens.tokens, DROPPED))


def _with(conditioning: Conditioning, tokens: SemanticTokens, ids: Tensor) -> Conditioning:
    entries = {
        TOKENS: ids,
        SIZE: (tokens.height, tokens.width),
        CODEBOOK: tokens.codebook,
        IMAGES: list(tokens.image_numbers),
        ROOT: tokens.root,
    }
    others = (
        (_text(states, values), {key: values[key] for key in values if key not in REPLACED})
        for states, values in conditioning
    )
    grid = tuple(ids.shape[1:])
    return [
        [states, {**values, **entries, PLACES: with_places(values.get(PLACES), grid)}]
        for states, values in others
    ]


def _text(states: Tensor, values: dict[str, Any]) -> Tensor:
    """The states, or the empty text's where ConditioningZeroOut has zeroed them.

    The model was trained with the empty text in the place of no text, and never with zeros.
    """
    return states if states.any() else values[EMPTY]


def for_latent(conditioning: Conditioning, latent: dict[str, Any]) -> Conditioning:
    """The conditioning for the images of a LATENT, which samplers are not given.

    Raises:
        GLMImageError: the latents are no whole repetition of the images that they are of.
    """
    return [
        [states, {**values, PICTURES: pictures_of_latent(values[IMAGES], values[ROOT], latent)}]
        if TOKENS in values
        else [states, values]
        for states, values in conditioning
    ]


def unless_zeroed(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry, or that of the unconditional pass where its states are zeros.

    ConditioningZeroOut behind Apply Tokens zeroes the states and leaves the tokens and references.
    """
    if TOKENS not in entry or EMPTY not in entry or entry["cross_attn"].any():
        return entry
    others = {key: entry[key] for key in entry if key != REFERENCES}
    dropped = torch.full_like(entry[TOKENS], DROPPED)
    return {**others, "cross_attn": entry[EMPTY], TOKENS: dropped}


def guides_away_from_tokens(entry: dict[str, Any]) -> bool:
    """Whether a negative entry has tokens, so that guidance leads away from them."""
    return TOKENS in entry and bool((unless_zeroed(entry)[TOKENS] != DROPPED).any())


def empty_text(conditioning: Conditioning) -> Conditioning:
    """The empty text's conditioning, which the glyph encoder stores in every conditioning it makes.

    Raises:
        GLMImageError: another CLIP made the conditioning.
    """
    require_glyphs("positive", conditioning)
    return [[values[EMPTY], {EMPTY: values[EMPTY]}] for _, values in conditioning[:1]]


def require_glyphs(name: str, conditioning: Conditioning) -> None:
    if not conditioning or any(EMPTY not in values for _, values in conditioning):
        raise TokensError(
            f"The {name} conditioning was not made with GLM-Image's glyph encoder; "
            "connect GLM-Image Glyph Encode."
        )


def require_tokens(name: str, conditioning: Conditioning) -> None:
    if not conditioning or any(TOKENS not in values for _, values in conditioning):
        raise TokensError(
            f"The {name} conditioning carries no semantic tokens; connect GLM-Image Apply Tokens."
        )


class Conditions(NamedTuple):
    """The decoder's inputs beside the latents."""

    glyphs: Tensor  # [1, T, text_embed_dim]
    token_map: Tensor  # int32 [N, 1, H, W], the latents' size, so that areas crop both alike
    size: tuple[int, int]  # (height, width) in pixels
    images: list[int]  # for each latent, the number of the tokens that it is painted with


def conditions(entry: dict[str, Any], latents: torch.Size, config: DecoderConfig) -> Conditions:
    """The decoder's inputs from one conditioning entry, for latents [N, C, H, W].

    Raises:
        GLMImageError: the entry has no tokens, or they do not fit the decoder or the latents.
    """
    glyphs, tokens = entry["cross_attn"], entry.get(TOKENS)
    if tokens is None:
        raise TokensError(
            "This conditioning carries no semantic tokens; "
            "connect GLM-Image Apply Tokens before the sampler, for positive and negative."
        )
    if glyphs.shape[-1] != config.text_embed_dim:
        raise TokensError(
            f"The conditioning's states have {glyphs.shape[-1]} channels and the decoder takes "
            f"{config.text_embed_dim}; encode with the glyph encoder of the decoder's checkpoint."
        )
    if entry[CODEBOOK] != config.prior_vq_quantizer_codebook_size:
        raise TokensError(
            f"The semantic tokens have a codebook of {entry[CODEBOOK]} ids and the decoder one of "
            f"{config.prior_vq_quantizer_codebook_size}; sample them with the AR model of the "
            "decoder's checkpoint."
        )
    tokens, size = tokens_of_tile(tokens, entry[SIZE], latents, places_of(entry))
    _check_size(tokens, size, latents)
    pictures = _pictures(entry, tokens, latents[0])
    token_map = repeat(
        tokens[pictures],
        "n h w -> n 1 (h p) (w q)",
        p=LATENTS_PER_TOKEN,
        q=LATENTS_PER_TOKEN,
    )
    device = entry["device"]
    images = [entry[IMAGES][place] for place in pictures]
    return Conditions(glyphs.to(device), token_map.to(device), size, images)


def _check_size(tokens: Tensor, size: tuple[int, int], latents: torch.Size) -> None:
    rows, cols = tokens.shape[1:]
    if tuple(latents[-2:]) == (rows * LATENTS_PER_TOKEN, cols * LATENTS_PER_TOKEN):
        return
    height, width = (side * PIXELS_PER_LATENT for side in latents[-2:])
    fitting_height, fitting_width = next_multiples(height, width)
    if (fitting_height, fitting_width) == (height, width):
        advice = (
            "use the LATENT of GLM-Image Apply Tokens; a picture that was scaled up, and a tile "
            "of one, needs tokens of its own from GLM-Image Encode Tokens, as in the workflow "
            "'Upscale in tiles', and a padded one as in 'Extend a picture'"
        )
    else:
        advice = (
            f"scale or pad the picture to {fitting_width} x {fitting_height}, the next multiples "
            f"of {PIXELS_PER_TOKEN}, before VAE Encode, use tokens of that size, "
            "and crop the finished picture with GLM-Image Crop To Size"
        )
    raise SizeError(
        f"The semantic tokens are a {rows} x {cols} grid for {size[1]} x {size[0]} pixels and "
        f"the latent is one of {width} x {height} pixels; {advice}."
    )


def _pictures(entry: dict[str, Any], tokens: Tensor, latents: int) -> list[int]:
    """For each latent, the place of the tokens that it is painted with.

    Samplers are not given the latent's `batch_index`. ComfyUI's noise has it: it is a row for each
    number, drawn from the seed one after the other.
    """
    if PICTURES in entry:
        return entry[PICTURES]
    numbers = drawn_numbers(entry["noise"], entry.get("seed")) if len(tokens) > 1 else None
    return pictures_of(entry[IMAGES], latents, numbers, known=False)
