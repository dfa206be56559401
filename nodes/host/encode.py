"""Encode images: as references for both stages, or as tokens and a layout."""

from typing import Any

import comfy.utils
import torch
from einops import rearrange
from torch import Tensor

from ...glm_core.data.grids import (
    PIXELS_PER_LATENT,
    PIXELS_PER_TOKEN,
    Size,
    preview_grid,
    token_grid,
)
from ...glm_core.data.layout import require_codebook
from ...glm_core.data.references import Reference, References
from ...glm_core.data.tokens import Layout, SemanticTokens
from ...glm_core.errors import ModelError
from ...glm_core.placement import memory
from ...glm_core.vision.pixels import bring_to_size, opaque, reference_size, require_images
from .ar_interface import AnyAR
from .out_of_memory import require_room

THUMBNAIL_SIDE = 128
COPIES = 3
"""Of resized images: as they are, as bytes of integers while they are halved, as vision pixels."""


def encode_references(
    ar: AnyAR, vae: Any, images: Tensor, chain: References | None, per_sample: bool
) -> tuple[References, Size]:
    """Add images [B, H, W, 3 or 4] to a chain of references, None for an empty one.

    Returns:
        the longer chain, and the (height, width) that the images were resized to

    Raises:
        GLMImageError: there is no image, or one that cannot be read; the chain is of another
            codebook; the VAE makes latents of another shape than the decoder's.
    """
    require_images(images)
    if chain is not None:
        require_codebook("references before these", chain.codebook, ar.codebook)
    size = reference_size(*images.shape[1:3], ar.vision.image_config)
    _require_room(images, size, "use fewer images")
    images = opaque(images)
    images = bring_to_size(images, size)
    tokens, latents = ar.vision.encode(images), vae.encode(images)
    _require_latents(latents, len(images), size)
    added = [
        Reference(tokens[i], latents[i : i + 1].float().cpu(), _thumbnail(images[i]), size)
        for i in range(len(images))
    ]
    if chain is None:
        chain = References(((),), ar.codebook)
    return chain.followed_by(added, per_sample), size


def encode_tokens(
    ar: AnyAR, images: Tensor, height: int, width: int
) -> tuple[SemanticTokens, Layout]:
    """The tokens and the layout of images [B, H, W, 3 or 4] at a size.

    The images are cropped about their centre to the size's aspect. The preview is encoded from a
    small copy, one token a cell, because the model's own previews are small copies of their images.

    Raises:
        GLMImageError: there is no image, or one that cannot be read.
    """
    require_images(images)
    grid = token_grid(height, width)
    preview = preview_grid(grid)
    _require_room(images, (height, width), "use a smaller size or fewer images")
    images = _crop_to_aspect(opaque(images), height / width)
    tokens = ar.vision.encode(bring_to_size(images, (height, width)))
    small = tuple(side * PIXELS_PER_TOKEN for side in preview)
    preview_tokens = ar.vision.encode(bring_to_size(images, small))
    size = {"codebook": ar.codebook, "height": height, "width": width}
    colours = ar.palette.colours
    return (
        SemanticTokens(tokens, info={"made_from": "image"}, palette=colours, **size),
        Layout(preview_tokens, torch.zeros(preview, dtype=torch.bool), palette=colours, **size),
    )


def _require_room(images: Tensor, size: Size, helps: str) -> None:
    """
    Raises:
        GLMImageError: images [B, H, W, C] do not fit into memory at a size.
    """
    needed = COPIES * memory.pixels(len(images), *size)
    require_room("Resizing the images", {images.device: needed}, helps)


def _require_latents(latents: Tensor, images: int, size: Size) -> None:
    """
    Raises:
        GLMImageError: the latents of images of a size are not [B, C, H / 8, W / 8].
    """
    rows, columns = (side // PIXELS_PER_LATENT for side in size)
    found = list(latents.shape)
    if len(found) != 4 or (found[0], *found[2:]) != (images, rows, columns):
        raise ModelError(
            f"The VAE made a latent of the shape {found} of {size[1]}x{size[0]} pixels, and the "
            f"decoder takes [{images}, channels, {rows}, {columns}]; connect GLM-Image Load VAE."
        )


def _crop_to_aspect(images: Tensor, aspect: float) -> Tensor:
    """The largest centred part of [B, H, W, C] whose height is `aspect` times its width."""
    height, width = images.shape[1:3]
    rows = min(height, max(1, round(width * aspect)))
    columns = min(width, max(1, round(height / aspect)))
    top, left = (height - rows) // 2, (width - columns) // 2
    return images[:, top : top + rows, left : left + columns]


def _thumbnail(image: Tensor) -> Tensor:
    """A copy [h, w, 3] of an image [H, W, 3], its longer side THUMBNAIL_SIDE."""
    scale = THUMBNAIL_SIDE / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    pixels = rearrange(image, "h w c -> 1 c h w")
    small = comfy.utils.common_upscale(pixels, width, height, "area", "disabled")
    return rearrange(small, "1 c h w -> h w c").cpu()
