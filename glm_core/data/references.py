"""Reference images as data: what the AR model and the decoder each see of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import GLMImageError
from .grids import Size


@dataclass(frozen=True, eq=False)
class Reference:
    """One image, brought to a size on which the AR model and the VAE agree.

    tokens: int32 [h, w], one per 32 px.
    latent: float32 [1, C, H / 8, W / 8], as the VAE gives it.
    thumbnail: float32 [h, w, 3] between 0 and 1.
    size: (height, width) in pixels.
    """

    tokens: Tensor
    latent: Tensor
    thumbnail: Tensor
    size: Size


@dataclass(frozen=True, eq=False)
class References:
    """The references of every sample: one set for all, or one set each.

    sets: of references, in the order in which the prompt shows them.
    codebook: number of codes; every token is below it.
    """

    sets: tuple[tuple[Reference, ...], ...]
    codebook: int

    @property
    def per_sample(self) -> bool:
        return len(self.sets) > 1

    def followed_by(self, images: Sequence[Reference], per_sample: bool) -> "References":
        """A chain with more images at its end.

        Args:
            per_sample: image i is for sample i alone; otherwise all are for every sample.

        Raises:
            GLMImageError: the chain has another number of samples already.
        """
        added = [(image,) for image in images] if per_sample else [tuple(images)]
        ours, theirs = len(self.sets), len(added)
        if ours > 1 and theirs > 1 and ours != theirs:
            raise GLMImageError(
                f"The references before these are for {ours} samples, one each, and these images "
                f"are for {theirs}; give both the same number of images."
            )
        count = max(ours, theirs)
        sets = (self.sets[i % ours] + added[i % theirs] for i in range(count))
        return References(tuple(sets), self.codebook)
