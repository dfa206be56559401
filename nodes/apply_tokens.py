"""Joins semantic tokens to the glyph conditioning."""

from dataclasses import replace

import comfy.model_management
import torch
from comfy_api.latest import io

from ..glm_core.data.tokens import SemanticTokens
from ..glm_core.errors import BatchError
from ..glm_core.placement import memory
from .host import conditioning as cond
from .host.batches import ORIGIN
from .host.out_of_memory import require_room
from .host.reference_cache import HostReferenceCache
from .node import Node
from .types import CATEGORY, ReferenceCache, Tokens

LATENT_CHANNELS = 16
"""Channels of an empty LATENT; ComfyUI's samplers change them to those that their MODEL takes."""


class ApplyTokens(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageApplyTokens",
            display_name="GLM-Image Apply Tokens",
            category=CATEGORY,
            description="Adds semantic tokens to the conditioning and makes an empty latent of "
            "their size. The negative gets the same grid with every token dropped, as in training. "
            "A sampler pairs latents with tokens by batch_index, or in order where it makes other "
            "noise than ComfyUI's. A tile of a larger picture needs tokens of its own.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="From GLM-Image Glyph Encode."),
                Tokens.Input(
                    "tokens", tooltip="From GLM-Image Sample Tokens, Load Tokens or Encode Tokens."
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Glyph conditioning for the unconditional pass. Unconnected: the empty "
                    "text, which the model was trained with.",
                ),
                ReferenceCache.Input(
                    "reference_cache",
                    optional=True,
                    tooltip="From GLM-Image Reference Cache. The positive pass attends to it.",
                ),
                io.Int.Input(
                    "batch_index",
                    default=-1,
                    min=-1,
                    max=4095,
                    tooltip="Which image of the batch to take, counted from 0; it gets the same "
                    "noise as in the whole batch. -1 takes all.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent"),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive: cond.Conditioning,
        tokens: SemanticTokens,
        batch_index: int,
        negative: cond.Conditioning | None = None,
        reference_cache: HostReferenceCache | None = None,
    ) -> io.NodeOutput:
        cond.require_glyphs("positive", positive)
        if negative is None:
            negative = cond.empty_text(positive)
        else:
            cond.require_glyphs("negative", negative)
        if reference_cache is not None:
            reference_cache.require_fits(tokens)
        chosen = _choose(len(tokens.tokens), batch_index)
        numbers = tuple(tokens.image_numbers[i] for i in chosen)
        own = tokens.tokens[chosen]
        tokens = replace(tokens, tokens=own, numbers=numbers, origin=tokens.root)
        return io.NodeOutput(
            cond.with_tokens(positive, tokens, reference_cache),
            cond.without_prior(negative, tokens),
            _empty_latent(tokens),
        )


def _choose(batch: int, index: int) -> list[int]:
    if index >= batch:
        found = "one image; use 0" if batch == 1 else f"{batch} images; use 0 to {batch - 1}"
        raise BatchError(f"batch_index is {index} and the tokens hold {found}, or -1 for all.")
    return list(range(batch)) if index < 0 else [index]


def _empty_latent(tokens: SemanticTokens) -> dict:
    batch, *grid = tokens.tokens.shape
    rows, cols = (side * cond.LATENTS_PER_TOKEN for side in grid)
    device = comfy.model_management.intermediate_device()
    needed = memory.latents(batch, LATENT_CHANNELS, (rows, cols))
    require_room("The latent", {device: needed}, "apply the tokens one by one, with batch_index")
    samples = torch.zeros((batch, LATENT_CHANNELS, rows, cols), device=device)
    return {"samples": samples, "batch_index": list(tokens.image_numbers), ORIGIN: tokens.root}
