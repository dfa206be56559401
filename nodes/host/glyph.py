"""The glyph encoder as a native CLIP: tokenize a prompt, encode the texts found in it."""

import logging
from typing import Any, ClassVar

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn

from ...glm_core.errors import ModelError
from ...glm_core.files.saved import CONFIG, config_tensor
from ...glm_core.glyph.advice import advice
from ...glm_core.glyph.encoder import GlyphConfig, GlyphEncoder
from ...glm_core.glyph.texts import encode_texts, glyph_ids, texts_that_fit, texts_to_render
from ...glm_core.split import on_device
from .devices import Placement
from .out_of_memory import explain_out_of_memory
from .weights import Precision, check_keys, choose_precision, load_weights, open_model

log = logging.getLogger(__name__)

TOKENS = "glm_glyph"
EMPTY = "glm_glyph_empty"
"""Conditioning key of the empty text's encoding, the default negative."""


class GlyphTokenizer:
    """A tokenizer in ComfyUI's protocol. Its "tokens" are the texts to render, as strings."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None) -> None:
        """ComfyUI gives every tokenizer these arguments; a byte tokenizer needs no files.

        Args:
            tokenizer_data: what `state_dict` gives.
        """
        self.data = dict(tokenizer_data or {})

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, texts: list[str] | None = None, **_: Any
    ) -> dict[str, list[str]]:
        """The texts to render: `texts` where given, else those in quotes in `text`."""
        found = texts_to_render(text) if texts is None else texts
        for sentence in advice(text, texts):
            log.warning("%s", sentence)
        return {TOKENS: texts_that_fit(found)}

    def state_dict(self) -> dict[str, Tensor]:
        """What save nodes write beside the encoder's weights."""
        return self.data


class GlyphModel(nn.Module):
    """The encoder in ComfyUI's protocol for the model of a CLIP."""

    def __init__(self, network: GlyphEncoder, compute: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.transformer = network
        self.dtypes = {compute}
        self.compute = compute
        self.load_device = device
        self.reset_clip_options()

    def reset_clip_options(self) -> None:
        self.execution_device = self.load_device

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Current hosts pass the device of the patcher in use; 0.3.75 has only one device."""
        self.execution_device = options.get("execution_device", self.execution_device)

    def encode_token_weights(self, tokens: dict[str, list[str]]) -> tuple[Tensor, None, dict]:
        """States [1, L, d_model], no pooled output, and under EMPTY the states [1, 1, d_model]."""
        if TOKENS not in tokens:
            raise ModelError(
                "These tokens were not made by GLM-Image's glyph encoder; "
                "tokenize and encode with the same CLIP."
            )
        # Attention scores dominate: heads * L^2 of the longest text, in float32, and their softmax.
        longest = max(map(len, glyph_ids(tokens[TOKENS])))
        needed = 8 * self.transformer.config.num_heads * longest**2
        device = self.execution_device
        with (
            on_device(device),
            explain_out_of_memory("The glyph encoder", {device: needed}, "use shorter texts"),
        ):
            states, empty = (self._encode(texts) for texts in (tokens[TOKENS], []))
        return states, None, {EMPTY: empty}

    def _encode(self, texts: list[str]) -> Tensor:
        states = encode_texts(self._encode_ids, texts, self.execution_device)
        return states.float().to(comfy.model_management.intermediate_device())

    def _encode_ids(self, ids: Tensor) -> Tensor:
        return self.transformer.encoder(self.transformer.shared(ids).to(self.compute))

    def load_sd(self, sd: dict[str, Tensor]) -> Any:
        return self.transformer.load_state_dict(sd, strict=False)


def load_glyph_encoder(model_name: str, placement: Placement | None = None) -> comfy.sd.CLIP:
    """The glyph encoder as a CLIP.

    Args:
        placement: devices of a device plan; None leaves them to ComfyUI.

    Raises:
        GLMImageError: the component is missing or broken.
    """
    return _load_clip(model_name, placement)


def load_glyph_patcher(
    model_name: str, placement: Placement | None = None, disable_dynamic: bool = False
):
    """The CLIP's patcher. Current hosts call this to rebuild it on another device."""
    return _load_clip(model_name, placement, disable_dynamic).patcher


def _load_clip(
    model_name: str, placement: Placement | None, disable_dynamic: bool = False
) -> comfy.sd.CLIP:
    component = open_model("glyph", model_name, tell=True)
    config = GlyphConfig.from_dict(component.config)
    check_keys(component, GlyphEncoder, config)

    devices = (
        {"load_device": placement.load, "offload_device": placement.offload} if placement else {}
    )
    device = devices.get("load_device", comfy.model_management.text_encoder_device())
    precision = choose_precision(component, "default", device)

    def build(**_: Any) -> GlyphModel:
        return GlyphModel(_load_network(component, config, precision), precision.compute, device)

    target = _Target(build)
    # Only hosts with dynamic patchers take this argument; 0.3.75 does not.
    dynamic = hasattr(comfy.model_patcher, "CoreModelPatcher")
    clip = comfy.sd.CLIP(
        target,
        parameters=sum(info.shape.numel() for info in component.tensors.values()),
        tokenizer_data={CONFIG: config_tensor(component)},
        model_options={"dtype": precision.storage, **devices},
        **({"disable_dynamic": disable_dynamic} if dynamic else {}),
    )
    clip.patcher.cached_patcher_init = (load_glyph_patcher, (model_name, placement))
    return clip


def _load_network(component, config: GlyphConfig, precision: Precision) -> GlyphEncoder:
    network = GlyphEncoder(
        config, device="meta", dtype=precision.storage, operations=precision.operations
    )
    return load_weights(network, component)


class _Target:
    """The argument that `comfy.sd.CLIP` builds itself from."""

    tokenizer = GlyphTokenizer
    params: ClassVar[dict[str, Any]] = {}

    def __init__(self, clip: Any) -> None:
        self.clip = clip


def is_glyph_encoder(clip: Any) -> bool:
    return isinstance(getattr(clip, "cond_stage_model", None), GlyphModel)
