"""The AR model's vision tower and quantiser in a patcher of their own, loaded on first use."""

from functools import cached_property
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...glm_core.files.component import Component
from ...glm_core.placement import memory
from ...glm_core.split import on_device
from ...glm_core.vision.encoder import OTHER_PREFIXES, VisionConfig, VisionEncoder
from ...glm_core.vision.pixels import ImageConfig, vision_pixels
from .devices import Placement, default_placement
from .out_of_memory import explain_out_of_memory
from .patchers import make_patcher
from .weights import check_keys, choose_precision, load_weights, open_model


class HostVision:
    """Turns images into semantic tokens. Text to image never loads it."""

    def __init__(
        self, component: Component, model_name: str, weight_dtype: str, placement: Placement | None
    ) -> None:
        """placement: of the AR model's text part, or of its first layers if that is split."""
        self.image_config = ImageConfig.from_dict(component.processor.image)
        self.model_name = model_name
        self.weight_dtype = weight_dtype
        self.placement = placement
        device = (placement or default_placement()).load
        self.dtype = choose_precision(component, weight_dtype, device).compute

    @cached_property
    def patcher(self) -> Any:
        return load_vision_patcher(self.model_name, self.weight_dtype, self.placement)

    @property
    def patchers(self) -> list[Any]:
        """The patcher, once it is loaded."""
        return [self.patcher] if "patcher" in vars(self) else []

    def encode(self, images: Tensor) -> Tensor:
        """Tokens int32 [B, H / 32, W / 32] of images float [B, H, W, 3], 0 to 1."""
        device = self.patcher.load_device
        pixels = vision_pixels(images, self.image_config)
        needed = self.memory_required(pixels.shape)
        with (
            on_device(device),
            explain_out_of_memory(
                "The AR model's vision tower", {device: needed}, "use a smaller image"
            ),
        ):
            comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)
            tokens = [self.patcher.model(image[None].to(device), self.dtype) for image in pixels]
        return torch.cat(tokens).to("cpu", torch.int32)

    def memory_required(self, pixels: torch.Size) -> int:
        """Bytes beside the weights to encode one of the images [B, C, H, W]."""
        return memory.vision(self.patcher.model.config, *pixels[-2:], self.dtype)


def load_vision_patcher(
    model_name: str,
    weight_dtype: str = "default",
    placement: Placement | None = None,
    disable_dynamic: bool = False,
) -> Any:
    """The vision encoder's patcher. Current hosts call this to rebuild it on another device.

    Raises:
        GLMImageError: the component is missing or broken.
    """
    component = open_model("ar", model_name, weight_dtype)
    config = VisionConfig.from_dict(component.config)
    check_keys(component, VisionEncoder, config, OTHER_PREFIXES)

    chosen = placement or default_placement()
    precision = choose_precision(component, weight_dtype, chosen.load)
    network = VisionEncoder(
        config, device="meta", dtype=precision.storage, operations=precision.operations
    )
    load_weights(network, component, weight_dtype, OTHER_PREFIXES)

    patcher = make_patcher(network, chosen, disable_dynamic)
    patcher.cached_patcher_init = (load_vision_patcher, (model_name, weight_dtype, placement))
    return patcher
