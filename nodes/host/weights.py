"""From a component on disk to a network in a ModelPatcher, each weight held once."""

import re
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

from ...glm_core.checkpoint import Component, open_component
from .paths import find_model

WEIGHT_DTYPES: dict[str, torch.dtype | None] = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}

LAYER_MATRIX = re.compile(r"(?:layers|blocks)\.\d+\.(?!norm)")


class Precision(NamedTuple):
    """How weights are kept, and in what they are computed with."""

    storage: torch.dtype
    compute: torch.dtype

    @property
    def operations(self) -> Any:
        """ComfyUI's layers: plain where weights are used as they lie, casting otherwise."""
        return comfy.ops.pick_operations(self.storage, self.compute)


def open_model(component: str, model_name: str) -> Component:
    return open_component(find_model(component, model_name), component)


def precision(component: Component, weight_dtype: str, device: torch.device) -> Precision:
    """bf16 where the device computes in it, else float32; never fp16, which overflows."""
    storage = WEIGHT_DTYPES[weight_dtype] or component.dtype
    if storage == torch.float32:
        return Precision(storage, torch.float32)
    bf16 = comfy.model_management.should_use_bf16(device)
    return Precision(storage, torch.bfloat16 if bf16 else torch.float32)


def check_keys(
    component: Component, network: type[nn.Module], config: Any, ignored: tuple[str, ...] = ()
) -> None:
    """Compare the file's keys and shapes with the network's before a weight is read.

    The network is built from plain layers: some hosts' own create their weights only on loading.
    """
    with torch.device("meta"):
        expected = network(config).state_dict()
    component.check({key: value.shape for key, value in expected.items()}, ignored)


def load_weights(
    network: nn.Module,
    component: Component,
    weight_dtype: str = "default",
    ignored: tuple[str, ...] = (),
) -> nn.Module:
    """Give a network made on the meta device its weights, as views of the mapped file."""
    target = WEIGHT_DTYPES[weight_dtype]
    state = component.state_dict(ignored)
    if target is not None:
        state = {key: _cast(key, value, target) for key, value in state.items()}
    network.load_state_dict(state, assign=True)
    remember = getattr(comfy.model_management, "archive_model_dtypes", None)
    if remember is not None:  # hosts since 0.4 cast to the dtypes that they saw at first
        remember(network)
    return network.eval().requires_grad_(False)


def _cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """fp8 is for the layers' own matrices: embeddings, heads, projectors and what modulates or
    normalises do not bear it."""
    if dtype == torch.float8_e4m3fn and (value.ndim < 2 or not LAYER_MATRIX.search(key)):
        return value
    return value.to(dtype)


def make_patcher(
    model: nn.Module,
    load_device: torch.device,
    offload_device: torch.device,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """ComfyUI's patcher; its dynamic one (hosts since 0.4) where that is on and allowed."""
    plain = comfy.model_patcher.ModelPatcher
    kind = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    return kind(model, load_device=load_device, offload_device=offload_device)
