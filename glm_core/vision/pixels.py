"""Reference images: the size they are brought to, and the pixels that the vision encoder reads.

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
from ..errors import GLMImageError

MAX_ASPECT = 4  # the checkpoint's processor refuses longer images

# What this file does not do, and the value that says it need not; transformers' defaults for the
# first two differ, so that they are always in the file.
FIXED = {
    "merge_size": 1,
    "temporal_patch_size": 1,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,  # bicubic, by Pillow's number
}


@dataclass(frozen=True)
class ImageConfig:
    """The image processor's values, see `Processor.image`.

    min_side, max_side: multiples of 32 between which the processor takes an image as it is.
    """

    patch_size: int
    min_side: int
    max_side: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ImageConfig":
        """Read a processor's config; GLMImageError names what is missing or not supported."""
        for name, value in FIXED.items():
            if config.get(name, value) != value:
                raise GLMImageError(
                    f"The image processor's {name} is {config[name]!r}, but only {value!r} is "
                    "supported."
                )
        try:
            return cls(
                patch_size=config["patch_size"],
                min_side=math.ceil(round(config["min_pixels"] ** 0.5) / PIXELS_PER_TOKEN)
                * PIXELS_PER_TOKEN,
                max_side=round(config["max_pixels"] ** 0.5) // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN,
                rescale_factor=config["rescale_factor"],
                mean=tuple(config["image_mean"]),
                std=tuple(config["image_std"]),
            )
        except KeyError as missing:
            raise GLMImageError(
                f"The image processor's config has no {missing}; download the processor folder "
                "again."
            ) from missing

    def __post_init__(self) -> None:
        # The processor halves an image, and a patch of that is a token.
        if 2 * self.patch_size != PIXELS_PER_TOKEN:
            raise GLMImageError(
                f"The image processor's patch_size is {self.patch_size}, but a token of "
                f"{PIXELS_PER_TOKEN} pixels needs {PIXELS_PER_TOKEN // 2}."
            )
        if self.min_side > self.max_side:
            raise GLMImageError(
                f"The image processor's min_pixels and max_pixels leave no side between "
                f"{self.min_side} and {self.max_side} pixels."
            )


def reference_size(height: int, width: int, config: ImageConfig) -> Size:
    """The size nearest to an image's at which the AR model and the VAE see the same grid.

    Both then read the image as it is: its sides are multiples of 32 between `min_side` and
    `max_side`, and its aspect is at most 4.

    Raises:
        GLMImageError: a side is below 32 px, or the aspect is over 4.
    """
    short, long = sorted((height, width))
    if short < PIXELS_PER_TOKEN:
        raise GLMImageError(
            f"The reference image has {width}x{height} pixels: use one with at least "
            f"{PIXELS_PER_TOKEN} pixels a side."
        )
    if long > MAX_ASPECT * short:
        raise GLMImageError(
            f"The reference image has {width}x{height} pixels, an aspect of {long / short:.3g}: "
            f"crop it until its longer side is at most {MAX_ASPECT} times the shorter one."
        )
    scale = min(max(1, config.min_side / short), config.max_side / long)
    rounded = (round(side * scale / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN for side in (short, long))
    short, long = (min(max(side, config.min_side), config.max_side) for side in rounded)
    long = min(long, MAX_ASPECT * short)
    return (short, long) if height <= width else (long, short)


def opaque(image: Tensor) -> Tensor:
    """Pixels [..., 3 or 4] to float32 [..., 3] between 0 and 1, see-through parts over white.

    Raises:
        GLMImageError: another number of channels, or a pixel that is no number.
    """
    if image.shape[-1] not in (3, 4):
        raise GLMImageError(
            f"The reference image has {image.shape[-1]} channels: use an RGB or RGBA image."
        )
    if not image.isfinite().all():
        raise GLMImageError(
            "The reference image holds pixels that are no numbers (NaN or infinite): look at what "
            "made it, often a VAE decode in half precision."
        )
    image = image.float().clamp(0, 1)
    colour, alpha = image[..., :3], image[..., 3:]
    return colour * alpha + (1 - alpha) if image.shape[-1] == 4 else colour


def bring_to_size(image: Tensor, size: Size) -> Tensor:
    """Float pixels [B, H, W, 3] between 0 and 1, resized by Lanczos to [B, *size, 3]."""
    for axis, length in ((2, size[1]), (1, size[0])):
        if image.shape[axis] != length:
            index, weights = _taps(image.shape[axis], length, _lanczos, 3)
            image = _weigh(image, axis, index, weights.to(image.dtype))
    return image.clamp(0, 1)


def vision_pixels(image: Tensor, config: ImageConfig) -> Tensor:
    """What the vision encoder reads of images whose sides are multiples of 32.

    The checkpoint's processor does the same to a size from `reference_size`: 8 bits, half the
    sides, normalised.

    Args:
        image: float [B, H, W, 3] between 0 and 1.

    Returns:
        float32 [B, 3, H / 2, W / 2], one patch a token.
    """
    token_grid(image.shape[1], image.shape[2])  # raises for sizes that have none
    pixels = halve((image * 255).round().to(torch.uint8))
    pixels = (pixels.double() * config.rescale_factor).float()
    mean, std = (torch.tensor(x, device=image.device) for x in (config.mean, config.std))
    return rearrange((pixels - mean) / std, "b h w c -> b c h w")


def halve(image: Tensor) -> Tensor:
    """uint8 [B, H, W, C] to [B, H / 2, W / 2, C], bit for bit as Pillow's `resize(BICUBIC)`.

    Pillow weighs along rows, then along columns, in integers with 22 fractional bits, and rounds to
    8 bits after each; torch's own antialiased resize rounds its weights otherwise. (Pillow 13 takes
    columns first where H > 2 W. The checkpoint is older, so this does not.)
    """
    for axis in (2, 1):
        index, weights = _taps(image.shape[axis], image.shape[axis] // 2, _bicubic, 2)
        fixed = (weights.abs() * 2**22 + 0.5).floor().copysign(weights).to(torch.int32)
        total = _weigh(image.to(torch.int32), axis, index, fixed) + 2**21
        image = (total >> 22).clamp(0, 255).to(torch.uint8)
    return image


def _taps(
    length: int, size: int, kernel: Callable[[Tensor], Tensor], support: int
) -> tuple[Tensor, Tensor]:
    """Where each of `size` outputs reads an input of `length`, and by what weight.

    Where it shrinks, the kernel is stretched to cover all that an output stands for.

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


def _weigh(image: Tensor, axis: int, index: Tensor, weights: Tensor) -> Tensor:
    """Sum over the taps along an axis of [B, H, W, C]; tap by tap, which needs little memory."""
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
