"""Pairs of our network and the reference's with the same random weights."""

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
    our_config = ARConfig.from_dict(reference.config.to_dict())
    return _ours(lambda: ARModel(our_config), reference, VISION_PREFIXES), reference


def decoder_pair(config: dict[str, Any], device: torch.device, dtype: torch.dtype):
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    reference = _random(lambda: GlmImageTransformer2DModel(**fields), device, dtype)
    return _ours(lambda: Decoder(DecoderConfig.from_dict(config)), reference), reference


def glyph_pair(config: dict[str, Any], device: torch.device):
    reference = _random(lambda: T5EncoderModel(T5Config(**config)), device, torch.float32)
    # no_init_weights leaves the two untied
    reference.encoder.embed_tokens.weight = reference.shared.weight
    our_config = GlyphConfig.from_dict(config)
    ours = _ours(lambda: GlyphEncoder(our_config), reference, ("encoder.embed_tokens.",))
    return ours, reference


def vae_pair(config: dict[str, Any], device: torch.device, dtype: torch.dtype):
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    reference = _random(lambda: ReferenceVAE(**fields), device, dtype)
    return _ours(lambda: AutoencoderKL(VAEConfig.from_dict(config)), reference), reference


def _random(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network with weights of about 1 / sqrt(fan in), made on the device without slow init."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            module = build()
    finally:
        torch.set_default_dtype(default)
    if any(parameter.dtype != dtype for parameter in module.parameters()):
        module.to(dtype)  # a config may name another dtype
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
    state = reference.state_dict()
    weights = {key: value for key, value in state.items() if not key.startswith(left_out)}
    network.load_state_dict(weights, assign=True)
    return network.eval()
