"""Reference images: the size that each is resized to, and the vision encoder's pixels.

Formulas: `GlmImageImageProcessorPil` of transformers, and Pillow's `Resample.c` beneath it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..data.grids import PIXELS_PER_TOKEN, Size, token_grid
from ..errors import CheckpointError, ReferenceImageError
from ..schema import exactly, many, number, optional, read, whole

MAX_ASPECT = 4  # the checkpoint's processor refuses longer images

CONFIG = {
    # The first two differ from transformers' defaults, so a config always has them.
    "merge_size": optional(exactly(1)),
    "temporal_patch_size": optional(exactly(1)),
    "do_resize": optional(exactly(True)),
    "do_rescale": optional(exactly(True)),
    "do_normalize": optional(exactly(True)),
    "resample": optional(exactly(3)),  # bicubic, by Pillow's number
    "patch_size": whole(1, 1024),
    "min_pixels": whole(1, 2**32),
    "max_pixels": whole(1, 2**32),
    "rescale_factor": number(1e-9, 1e9),
    "image_mean": many(number(-1e9, 1e9), 3, 3),
    "image_std": many(number(1e-9, 1e9), 3, 3),
}
"""What this file reads and supports of the processor's image config."""
ADVICE = "download the processor folder again"


@dataclass(frozen=True)
class ImageConfig:
    """The image processor's values, see `Processor.image`.

    min_side, max_side: multiples of 32; the processor does not resize images between them.
    """

    patch_size: int
    min_side: int
    max_side: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ImageConfig":
        """Read a processor's config; a GLMImageError names what is missing or not supported."""
        values = read(config, CONFIG, "The image processor's config", ADVICE)
        smallest = math.ceil(round(values["min_pixels"] ** 0.5) / PIXELS_PER_TOKEN)
        return cls(
            patch_size=values["patch_size"],
            min_side=smallest * PIXELS_PER_TOKEN,
            max_side=round(values["max_pixels"] ** 0.5) // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN,
            rescale_factor=values["rescale_factor"],
            mean=tuple(values["image_mean"]),
            std=tuple(values["image_std"]),
        )

    def __post_init__(self) -> None:
        # The processor halves an image. A patch of the half is a token.
        if 2 * self.patch_size != PIXELS_PER_TOKEN:
            raise CheckpointError(
                f"The image processor's patch_size is {self.patch_size}, but a token of "
                f"{PIXELS_PER_TOKEN} pixels needs {PIXELS_PER_TOKEN // 2}."
            )
        if self.min_side > self.max_side:
            raise CheckpointError(
                f"The image processor's min_pixels and max_pixels leave no side between "
                f"{self.min_side} and {self.max_side} pixels."
            )


