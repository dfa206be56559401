"""From a component on disk to a network in a ModelPatcher, each weight held once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn

from ...glm_core.ar.row_linear import RowLinear, cpu_has
from ...glm_core.errors import GLMImageError
from ...glm_core.files.component import Component
from ...glm_core.files.opening import open_component
from ...glm_core.files.quantisation import layer_of
from ...glm_core.files.weight_dtypes import WEIGHT_DTYPES, is_layer_matrix
from ...glm_core.quant.linear import pack_layers
from ...glm_core.quant.packing import FORMATS, quantise
from ...glm_core.split import LayerSegment
from .paths import find_model
from .quant import HostPackedLinear, fp8_operations, with_formats

BF16_PRODUCTS = ("amx_bf16", "avx512_bf16")
"""Instructions that multiply matrices in bf16; CPUs without any convert every number."""


class Precision(NamedTuple):
    """How weights are kept, and in what they are computed with.

    Args:
        storage: the dtype of weights that are not quantised.
        compute: what activations have.
        quantisation: the format of quantised layers: of `quant.FORMATS`, or the host's scaled fp8.
        quantised: their names.
        device: where they are used.
        few_rows: whether the passes are mostly of one token.
    """

    storage: torch.dtype
    compute: torch.dtype
    quantisation: str | None = None
    quantised: frozenset[str] = frozenset()
    device: torch.device | None = None
    few_rows: bool = False

    @property
    def operations(self) -> Any:
        """ComfyUI's layers: plain where weights are used as they lie, casting otherwise."""
        if self.quantisation not in (None, *FORMATS):
            return fp8_operations(self.quantised, self.storage, self.compute, self.device)
        operations = comfy.ops.pick_operations(self.storage, self.compute, load_device=self.device)
        return _row_operations(operations) if self.few_rows else operations

    def under(self, root: str) -> "Precision":
        """For a network with `root` before its layers' names."""
        return self._replace(quantised=frozenset(root + name for name in self.quantised))

    def at(self, device: torch.device) -> "Precision":
        """For layers that are used elsewhere, where products in fp8 may be possible or not."""
        return self._replace(device=device)


def open_model(component: str, model_name: str) -> Component:
    return open_component(find_model(component, model_name), component)


def precision(
    component: Component, weight_dtype: str, device: torch.device, few_rows: bool = False
) -> Precision:
    """bf16 where the device is fast in it, else float32; never fp16, which overflows.

    Args:
        few_rows: whether the passes are mostly of one token.

    Raises:
        GLMImageError: the file is quantised, and another format is asked for.
    """
    own = component.quantisation
    if own is not None and weight_dtype not in ("default", own):
        raise GLMImageError(
            f"{component.path} holds the {component.title} in {own}, which cannot be turned into "
            f"{weight_dtype}; set weight_dtype to default, or load the snapshot it was made from."
        )
    storage = WEIGHT_DTYPES[weight_dtype]
    if storage is None or own is not None:
        storage = component.dtype
    bf16 = storage != torch.float32 and _is_fast_in_bf16(device, few_rows)
    compute = torch.bfloat16 if bf16 else torch.float32
    quantisation = _quantisation(component, weight_dtype)
    return Precision(storage, compute, *quantisation, device, few_rows)


def _is_fast_in_bf16(device: torch.device, few_rows: bool) -> bool:
    """The host's choice, but for CPUs, of which it rules out all. Of one row every CPU only has to
    read the weights, half as many bytes; for products of matrices it takes instructions."""
    management = comfy.model_management
    if not management.is_device_cpu(device):
        return management.should_use_bf16(device)
    return not management.FORCE_FP32 and (few_rows or cpu_has(*BF16_PRODUCTS))


def _row_operations(operations: Any) -> Any:
    """A host's layers, whose linear ones are `RowLinear` where the host runs them as plain ones."""

    class Operations(operations):
        class Linear(operations.Linear, RowLinear):
            """The host's `forward` comes first, and ends in ours where nothing is to be cast."""

    return Operations


def _quantisation(component: Component, weight_dtype: str) -> tuple[str | None, frozenset[str]]:
    """The format of the layers that are quantised, in the file or on loading, and their names."""
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
    segments: Sequence[LayerSegment] = (),
    root: str = "",
) -> nn.Module:
    """Give a network made on the meta device its weights, as views of the mapped file.

    What is quantised here is so matrix by matrix: no second copy of the model is ever held.

    Args:
        segments: its layers that lie apart, which are given theirs.
        root: what stands before the checkpoint's keys in those of the segments.
    """
    state = component.state_dict(ignored)
    quantisation, named = _quantisation(component, weight_dtype)
    layers = [layer for layer in named if f"{layer}.weight" in state]
    if component.quantisation is None:
        keys = {f"{layer}.weight" for layer in layers}
        state = {
            key: quantise(value, quantisation) if key in keys else _cast(key, value, weight_dtype)
            for key, value in state.items()
        }
    elif quantisation not in FORMATS:
        state = with_formats(state, layers)
    # The decoder's passes are of thousands of tokens, the AR's mostly of one.
    packing = (quantisation, component.name == "ar") if quantisation in FORMATS else None
    for part in segments:
        theirs = [key for key in state if part.holds(root + key)]
        packed = [root + layer for layer in layers if part.holds(f"{root}{layer}.")]
        _give(part, {root + key: state.pop(key) for key in theirs}, packed, packing)
    own = [layer for layer in layers if not any(part.holds(f"{root}{layer}.") for part in segments)]
    return _give(network, state, own, packing)


def _give(
    network: nn.Module,
    state: dict[str, Tensor],
    layers: list[str],
    packing: tuple[str, bool] | None,
) -> nn.Module:
    """layers, packing: those that are packed, and how; see `pack_layers`."""
    if packing is not None:
        biased = {layer: f"{layer}.bias" in state for layer in layers}
        pack_layers(network, biased, *packing, HostPackedLinear)
    network.load_state_dict(state, assign=True)
    remember_dtypes(network)
    return network.eval().requires_grad_(False)


def remember_dtypes(network: nn.Module) -> None:
    """Hosts since 0.4 cast to the dtypes that they saw last when they were told to look."""
    remember = getattr(comfy.model_management, "archive_model_dtypes", None)
    if remember is not None:
        remember(network)


def _cast(key: str, value: Tensor, weight_dtype: str) -> Tensor:
    """fp8 is for the layers' own matrices: embeddings, heads, projectors and what modulates or
    normalises do not bear it."""
    dtype = WEIGHT_DTYPES[weight_dtype]
    kept = dtype == torch.float8_e4m3fn and not is_layer_matrix(key, value.ndim)
    return value if dtype is None or kept else value.to(dtype)
