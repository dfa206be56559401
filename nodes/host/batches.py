"""Which image of a batch of tokens each latent is: by the numbers that latents keep in a batch."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...glm_core.data.tokens import SemanticTokens
from ...glm_core.errors import BatchError

T = TypeVar("T")

ORIGIN = "glm_origin"
"""In a LATENT: the root of the tokens that it was made for. ComfyUI's nodes hand it on."""
SEVERAL = "several"
"""The origin of latents of several batches."""
MAX_DRAWS = 64
"""Rows of noise that `drawn_numbers` draws, each as large as a latent, besides one a latent."""


def pictures_of(
    own: Sequence[int], latents: int, numbers: list[int] | None, known: bool, same: bool = False
) -> list[int]:
    """For each latent, the place of the image in the tokens that it is painted with.

    Latent i is number i of its batch, unless LatentFromBatch or LatentBatch has taken some out or
    moved them. RepeatLatentBatch gives a repetition the next numbers.

    Args:
        own: the numbers of the images that the tokens hold, all different.
        numbers: the latents' numbers, `batch_index` of a LATENT; None for unknown ones.
        known: whether `numbers` are of the LATENT, and may choose some of the images.
        same: whether they are certain to count in the batch that `own` counts in.

    Raises:
        GLMImageError: the numbers are no choice, and the latents no whole repetition of the images.
    """
    images = len(own)
    whole = latents % images == 0
    if numbers is not None and len(numbers) == latents:
        places, low = {number: place for place, number in enumerate(own)}, min(own)
        period = max(own) - low + 1  # of RepeatLatentBatch
        found = [places.get(low + (number - low) % period, -1) for number in numbers]
        different = len(set(numbers)) == latents
        # A sampler's noise also counts from 0 for latents that have no numbers.
        telling = known or (whole and numbers != list(range(latents)))
        if different and telling and set(numbers) <= set(own):
            return found
        consecutive = numbers == list(range(numbers[0], numbers[0] + latents))
        believed = same or (telling and consecutive) if different else _equally_often(found, images)
        if whole and believed and -1 not in found:
            return found
    if not whole:
        raise BatchError(
            f"The latent holds {latents} images, which is no multiple of the {images} that the "
            "semantic tokens hold; set batch_index on GLM-Image Apply Tokens, change the latent's "
            "batch, or connect GLM-Image Split Batch before a sampler that takes images one by one."
        )
    # Numbers that occur twice are those of a fixed seed or of joined batches, and tell nothing.
    return [i % images for i in range(latents)]


def pictures_of_latent(own: Sequence[int], root: str, latent: dict[str, Any]) -> list[int]:
    """`pictures_of` a LATENT, whose numbers may count in another batch than the tokens'.

    Args:
        root: of the tokens, see `SemanticTokens`.
    """
    latents, numbers, origin = len(latent["samples"]), numbers_of(latent), latent.get(ORIGIN)
    if origin is None:  # not from Apply Tokens: they count the images as they come
        own = range(len(own))
    elif origin != root and latents % len(own) == 0:
        numbers = None
    return pictures_of(own, latents, numbers, known=numbers is not None, same=origin == root)


def sets_of(sets: Sequence[T], tokens: SemanticTokens | None) -> Sequence[T]:
    """The sets of references, or that of each image that was taken out of a batch.

    Image i of a batch was made from set i modulo their number.
    """
    if tokens is None or tokens.numbers is None:
        return sets
    return [sets[number % len(sets)] for number in tokens.numbers]


def numbers_of(latent: dict[str, Any]) -> list[int] | None:
    """A LATENT's `batch_index`, or None if it is not one of each image."""
    numbers = latent.get("batch_index")
    return numbers if numbers is not None and len(numbers) == len(latent["samples"]) else None


def _equally_often(pictures: list[int], images: int) -> bool:
    return all(pictures.count(i) * images == len(pictures) for i in range(images))


def drawn_numbers(noise: Tensor, seed: int | None) -> list[int] | None:
    """The `batch_index` that `comfy.sample.prepare_noise` made the noise with.

    Returns:
        None if it is other noise, or of numbers far beyond the latents' own
    """
    if not isinstance(seed, int) or noise.dtype != torch.float32 or not noise.any():
        return None
    rows = noise.cpu()
    numbers: dict[int, int] = {}
    generator = torch.Generator().manual_seed(seed)
    for number in range(MAX_DRAWS + len(rows)):
        drawn = torch.randn(rows[:1].shape, generator=generator)[0]
        alike = (rows[:, :, 0, 0] == drawn[:, 0, 0]).all(1)  # one cell, which is quickly compared
        for row in alike.nonzero()[:, 0].tolist():
            if torch.equal(rows[row], drawn):
                numbers[row] = number
        if len(numbers) == len(rows):
            return [numbers[row] for row in range(len(rows))]
    return None
