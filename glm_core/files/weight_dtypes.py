"""How weights may be kept, and what each way takes."""

import re
from math import prod

import torch

from ..quant.packing import FORMATS, packing
from ..vision.encoder import VISION_PREFIXES
from .component import Component

WEIGHT_DTYPES: dict[str, torch.dtype | None] = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "int8": None,
    "int4": None,
}
"""What the loaders offer, and the dtype of its weights; None: the file's own, or packed."""


LAYER_MATRIX = re.compile(r"(?:layers|blocks)\.\d+\.(?!norm).*\.weight$")


def is_layer_matrix(key: str, dimensions: int) -> bool:
    """Whether a weight is a matrix of the layers proper, which bear fewer bits.

    Embeddings, heads, projectors, norms, biases, what modulates, and the vision tower do not.
    """
    matrix = dimensions == 2 and LAYER_MATRIX.search(key) is not None
    return matrix and not key.startswith(VISION_PREFIXES)


def stored_bytes(component: Component, key: str, weight_dtype: str) -> int:
    """Bytes of one of a component's weights, kept as `weight_dtype`."""
    info = component.tensors[key]
    if component.quantisation is not None or weight_dtype == "default":
        return info.nbytes
    matrix = is_layer_matrix(key, len(info.shape))
    if weight_dtype in FORMATS:
        return packing(tuple(info.shape), weight_dtype).nbytes if matrix else info.nbytes
    target = WEIGHT_DTYPES[weight_dtype]
    narrow = target == torch.float8_e4m3fn
    return info.nbytes if narrow and not matrix else prod(info.shape) * target.itemsize
