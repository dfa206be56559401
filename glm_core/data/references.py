"""Reference images as data: tokens for the AR model, latents for the decoder."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import BatchError
from .grids import Size


@dataclass(frozen=True, eq=False)
class Reference:
    """An image, resized so that the AR model and the VAE see the same grid.

    tokens: int32 [h, w], one per 32 px.
    latent: float32 [1, C, H / 8, W / 8], as the VAE encodes it.
    thumbnail: float32 [h, w, 3] between 0 and 1.
    size: (height, width) in pixels.
    """

    tokens: Tensor
    latent: Tensor
    thumbnail: Tensor
    size: Size


@dataclass(frozen=True, eq=False)
class References:
    """The references of a run: one set for all samples, or one set per sample.

    sets: each in the order in which the prompt shows its references.
    codebook: number of codes; every token is below it.
    """

    sets: tuple[tuple[Reference, ...], ...]
    codebook: int

    @property
    def per_sample(self) -> bool:
        return len(self.sets) > 1

    def followed_by(self, images: Sequence[Reference], per_sample: bool) -> "References":
        """These references with more images after them.

        Args:
            per_sample: image i is for sample i alone; otherwise every sample gets all of them.

        Raises:
            GLMImageError: these are for another number of samples.
        """
        added = [(image,) for image in images] if per_sample else [tuple(images)]
        own, new = len(self.sets), len(added)
        if own > 1 and new > 1 and own != new:
            raise BatchError(
                f"The references before these are for {own} samples, one each, and these images "
                f"are for {new}; give both the same number of images."
            )
        sets = (self.sets[i % own] + added[i % new] for i in range(max(own, new)))
        return References(tuple(sets), self.codebook)
