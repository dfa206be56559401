"""Quantised layers in a safetensors file: the metadata that names them, written and read."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import WeightsError, first_few, shown
from ..foreign import parse_json
from ..quant.packing import FORMATS
from .headers import TensorInfo

QUANTISATION = "_quantization_metadata"
"""ComfyUI's metadata key for quantised layers: {"layers": {name: {"format": ...}}}."""
LAYER_FORMATS = {"fp8_e4m3fn": "float8_e4m3fn", "int8": "glm_int8", "int4": "glm_int4"}
"""The loaders' name of a format, and its name in files."""
FP8 = torch.float8_e4m3fn
SCALE = "weight_scale"
"""Name of the number that multiplies an fp8 layer's weight, which is stored beside the weight."""


FULL_PRECISION = {"full_precision_matrix_mult": True}
"""Of an fp8 layer: current hosts multiply in the compute dtype. Else they would round the inputs to
fp8 without a scale, which cuts off what is above 448; inputs of this model are larger."""


def layer_of(key: str) -> str:
    """The layer that a weight or its scale belongs to."""
    return key.removesuffix(f".{SCALE}").removesuffix(".weight")


def write_quantisation(layers: Iterable[str], quantisation: str) -> dict[str, str]:
    """Metadata for layers that are all in one of `LAYER_FORMATS`."""
    content = {"format_version": "1.0", "layers": layer_formats(layers, quantisation)}
    return {QUANTISATION: json.dumps(content)}


def layer_formats(layers: Iterable[str], quantisation: str) -> dict[str, dict[str, Any]]:
    """The entry of each layer, as files have it and hosts read it."""
    entry: dict[str, Any] = {"format": LAYER_FORMATS[quantisation]}
    if quantisation not in FORMATS:
        entry |= FULL_PRECISION
    return dict.fromkeys(layers, entry)


def read_quantisation(
    file: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[str | None, frozenset[str]]:
    """A file's format, one of `LAYER_FORMATS` or None, and the names of its quantised layers.

    Raises:
        GLMImageError: the metadata is broken, names another format, or contradicts the tensors.
    """
    content = parse_json(metadata.get(QUANTISATION, "{}"), f"The {QUANTISATION} of {file}")
    layers = content.get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise WeightsError(f"The {QUANTISATION} of {file} is broken; convert the snapshot again.")
    _require_named(file, tensors, layers)
    if not layers:
        return None, frozenset()
    quantisation = _format_of(file, layers)
    _require_stored(file, tensors, layers, quantisation)
    return quantisation, frozenset(layers)


def _require_named(file: Path, tensors: Mapping[str, TensorInfo], layers: Collection[str]) -> None:
    """Refuse packed weights whose format the metadata does not give."""
    unnamed = [
        key
        for key, info in tensors.items()
        if info.dtype in (torch.int8, torch.uint8) and layer_of(key) not in layers
    ]
    if unnamed:
        raise WeightsError(
            f"{file} holds {len(unnamed)} quantised weights ({first_few(unnamed)}) and does not "
            "say in which format; convert the snapshot with this pack's convert.py."
        )


def _format_of(file: Path, layers: Mapping[str, dict[str, Any]]) -> str:
    """The one format of all layers."""
    found = sorted({str(layer.get("format")) for layer in layers.values()})
    loadable = {stored: name for name, stored in LAYER_FORMATS.items()}
    if len(found) > 1 or found[0] not in loadable:
        raise WeightsError(
            f"{file} holds layers quantised as {shown(' and '.join(found))}; use a file that is "
            f"all in one of {', '.join(loadable)}."
        )
    return loadable[found[0]]


def _require_stored(
    file: Path, tensors: Mapping[str, TensorInfo], layers: Iterable[str], quantisation: str
) -> None:
    """Refuse metadata that names a layer whose weight is missing or of another dtype."""
    dtype = torch.uint8 if quantisation in FORMATS else FP8
    broken = [
        layer
        for layer in layers
        if (info := tensors.get(f"{layer}.weight")) is None or info.dtype != dtype
    ]
    if broken:
        raise WeightsError(
            f"{file} says that {len(broken)} layers are {quantisation} ({first_few(broken)}), and "
            "they are missing or of another kind; convert the snapshot again."
        )
