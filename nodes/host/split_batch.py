"""A batch as single images: each with its own tokens, noise, mask and references."""

from typing import Any

from torch import Tensor

from ...glm_core.errors import BatchError
from .batches import numbers_of, pictures_of_latent
from .conditioning import IMAGES, ROOT, TOKENS, Conditioning, require_tokens

MASK = "mask"
"""Of a conditioning: [H, W], or a row for each image."""


def split_latent(latent: dict[str, Any]) -> list[dict[str, Any]]:
    """The LATENTs of one image each. Their `batch_index` gives them the noise of the batch.

    Raises:
        GLMImageError: the batch is empty.
    """
    samples, mask = latent["samples"], latent.get("noise_mask")
    if not len(samples):
        raise BatchError("The latent holds no image; connect the latent of the batch.")
    numbers = numbers_of(latent) or range(len(samples))
    singles = [
        {**latent, "samples": samples[i : i + 1], "batch_index": [number]}
        for i, number in enumerate(numbers)
    ]
    if mask is not None:
        mask = mask.reshape(-1, 1, *mask.shape[-2:])
        singles = [{**single, "noise_mask": _row(mask, i)} for i, single in enumerate(singles)]
    return singles


def split_conditioning(
    name: str, conditioning: Conditioning, latent: dict[str, Any]
) -> list[Conditioning]:
    """For each image of a LATENT, the conditioning that it alone is painted with.

    Raises:
        GLMImageError: the conditioning has no tokens, or the latents are no whole repetition of
            the images that they are of.
    """
    require_tokens(name, conditioning)
    singles: list[Conditioning] = [[] for _ in latent["samples"]]
    for states, values in conditioning:
        for i, picture in enumerate(pictures_of_latent(values[IMAGES], values[ROOT], latent)):
            singles[i].append([_row(states, i), _values_of(values, i, picture)])
    return singles


def _values_of(values: dict[str, Any], i: int, picture: int) -> dict[str, Any]:
    """A conditioning's values for latent i, which is painted with the tokens at a place."""
    own = {TOKENS: _row(values[TOKENS], picture), IMAGES: [values[IMAGES][picture]]}
    found = values | own
    if MASK in values and values[MASK].ndim > 2:
        found[MASK] = _row(values[MASK], i)
    return found


def _row(batch: Tensor, i: int) -> Tensor:
    """Row i, as ComfyUI repeats a shorter batch to the latents' number: [1, ...]."""
    return batch[i % len(batch)][None]
