"""The hub's checkpoint without its weights: headers made from the reference classes' shapes."""

import json
from functools import lru_cache
from pathlib import Path

import torch
from glm_image.glm_core.files.component import Component
from glm_image.glm_core.files.headers import TensorInfo
from reference import (
    AutoencoderKL,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageTransformer2DModel,
    T5Config,
    T5EncoderModel,
)

HUB = Path(__file__).parents[1] / "configs" / "hub"
FILES = {
    "ar": "vision_language_encoder_config.json",
    "decoder": "transformer_config.json",
    "glyph": "text_encoder_config.json",
    "vae": "vae_config.json",
}
CLASSES = {
    "ar": lambda config: GlmImageForConditionalGeneration(GlmImageConfig.from_dict(config)),
    "decoder": GlmImageTransformer2DModel.from_config,
    "glyph": lambda config: T5EncoderModel(T5Config.from_dict(config)),
    "vae": AutoencoderKL.from_config,
}
DTYPES = {"glyph": torch.float32}  # the others are bf16


def hub_config(name: str) -> dict:
    return json.loads((HUB / FILES[name]).read_text())


@lru_cache
def component(name: str) -> Component:
    """A component as `open_component` would read it from the hub's snapshot."""
    config = hub_config(name)
    with torch.device("meta"):
        state = CLASSES[name](dict(config)).state_dict()
    dtype = DTYPES.get(name, torch.bfloat16)
    tensors = {
        key: TensorInfo(HUB, key, value.shape, dtype, 0, value.numel() * dtype.itemsize)
        for key, value in state.items()
        if key != "encoder.embed_tokens.weight"  # T5's alias of shared.weight
    }
    return Component(name, HUB, config, tensors)


def components() -> dict[str, Component]:
    return {name: component(name) for name in FILES}
