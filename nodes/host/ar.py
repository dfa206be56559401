"""The AR model on a graph: its network in a patcher, and the tokenizer of its checkpoint."""

from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...glm_core.ar_model import VISION_PREFIXES, ARConfig, ARModel
from ...glm_core.ar_sampler import SamplingOptions, sample_tokens
from ...glm_core.grids import preview_grid, token_grid
from ...glm_core.prompt import PromptTokenizer
from ...glm_core.tokens import Layout, SemanticTokens
from .progress import check_interrupt, progress_bar
from .vision import HostVision
from .weights import check_keys, load_weights, make_patcher, open_model, precision


class HostAR:
    """GLM_AR. Like a CLIP, it owns a patcher, and LoRAs go onto a clone of it."""

    def __init__(
        self, patcher: Any, tokenizer: PromptTokenizer, dtype: torch.dtype, vision: HostVision
    ) -> None:
        self.patcher = patcher
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.vision = vision

    def with_patcher(self, patcher: Any) -> "HostAR":
        """The same model under another patcher, such as a clone that carries a LoRA."""
        return HostAR(patcher, self.tokenizer, self.dtype, self.vision)

    @property
    def config(self) -> ARConfig:
        return self.patcher.model.config

    def sample(
        self,
        prompt: str,
        height: int,
        width: int,
        seed: int,
        batch_size: int,
        options: SamplingOptions,
    ) -> tuple[SemanticTokens, Layout]:
        """The preview, then the large grid, of `batch_size` images.

        Raises:
            GLMImageError: the prompt is empty or the size has no grid.
        """
        grid = token_grid(height, width)
        prompt_ids = self.tokenizer.text_to_image(prompt, grid)
        preview = preview_grid(grid)
        cells = grid[0] * grid[1] + preview[0] * preview[1]
        self._load(batch_size, len(prompt_ids) + cells)
        tokens, preview_tokens = sample_tokens(
            self.patcher.model,
            prompt_ids,
            grid,
            seed,
            batch_size,
            options,
            device=self.patcher.load_device,
            dtype=self.dtype,
            progress=progress_bar(cells),
            check_interrupt=check_interrupt,
        )
        info = {"prompt": prompt, "seed": seed, **vars(options)}
        size = {"codebook": self.config.codebook, "height": height, "width": width}
        return (
            SemanticTokens(_stored(tokens), info=info, **size),
            Layout(_stored(preview_tokens), torch.zeros(preview, dtype=torch.bool), **size),
        )

    def _load(self, batch: int, length: int) -> None:
        comfy.model_management.load_models_gpu(
            [self.patcher], memory_required=self.memory_required(batch, length)
        )

    def memory_required(self, batch: int, length: int) -> int:
        """Bytes beside the weights: the KV cache, and a prefill's widest activations."""
        config = self.config
        cache = 2 * config.layers * config.kv_heads * config.head_dim * batch * length
        activations = 4 * (config.hidden_size + config.intermediate_size) * length
        return (cache + activations) * comfy.model_management.dtype_size(self.dtype)


def _stored(tokens: Tensor) -> Tensor:
    return tokens.to("cpu", torch.int32)


def load_ar(model_name: str, weight_dtype: str = "default") -> HostAR:
    """
    Raises:
        GLMImageError: the component is missing or broken.
    """
    component = open_model("ar", model_name)
    processor = component.processor
    tokenizer = PromptTokenizer(
        processor.tokenizer, processor.tokenizer_config, processor.chat_template
    )
    patcher = load_ar_patcher(model_name, weight_dtype)
    dtype = precision(component, weight_dtype, patcher.load_device).compute
    vision = HostVision(component, model_name, weight_dtype)
    return HostAR(patcher, tokenizer, dtype, vision)


def load_ar_patcher(model_name: str, weight_dtype: str = "default", disable_dynamic: bool = False):
    """The AR's patcher; the factory that current hosts rebuild it with on another device."""
    component = open_model("ar", model_name)
    config = ARConfig.from_dict(component.config)
    check_keys(component, ARModel, config, VISION_PREFIXES)

    device = comfy.model_management.text_encoder_device()
    kept = precision(component, weight_dtype, device)
    network = ARModel(config, device="meta", dtype=kept.storage, operations=kept.operations)
    load_weights(network, component, weight_dtype, VISION_PREFIXES)

    offload = comfy.model_management.text_encoder_offload_device()
    patcher = make_patcher(network, device, offload, disable_dynamic)
    patcher.cached_patcher_init = (load_ar_patcher, (model_name, weight_dtype))
    return patcher
