"""The components in a single file, and their configs where another program has written the file.

Such a program writes metadata of its own. Our configs then are one more tensor beside the weights,
its bytes JSON, and one file may hold several components under prefixes of that program's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FileError
from ..foreign import parse_json
from .component import FORMAT, Component
from .headers import TensorInfo, read_header

CONFIG = "glm_image_config"
"""The tensor's key, after the prefix of its component."""
MAX_CONFIG_BYTES = 1 << 20
CLIP_ROOT = "transformer."
"""What ComfyUI's text encoders have before their network's keys."""


class Part(NamedTuple):
    """A component in a single file: its tensors by the network's keys, and our metadata."""

    tensors: dict[str, TensorInfo]
    metadata: Mapping[str, str]


def config_tensor(component: Component) -> Tensor:
    """uint8 [n]: the configs to save beside a component's weights. The AR model has more."""
    content = {"component": component.name, "config": component.config}
    if component.name == "decoder":
        content |= {"scheduler": component.scheduler, "vae": component.vae}
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def read_parts(file: Path, *, whole: bool = True) -> dict[str, Part]:
    """The components in a single file by name; none in a file of another model.

    Args:
        whole: whether the file must hold the tensors' bytes.

    Raises:
        GLMImageError: the file or a config in it is broken.
    """
    tensors, metadata = read_header(file, whole=whole)
    if metadata.get("format") == FORMAT:
        return {metadata.get("component", ""): Part(tensors, metadata)}
    parts = {}
    for key, info in tensors.items():
        prefix = key.removesuffix(CONFIG)
        if key == prefix + CONFIG and (not prefix or prefix.endswith(".")):
            found = _read_config(info)
            parts[found["component"]] = Part(_below(prefix, tensors, found["component"]), found)
    return parts


def _read_config(info: TensorInfo) -> dict[str, str]:
    """The content of a config tensor, as our metadata would have it."""
    if info.dtype != torch.uint8 or info.nbytes > MAX_CONFIG_BYTES:
        raise FileError(f"{info.key} in {info.file} is broken; save the file again.")
    with info.file.open("rb") as stream:
        stream.seek(info.begin)
        text = stream.read(info.nbytes).decode(errors="replace")
    content = parse_json(text, f"{info.key} in {info.file}")
    configs = {key: value for key, value in content.items() if isinstance(value, dict)}
    return {"component": str(content.get("component", ""))} | {
        key: json.dumps(value) for key, value in configs.items()
    }


def _below(prefix: str, tensors: Mapping[str, TensorInfo], component: str) -> dict[str, TensorInfo]:
    root = CLIP_ROOT if component == "glyph" else ""
    return {
        key.removeprefix(prefix).removeprefix(root): info
        for key, info in tensors.items()
        if key.startswith(prefix) and key != prefix + CONFIG
    }