def reference_size(height: int, width: int, config: ImageConfig) -> Size:
    """The size nearest to an image's at which the AR model and the VAE see the same grid.

    Both take an image of this size without resizing it: its sides are multiples of 32 between
    `min_side` and `max_side`, and its aspect is at most 4.

    Raises:
        GLMImageError: a side is below 32 px, or the aspect is over 4.
    """
    short, long = sorted((height, width))
    if short < PIXELS_PER_TOKEN:
        raise ReferenceImageError(
            f"The reference image has {width}x{height} pixels: use one with at least "
            f"{PIXELS_PER_TOKEN} pixels a side."
        )
    if long > MAX_ASPECT * short:
        raise ReferenceImageError(
            f"The reference image has {width}x{height} pixels, an aspect of {long / short:.3g}: "
            f"crop it until its longer side is at most {MAX_ASPECT} times the shorter one."
        )
    scale = min(max(1, config.min_side / short), config.max_side / long)
    rounded = (round(side * scale / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN for side in (short, long))
    short, long = (min(max(side, config.min_side), config.max_side) for side in rounded)
    long = min(long, MAX_ASPECT * short)
    return (short, long) if height <= width else (long, short)


def require_images(images: Tensor) -> None:
    """
    Raises:
        GLMImageError: a batch [B, ...] holds no image.
    """
    if not len(images):
        raise ReferenceImageError("There is no image in the batch; connect at least one.")


def opaque(image: Tensor) -> Tensor:
    """Pixels [..., 3 or 4] to float32 [..., 3] between 0 and 1, transparent parts over white.

    Raises:
        GLMImageError: another number of channels, or a pixel that is NaN or infinite.
    """
    if image.shape[-1] not in (3, 4):
        raise ReferenceImageError(
            f"The image has {image.shape[-1]} channels and not 3 or 4: use an RGB or RGBA image."
        )
    if not image.isfinite().all():
        raise ReferenceImageError(
            "The image holds pixels that are no numbers (NaN or infinite): check what made it, "
            "often a VAE decode in half precision."
        )
    image = image.float().clamp(0, 1)
    colour, alpha = image[..., :3], image[..., 3:]
    return colour * alpha + (1 - alpha) if image.shape[-1] == 4 else colour


def bring_to_size(image: Tensor, size: Size) -> Tensor:
    """Float pixels [B, H, W, 3] between 0 and 1, resized to [B, *size, 3] by Lanczos."""
    for axis, length in ((2, size[1]), (1, size[0])):
        if image.shape[axis] != length:
            index, weights = _taps(image.shape[axis], length, _lanczos, 3)
            image = _filter(image, axis, index, weights.to(image.dtype))
    return image.clamp(0, 1)


def vision_pixels(image: Tensor, config: ImageConfig) -> Tensor:
    """The vision encoder's input for images whose sides are multiples of 32.

    The checkpoint's processor does the same to an image of a `reference_size`: round to 8 bits,
    halve the sides, normalise.

    Args:
        image: float [B, H, W, 3] between 0 and 1.

    Returns:
        float32 [B, 3, H / 2, W / 2], a patch per token.
    """
    token_grid(image.shape[1], image.shape[2])  # raises for other sizes
    pixels = halve((image * 255).round().to(torch.uint8))
    pixels = (pixels.double() * config.rescale_factor).float()
    mean, std = (torch.tensor(x, device=image.device) for x in (config.mean, config.std))
    return rearrange((pixels - mean) / std, "b h w c -> b c h w")


def halve(image: Tensor) -> Tensor:
    """uint8 [B, H, W, C] to [B, H / 2, W / 2, C], bit for bit as Pillow's `resize(BICUBIC)`.

    Pillow filters along rows, then along columns, in integers with 22 fractional bits, and rounds
    to 8 bits after each. Torch's antialiased resize rounds its weights otherwise. (Pillow 13 starts
    with columns if H > 2 W. The checkpoint is older, so rows always come first here.)
    """
    for axis in (2, 1):
        index, weights = _taps(image.shape[axis], image.shape[axis] // 2, _bicubic, 2)
        fixed = (weights.abs() * 2**22 + 0.5).floor().copysign(weights).to(torch.int32)
        total = _filter(image.to(torch.int32), axis, index, fixed) + 2**21
        image = (total >> 22).clamp(0, 255).to(torch.uint8)
    return image


def _taps(
    length: int, size: int, kernel: Callable[[Tensor], Tensor], support: int
) -> tuple[Tensor, Tensor]:
    """The inputs, of `length`, that each of `size` outputs sums, and their weights.

    When an image shrinks, the kernel is stretched over all inputs that an output replaces.

    Returns:
        Indices int64 and weights float64, both [size, taps]; taps beyond the edges weigh 0.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    centre = (torch.arange(size, dtype=torch.float64) + 0.5)[:, None] * scale
    reach = support * stretch
    first = (centre - reach + 0.5).long().clamp(min=0)
    last = (centre + reach + 0.5).long().clamp(max=length)
    index = first + torch.arange(int((last - first).max()))
    weights = kernel((index - centre + 0.5) * (1.0 / stretch))
    weights = weights.masked_fill(index >= last, 0)
    return index.clamp(max=length - 1), weights / weights.sum(dim=1, keepdim=True)


def _filter(image: Tensor, axis: int, index: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of taps along an axis of [B, H, W, C]. One tap at a time saves memory."""
    index, weights = index.to(image.device), weights.to(image.device)
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    return sum(
        image.index_select(axis, index[:, tap]) * weights[:, tap].view(shape)
        for tap in range(index.shape[1])
    )


def _bicubic(x: Tensor) -> Tensor:
    """The cubic convolution kernel with a = -1/2, over -2..2."""
    a, x = -0.5, x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _lanczos(x: Tensor) -> Tensor:
    """sinc(x) sinc(x / 3), over -3..3."""
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0)
