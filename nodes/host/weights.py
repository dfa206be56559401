"""Weights of a component on disk in a network, in the precision that suits a device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn

from ...glm_core.ar.row_linear import RowLinear, cpu_is_fast_in_bf16
from ...glm_core.errors import WeightsError
from ...glm_core.files.component import Component
from ...glm_core.files.opening import open_component
from ...glm_core.files.quantisation import FP8, layer_of
from ...glm_core.files.weight_dtypes import WEIGHT_DTYPES, is_layer_matrix
from ...glm_core.quant.linear import pack_layers
from ...glm_core.quant.packing import FORMATS, quantise
from ...glm_core.split import LayerSegment
from .paths import find_model
from .quant import HostPackedLinear, fp8_operations, with_formats


class Precision(NamedTuple):
    """The formats of a network's weights and activations.

    Args:
        storage: dtype of weights that are not quantised.
        compute: dtype of activations.
        quantisation: format of quantised layers: of `packing.FORMATS`, or the host's scaled fp8.
        quantised: names of quantised layers.
        device: where the layers compute.
        few_rows: whether most passes are of one token.
    """

    storage: torch.dtype
    compute: torch.dtype
    quantisation: str | None = None
    quantised: frozenset[str] = frozenset()
    device: torch.device | None = None
    few_rows: bool = False

    @property
    def operations(self) -> Any:
        """ComfyUI's layers: plain if weights are used as they are stored, else casting ones."""
        if self.quantisation not in (None, *FORMATS):
            return fp8_operations(self.quantised, self.compute)
        operations = comfy.ops.pick_operations(self.storage, self.compute, load_device=self.device)
        return _row_operations(operations) if self.few_rows else operations

    def under(self, root: str) -> "Precision":
        """The same for a network with `root` before its layers' names."""
        return self._replace(quantised=frozenset(root + name for name in self.quantised))

    def at(self, device: torch.device) -> "Precision":
        """The same for layers on another device."""
        return self._replace(device=device)


def open_model(
    component: str, model_name: str, weight_dtype: str = "default", *, tell: bool = False
) -> Component:
    """See `find_model` for the arguments."""
    return open_component(find_model(component, model_name, weight_dtype, tell=tell), component)


def choose_precision(
    component: Component, weight_dtype: str, device: torch.device, few_rows: bool = False
) -> Precision:
    """The precision for a device: activations in bf16 if it is fast in bf16, else in float32.

    fp16 is never chosen, since it overflows.

    Args:
        few_rows: whether most passes are of one token.

    Raises:
        GLMImageError: the file is quantised, and another format is asked for.
    """
    own = component.quantisation
    if own is not None and weight_dtype not in ("default", own):
        raise WeightsError(
            f"{component.path} holds the {component.title} in {own}, which cannot be turned into "
            f"{weight_dtype}; set weight_dtype to default, or load the snapshot it was made from."
        )
    storage = WEIGHT_DTYPES[weight_dtype]
    if storage is None or own is not None:
        storage = _stored_dtype(component)
    bf16 = storage != torch.float32 and _is_fast_in_bf16(device, few_rows)
    compute = torch.bfloat16 if bf16 else torch.float32
    quantisation = _quantisation(component, weight_dtype)
    return Precision(storage, compute, *quantisation, device, few_rows)


def _stored_dtype(component: Component) -> torch.dtype:
    """fp8 if a layer has it without a scale, since such layers cast; else that of most bytes."""
    tensors, quantised = component.tensors.items(), component.quantised
    plain = {info.dtype for key, info in tensors if layer_of(key) not in quantised}
    return FP8 if FP8 in plain else component.dtype


def _is_fast_in_bf16(device: torch.device, few_rows: bool) -> bool:
    """The host's choice, except on CPUs, where it never chooses bf16."""
    management = comfy.model_management
    if not management.is_device_cpu(device):
        return management.should_use_bf16(device)
    return not management.FORCE_FP32 and cpu_is_fast_in_bf16(few_rows)


