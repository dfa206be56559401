"""Quantised layers under ComfyUI's patcher: ours of packed bytes, and the host's scaled fp8."""

import json
from collections.abc import Iterable
from typing import Any

import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...glm_core.files.quantisation import QUANTISATION, layer_formats
from ...glm_core.quant.linear import PackedLinear

# ---- packed int8 and int4 ----------------------------------------------------------------------


class HostPackedLinear(PackedLinear, comfy.ops.CastWeightBiasOp):
    """A packed layer that the patcher may leave on another device, and add LoRAs to.

    To add a LoRA the host calls `convert_weight`, patches the matrix that it returns, and calls
    `set_weight`, which quantises the matrix with new scales.
    """

    def forward(self, x: Tensor) -> Tensor:
        comfy.ops.run_every_op()
        if self.comfy_cast_weights or self.weight_function or self.bias_function:
            return self._streamed(x)
        return super().forward(x)

    def _streamed(self, x: Tensor) -> Tensor:
        """The forward pass with a weight that the host fetches, and patches if it has functions.

        It is fetched without its functions: they take a matrix, and the fetched bytes are packed.
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
        """The matrix of a weight whose packed bytes the host has cast to floats; a matrix as it is.

        `inplace` allows the host's own layers to reuse the weight's memory; packed bytes are too
        few for a matrix.
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
        """Quantise a patched matrix, and store it as the weight or return it.

        It is rounded to nearest; the host's seed is for stochastic rounding, which fp8 needs.
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

FP8_NAME = "fp8_e4m3fn"


def fp8_operations(layers: Iterable[str], compute: torch.dtype) -> Any:
    """The host's layers for fp8 weights with scales; they multiply in the compute dtype."""
    formats = layer_formats(layers, FP8_NAME)
    mixed = comfy.ops.mixed_precision_ops(formats, compute, full_precision_mm=True)

    class Operations(mixed):
        class Linear(mixed.Linear):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.factory_kwargs["device"] = None  # built on meta, but not loaded to it

            def _load_from_state_dict(
                self, state: dict[str, Tensor], prefix: str, *args: Any
            ) -> None:
                weight = state[f"{prefix}weight"]
                super()._load_from_state_dict(state, prefix, *args)
                if prefix.rstrip(".") not in formats and weight.dtype != self.weight.dtype:
                    # The host converted it to its compute dtype. Stored as in the file, it is cast
                    # on use and takes the bytes that were planned.
                    self.weight = nn.Parameter(weight, requires_grad=False)
                    self.comfy_cast_weights = True

    return Operations


def with_formats(state: dict[str, Tensor], layers: Iterable[str]) -> dict[str, Tensor]:
    """A state dict of fp8 layers as this host's `load_state_dict` takes it.

    0.3.75 looks formats up by layer name; current hosts take each from the state dict.
    """
    convert = getattr(comfy.utils, "convert_old_quants", None)
    if convert is None:
        return state
    return convert(
        state, metadata={QUANTISATION: json.dumps({"layers": layer_formats(layers, FP8_NAME)})}
    )[0]
