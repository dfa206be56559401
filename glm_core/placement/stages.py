"""What the stages of a checkpoint need: weights by layer from its headers, and working memory."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..ar.cache import span_of
from ..ar.model import ARConfig
from ..data.grids import PATCHES_PER_TOKEN, PIXELS_PER_LATENT, preview_grid, token_grid
from ..decoder.config import DecoderConfig
from ..files.component import Component
from ..files.weight_dtypes import stored_bytes
from ..vae import VAEConfig
from ..vision.encoder import OTHER_PREFIXES, VISION_PREFIXES, VisionConfig
from . import memory
from .plan import Stage

PROMPT_IDS = 512
"""Ids of a long prompt."""
TILE = 512
"""Side in pixels of the tiles in which hosts decode an image that does not fit whole."""

AR_LAYER = re.compile(r"model\.language_model\.layers\.(\d+)\.")
DECODER_LAYER = re.compile(r"transformer_blocks\.(\d+)\.")
NO_LAYER = re.compile(r"$^")


@dataclass(frozen=True)
class Request:
    """The images to plan for.

    height, width: in pixels.
    references: reference images of that size for each sample.
    dtype: what the stages compute in.
    vae_dtype: what the VAE is stored and computed in.
    """

    height: int
    width: int
    batch_size: int = 1
    references: int = 0
    dtype: torch.dtype = torch.bfloat16
    vae_dtype: torch.dtype = torch.bfloat16

    @property
    def cells(self) -> int:
        rows, columns = token_grid(self.height, self.width)
        return rows * columns

    @property
    def latent(self) -> tuple[int, int]:
        return self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT


def stages(
    components: Mapping[str, Component], weight_dtype: str, request: Request
) -> tuple[Stage, ...]:
    """The stages of the components, in the order in which they run.

    Args:
        components: "ar", "decoder", "glyph", "vae"; those that a checkpoint has.
        weight_dtype: how the AR's and the decoder's weights are stored, see `weight_dtypes`.
    """
    makers = {"ar": ar_stages, "glyph": glyph_stages, "decoder": decoder_stages, "vae": vae_stages}
    return tuple(
        stage
        for name, make in makers.items()
        if name in components
        for stage in make(components[name], weight_dtype, request)
    )


def ar_stages(component: Component, weight_dtype: str, request: Request) -> list[Stage]:
    """The text model, after its vision tower if there are references to encode."""
    config = ARConfig.from_dict(component.config)
    preview_rows, preview_columns = preview_grid(token_grid(request.height, request.width))
    prompt = PROMPT_IDS + request.references * request.cells
    # Samples of a list have prompts of their own, which are padded to a span of the cache.
    length = span_of(prompt) + preview_rows * preview_columns + request.cells
    layers, rest = _weights(component, VISION_PREFIXES, AR_LAYER, weight_dtype)
    text = Stage(
        "ar",
        layers,
        rest,
        work=memory.ar(config, prompt, request.dtype),
        cache=memory.kv_cache(config, request.batch_size, length, request.dtype),
    )
    if not request.references:
        return [text]
    _, tower = _weights(component, OTHER_PREFIXES, NO_LAYER, weight_dtype)
    work = memory.vision(
        VisionConfig.from_dict(component.config), request.height, request.width, request.dtype
    )
    return [Stage("vision", (), tower, work, follows="ar"), text]


def decoder_stages(component: Component, weight_dtype: str, request: Request) -> list[Stage]:
    config = DecoderConfig.from_dict(component.config)
    references = PATCHES_PER_TOKEN**2 * request.references * request.cells
    layers, rest = _weights(component, (), DECODER_LAYER, weight_dtype)
    work = memory.decoder(config, request.batch_size, request.latent, references, request.dtype)
    cache = memory.reference_cache(config, references, request.dtype)
    return [Stage("decoder", layers, rest, work, cache, streams_cache=True)]


def glyph_stages(component: Component, weight_dtype: str, request: Request) -> list[Stage]:
    """The encoder of a few hundred bytes of text; its activations are too small to count."""
    _, rest = _weights(component, (), NO_LAYER, "default")
    return [Stage("glyph", (), rest, work=0)]


def vae_stages(component: Component, weight_dtype: str, request: Request) -> list[Stage]:
    """The VAE, which decodes one image of the batch at a time, or a tile of it."""
    config = VAEConfig.from_dict(component.config)
    weights = sum(info.shape.numel() for info in component.tensors.values())
    whole, tile = (
        memory.vae_decode(config, latent, request.vae_dtype)
        for latent in (request.latent, (TILE // PIXELS_PER_LATENT, TILE // PIXELS_PER_LATENT))
    )
    rest = weights * request.vae_dtype.itemsize
    return [Stage("vae", (), rest, work=whole, tiled_work=min(whole, tile))]


def _weights(
    component: Component, ignored: tuple[str, ...], layer: re.Pattern, weight_dtype: str
) -> tuple[tuple[int, ...], int]:
    """Bytes of each layer, and of all other weights."""
    layers: dict[int, int] = {}
    rest = 0
    for key in component.tensors:
        if key.startswith(ignored):
            continue
        nbytes = stored_bytes(component, key, weight_dtype)
        match = layer.match(key)
        if match is None:
            rest += nbytes
        else:
            number = int(match[1])
            layers[number] = layers.get(number, 0) + nbytes
    return tuple(layers[number] for number in sorted(layers)), rest
