"""The weight dtypes that loaders offer, the weights that they apply to, and their bytes."""

import re

import torch

from ..quant.packing import FORMATS, packing
from ..vision.encoder import VISION_PREFIXES
from .component import Component
from .quantisation import FP8

WEIGHT_DTYPES: dict[str, torch.dtype | None] = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8_e4m3fn": FP8,
    "int8": None,
    "int4": None,
}
"""What the loaders offer, and the weights' torch dtype. None: the file's own, or packed."""

LAYER_MATRIX = re.compile(r"(?:layers|blocks)\.\d+\.(?!norm).*\.weight$")


def is_layer_matrix(key: str, dimensions: int) -> bool:
    """Whether a weight is a matrix of the transformer layers, which tolerate 8 or 4 bits.

    Embeddings, heads, projectors, norms, modulation, biases and the vision tower do not.
    """
    matrix = dimensions == 2 and LAYER_MATRIX.search(key) is not None
    return matrix and not key.startswith(VISION_PREFIXES)


def stored_bytes(component: Component, key: str, weight_dtype: str) -> int:
    """Bytes of one weight of a component that is loaded as `weight_dtype`."""
    info = component.tensors[key]
    if component.quantisation is not None or weight_dtype == "default":
        return info.nbytes
    dtype = WEIGHT_DTYPES[weight_dtype]
    layers_only = weight_dtype in FORMATS or dtype == FP8
    if layers_only and not is_layer_matrix(key, len(info.shape)):
        return info.nbytes
    if weight_dtype in FORMATS:
        return packing(tuple(info.shape), weight_dtype).nbytes
    return info.shape.numel() * dtype.itemsize


def stored_format(component: Component) -> str:
    """The name in `WEIGHT_DTYPES` of the format that a component's layers are stored in."""
    names = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}
    return component.quantisation or names.get(component.dtype, str(component.dtype))