def _row_operations(operations: Any) -> Any:
    """A host's layers; its linear ones become `RowLinear` where nothing is to be cast."""

    class Operations(operations):
        class Linear(operations.Linear, RowLinear):
            """The host's `forward` comes first and calls ours if there is nothing to cast."""

    return Operations


def _quantisation(component: Component, weight_dtype: str) -> tuple[str | None, frozenset[str]]:
    """The format and names of layers that are quantised, in the file or on loading."""
    if component.quantisation is not None or weight_dtype not in FORMATS:
        return component.quantisation, component.quantised
    layers = (
        layer_of(key)
        for key, info in component.tensors.items()
        if is_layer_matrix(key, len(info.shape))
    )
    return weight_dtype, frozenset(layers)


def check_keys(
    component: Component, network: type[nn.Module], config: Any, ignored: tuple[str, ...] = ()
) -> None:
    """Compare the file's keys and shapes with the network's before any weight is read.

    The network is built of torch's layers, since some hosts' layers have no weights until loaded.

    Raises:
        GLMImageError: a key is missing or unexpected, or has another shape.
    """
    with torch.device("meta"):
        expected = network(config).state_dict()
    component.check({key: value.shape for key, value in expected.items()}, ignored)


def load_weights(
    network: nn.Module,
    component: Component,
    weight_dtype: str = "default",
    ignored: tuple[str, ...] = (),
    segments: Sequence[LayerSegment] = (),
    root: str = "",
) -> nn.Module:
    """Give a network on the meta device its weights, as views of the mapped file.

    Weights are quantised matrix by matrix, so that no second copy of the model is in memory.

    Args:
        segments: the network's segments, which are given their weights too.
        root: what precedes the checkpoint's keys in those of the segments.
    """
    state = component.state_dict(ignored)
    quantisation, quantised = _quantisation(component, weight_dtype)
    layers = [layer for layer in quantised if f"{layer}.weight" in state]
    if component.quantisation is None:
        keys = {f"{layer}.weight" for layer in layers}
        state = {
            key: quantise(value, quantisation) if key in keys else _cast(key, value, weight_dtype)
            for key, value in state.items()
        }
    elif quantisation not in FORMATS:
        state = with_formats(state, layers)
    # The decoder's passes are of thousands of tokens, most of the AR's of one.
    packing = (quantisation, component.name == "ar") if quantisation in FORMATS else None
    for segment in segments:
        keys = [key for key in state if segment.holds(root + key)]
        names = [layer for layer in layers if segment.holds(f"{root}{layer}.")]
        layers = [layer for layer in layers if layer not in names]
        weights = {root + key: state.pop(key) for key in keys}
        _load_state(segment, weights, [root + name for name in names], packing)
    return _load_state(network, state, layers, packing)


def _load_state(
    network: nn.Module,
    state: dict[str, Tensor],
    layers: list[str],
    packing: tuple[str, bool] | None,
) -> nn.Module:
    """
    Args:
        layers: names of those in `packing`'s format.
        packing: the format, and whether most passes are of one token; None packs nothing.
    """
    if packing is not None:
        biased = {layer: f"{layer}.bias" in state for layer in layers}
        pack_layers(network, biased, *packing, HostPackedLinear)
    network.load_state_dict(state, assign=True)
    remember_dtypes(network)
    return network.eval().requires_grad_(False)


def remember_dtypes(network: nn.Module) -> None:
    """Record the weights' dtypes, to which hosts since 0.4 cast."""
    remember = getattr(comfy.model_management, "archive_model_dtypes", None)
    if remember is not None:
        remember(network)


def _cast(key: str, value: Tensor, weight_dtype: str) -> Tensor:
    """A weight in the dtype of that name. fp8 is for the layers' matrices only: embeddings, heads,
    projectors, norms and modulations need more precision."""
    dtype = WEIGHT_DTYPES[weight_dtype]
    too_narrow = dtype == torch.float8_e4m3fn and not is_layer_matrix(key, value.ndim)
    return value if dtype is None or too_narrow else value.to(dtype)
