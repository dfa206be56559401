"""Quantised layers under ComfyUI's patcher: ours of packed bytes, and the host's scaled fp8."""

import json
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...glm_core.files.quantisation import QUANTISATION
from ...glm_core.quant.linear import PackedLinear

# ---- packed int8 and int4 ----------------------------------------------------------------------


class HostPackedLinear(PackedLinear, comfy.ops.CastWeightBiasOp):
    """A packed layer that the patcher may leave on another device, and add LoRAs to.

    `convert_weight` and `set_weight` are the host's way to a weight that it can add to, and back:
    dequantised, patched, and quantised anew with scales that fit.
    """

    def forward(self, x: Tensor) -> Tensor:
        comfy.ops.run_every_op()
        if self.comfy_cast_weights or self.weight_function or self.bias_function:
            return self._streamed(x)
        return super().forward(x)

    def _streamed(self, x: Tensor) -> Tensor:
        """With the weight fetched by the host for this pass, and patched where it has functions.

        It is fetched without them: they want a weight, and what is fetched are packed bytes.
        """
        functions, self.weight_function = self.weight_function, []
        try:
            weight, bias, stream = comfy.ops.cast_bias_weight(
                self, dtype=torch.uint8, device=x.device, bias_dtype=x.dtype, offloadable=True
            )
        finally:
            self.weight_function = functions
        if functions:
            patched = self.dequantised(weight, torch.float32)
            for function in functions:
                patched = self.convert_weight(function(patched))
            out = F.linear(x, patched.to(x.dtype), bias)
        else:
            out = self.multiply(x, weight, bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return out

    def convert_weight(self, weight: Tensor, inplace: bool = False) -> Tensor:
        """The matrix of a weight whose bytes the host has cast to floats, or that is one already.

        `inplace` allows the host's own layers to reuse the bytes' memory; ours are too few.
        """
        if weight.shape == (self.out_features, self.in_features):
            return weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        return self.dequantised(weight.to(torch.uint8), dtype)

    def set_weight(
        self,
        weight: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
    ) -> Tensor | None:
        """Take a patched matrix, or give it back packed.

        It is rounded to nearest: the host's seed is for rounding at random, which fp8 needs.
        """
        packed = self.requantised(weight)
        if return_weight:
            return packed
        if inplace_update:
            self.weight.data.copy_(packed)
        else:
            self.weight = nn.Parameter(packed, requires_grad=False)
        return None


def is_packed(network: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear) for module in network.modules())


# ---- fp8 with scales ---------------------------------------------------------------------------


def fp8_operations(
    layers: Iterable[str], storage: torch.dtype, compute: torch.dtype, device: torch.device
) -> Any:
    """The host's layers that keep fp8 numbers with their scale, and multiply in fp8 where the
    device can and the host does."""
    formats = _formats(layers)
    config = SimpleNamespace(layer_quant_config=formats, quant_config=formats)  # 0.3.75, later
    mixed = comfy.ops.pick_operations(storage, compute, load_device=device, model_config=config)

    class Operations(mixed):
        class Linear(mixed.Linear):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.factory_kwargs["device"] = None  # built on meta, but loaded where weights lie

            def _load_from_state_dict(
                self, state: dict[str, Tensor], prefix: str, *args: Any
            ) -> None:
                weight = state[f"{prefix}weight"]
                super()._load_from_state_dict(state, prefix, *args)
                if prefix.rstrip(".") not in formats and weight.dtype != self.weight.dtype:
                    # The host copied it into what it computes in; as the file has it, it is cast
                    # on use, and takes what was planned.
                    self.weight = nn.Parameter(weight, requires_grad=False)
                    self.comfy_cast_weights = True

    return Operations


def with_formats(state: dict[str, Tensor], layers: Iterable[str]) -> dict[str, Tensor]:
    """State of fp8 layers as this host's `load_state_dict` takes it.

    0.3.75 looks the formats up by name; later ones want each beside its weight.
    """
    convert = getattr(comfy.utils, "convert_old_quants", None)
    if convert is None:
        return state
    return convert(state, metadata={QUANTISATION: json.dumps({"layers": _formats(layers)})})[0]


def _formats(layers: Iterable[str]) -> dict[str, dict[str, str]]:
    return {layer: {"format": "float8_e4m3fn"} for layer in layers}
