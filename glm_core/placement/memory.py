"""Bytes that a stage needs beside its weights. Plans and hosts use the same formulas.

Sizes are (height, width) in pixels unless said otherwise; `dtype` is what the stage computes in.
"""

import torch

from ..ar.cache import span_of
from ..ar.model import ARConfig
from ..data.grids import PATCHES_PER_TOKEN
from ..data.references import References
from ..decoder.config import DecoderConfig
from ..vae import VAEConfig
from ..vision.encoder import VisionConfig


def pixels(batch: int, height: int, width: int) -> int:
    """Float32 images, as hosts pass them."""
    return batch * height * width * 3 * torch.float32.itemsize


def latents(batch: int, channels: int, latent: tuple[int, int]) -> int:
    """Float32 latents of (height, width) cells."""
    return batch * channels * latent[0] * latent[1] * torch.float32.itemsize


def kv_cache(config: ARConfig, batch: int, length: int, dtype: torch.dtype) -> int:
    """Keys and values of at least `length` positions in one layer of the AR model."""
    numbers = 2 * config.kv_heads * config.head_dim * batch * span_of(length)
    return numbers * dtype.itemsize


def ar(config: ARConfig, block: int, dtype: torch.dtype) -> int:
    """The widest activations of a pass over at most `block` ids, over all samples."""
    return 4 * (config.hidden_size + config.intermediate_size) * block * dtype.itemsize


def vision(config: VisionConfig, height: int, width: int, dtype: torch.dtype) -> int:
    """One image's widest layer, or the float32 scores of all codes with both their factors."""
    cells = height * width // config.patch_size**2
    layer = cells * (4 * config.hidden_size + 2 * config.intermediate_size) * dtype.itemsize
    scores = config.codebook * (cells + config.code_dim) + 2 * cells * config.code_dim
    return max(layer, scores * torch.float32.itemsize)


def decoder(
    config: DecoderConfig,
    batch: int,
    latent: tuple[int, int],
    references: int,
    dtype: torch.dtype,
) -> int:
    """One step over a batch of latents of (height, width) cells.

    Per token: the residual stream, its two normalised forms, query, key, value and their float32
    copies while they are rotated (4 + 8 hidden), or the feed-forward's inner layer twice (8
    hidden); the two are never allocated at the same time. Attention is linear in memory with every
    kernel that a host chooses for bf16 and float32. A reference token adds its key and value,
    joined to the image's own (2 hidden).

    Args:
        references: reference tokens that each sample attends to.
    """
    height, width = (-(-side // config.patch_size) for side in latent)
    numbers = (16 * height * width + 2 * references) * batch * config.hidden_size
    return numbers * dtype.itemsize


def reference_cache(config: DecoderConfig, tokens: int, dtype: torch.dtype) -> int:
    """Keys and values of `tokens` reference tokens in one block of the decoder."""
    return 2 * config.hidden_size * tokens * dtype.itemsize


def whole_reference_cache(references: References, config: DecoderConfig, dtype: torch.dtype) -> int:
    """Keys and values of all references in all blocks, stored in `dtype` (fp8 scales add 0.2 %)."""
    cells = sum(image.tokens.numel() for images in references.sets for image in images)
    patches = PATCHES_PER_TOKEN**2 * cells
    return config.num_layers * reference_cache(config, patches, dtype)


def vae_decode(config: VAEConfig, latent: tuple[int, int], dtype: torch.dtype) -> int:
    """One image from latents of (height, width) cells.

    A residual block holds its input, two tensors made from it, and an output no wider. At each
    resolution the widest input is the output of the coarser block before it: at full resolution it
    has the second of the channel counts.
    """
    widths = config.block_out_channels
    pixels = latent[0] * latent[1] * config.downscale**2
    inputs = (*widths[1:], widths[-1])
    widest = max(width / 4**level for level, width in enumerate(inputs))
    return int(4 * widest * pixels * dtype.itemsize)
