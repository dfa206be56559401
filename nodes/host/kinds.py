"""What a link of each type carries, and which nodes it comes from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
from torch import Tensor

from ...glm_core.data.references import References
from ...glm_core.data.tokens import Layout, SemanticTokens
from .ar_interface import AnyAR
from .devices import DevicePlan
from .glyph import is_glyph_encoder
from .reference_cache import HostReferenceCache


@dataclass(frozen=True)
class Kind:
    """A type of input.

    Args:
        fits: whether a value is of the type.
        title: what a value of the type is, for a sentence.
        remedy: what to do about a value that does not fit.
    """

    fits: Callable[[Any], bool]
    title: str
    remedy: str


def _is_vae(value: Any) -> bool:
    """Other packs have VAEs of classes of their own."""
    return hasattr(value, "encode") and hasattr(value, "decode")


def _is_image(value: Any) -> bool:
    """[B, height, width, 3 or 4]; the batch may be empty."""
    return (
        isinstance(value, Tensor)
        and value.ndim == 4
        and 0 not in value.shape[1:]
        and value.shape[-1] in (3, 4)
    )


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 2 and 0 not in value.shape[-2:]


def _is_latent(value: Any) -> bool:
    samples = value.get("samples") if isinstance(value, dict) else None
    return isinstance(samples, Tensor) and samples.ndim >= 4


def _is_conditioning(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], dict)
        for entry in value
    )


def _is(*classes: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, classes)


KINDS = {
    "GLM_AR": Kind(_is(AnyAR), "an AR model", "connect GLM-Image Load AR Model"),
    "GLM_TOKENS": Kind(
        _is(SemanticTokens), "semantic tokens", "connect GLM-Image Sample Tokens or Load Tokens"
    ),
    "GLM_LAYOUT": Kind(
        _is(Layout), "a layout", "connect GLM-Image Sample Layout or another node that has one"
    ),
    "GLM_REFERENCES": Kind(_is(References), "references", "connect GLM-Image Encode Reference"),
    "GLM_REFERENCE_CACHE": Kind(
        _is(HostReferenceCache), "a reference cache", "connect GLM-Image Reference Cache"
    ),
    "GLM_DEVICE_PLAN": Kind(_is(DevicePlan), "a device plan", "connect GLM-Image Device Plan"),
    "MODEL": Kind(
        _is(comfy.model_patcher.ModelPatcher), "a MODEL", "connect GLM-Image Load Decoder"
    ),
    "CLIP": Kind(
        is_glyph_encoder, "GLM-Image's glyph encoder", "connect GLM-Image Load Glyph Encoder"
    ),
    "VAE": Kind(_is_vae, "a VAE", "connect GLM-Image Load VAE"),
    "IMAGE": Kind(
        _is_image, "an RGB or RGBA IMAGE", "connect a node that has one, such as Load Image"
    ),
    "MASK": Kind(_is_mask, "a MASK", "connect a node that has one, such as Load Image"),
    "LATENT": Kind(_is_latent, "a LATENT", "connect the latent of GLM-Image Apply Tokens"),
    "CONDITIONING": Kind(
        _is_conditioning, "a CONDITIONING", "connect GLM-Image Glyph Encode or Apply Tokens"
    ),
}
