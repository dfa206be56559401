"""Our networks and the reference's, on the same random weights."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL as ReferenceVAE
from diffusers import GlmImageTransformer2DModel
from torch import nn
from transformers import GlmImageConfig, GlmImageForConditionalGeneration, T5Config, T5EncoderModel
from transformers.initialization import no_init_weights

from glm_core.ar.model import ARConfig, ARModel
from glm_core.decoder.model import Decoder, DecoderConfig
from glm_core.glyph.encoder import GlyphConfig, GlyphEncoder
from glm_core.vae import AutoencoderKL, VAEConfig
from glm_core.vision.encoder import VISION_PREFIXES


def ar_pair(config: dict[str, Any], device: torch.device, dtype: torch.dtype):
    reference = _random(
        lambda: GlmImageForConditionalGeneration(GlmImageConfig(**config)), device, dtype
    )
    read = ARConfig.from_dict(reference.config.to_dict())
    return _ours(lambda: ARModel(read), reference, VISION_PREFIXES), reference


def decoder_pair(config: dict[str, Any], device: torch.device, dtype: torch.dtype):
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    reference = _random(lambda: GlmImageTransformer2DModel(**fields), device, dtype)
    return _ours(lambda: Decoder(DecoderConfig.from_dict(config)), reference), reference


def glyph_pair(config: dict[str, Any], device: torch.device):
    reference = _random(lambda: T5EncoderModel(T5Config(**config)), device, torch.float32)
    reference.encoder.embed_tokens.weight = (
        reference.shared.weight
    )  # left untied by no_init_weights
    read = GlyphConfig.from_dict(config)
    return _ours(lambda: GlyphEncoder(read), reference, ("encoder.embed_tokens.",)), reference


def vae_pair(config: dict[str, Any], device: torch.device, dtype: torch.dtype):
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    reference = _random(lambda: ReferenceVAE(**fields), device, dtype)
    return _ours(lambda: AutoencoderKL(VAEConfig.from_dict(config)), reference), reference


def _random(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Weights about 1 / sqrt(fan in), made where they are to lie, not by the library's init."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            module = build()
    finally:
        torch.set_default_dtype(default)
    if any(parameter.dtype != dtype for parameter in module.parameters()):
        module.to(dtype)  # a config may name another
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.uniform_(-1, 1).mul_((3 / parameter[0].numel()) ** 0.5)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return module.eval().requires_grad_(False)


def _ours(
    build: Callable[[], nn.Module], reference: nn.Module, left_out: tuple[str, ...] = ()
) -> nn.Module:
    with torch.device("meta"):
        network = build()
    weights = reference.state_dict()
    kept = {key: value for key, value in weights.items() if not key.startswith(left_out)}
    network.load_state_dict(kept, assign=True)
    return network.eval()
