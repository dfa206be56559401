"""safetensors headers and JSON files: read and checked before a tensor is."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import GLMImageError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


@dataclass(frozen=True)
class TensorInfo:
    """A tensor by its header entry: `key` is its name in `file`, `begin:end` its bytes there."""

    file: Path
    key: str
    shape: torch.Size
    dtype: torch.dtype
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a safetensors file, from its header and its size alone.

    The format: 8 bytes little-endian header length, JSON, then the tensors' bytes without gaps.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(512)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 9 or start[8:9] != b"{" or length > MAX_HEADER_BYTES:
            raise GLMImageError(_not_safetensors(file, start))
        if 8 + length > size:
            raise GLMImageError(_truncated(file, size, 8 + length))
        stream.seek(8)
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        tensors = {
            key: TensorInfo(
                file,
                key,
                torch.Size(entry["shape"]),
                DTYPES[entry["dtype"]],
                *(8 + length + offset for offset in entry["data_offsets"]),
            )
            for key, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GLMImageError(
            f"The header of {file} is broken or of an unknown format; download it again."
        ) from error
    end = 8 + length
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin != end or info.nbytes != math.prod(info.shape) * info.dtype.itemsize:
            raise GLMImageError(f"The header of {file} is broken at {info.key}; download it again.")
        end = info.end
    if not tensors:
        raise GLMImageError(f"{file} holds no weights; download it again.")
    if end > size:
        raise GLMImageError(_truncated(file, size, end))
    if end < size:
        raise GLMImageError(
            f"{file} is {size} bytes long and its header describes {end}; download it again."
        )
    return tensors, metadata


def _truncated(file: Path, size: int, expected: int) -> str:
    at_least = f"{size} of at least {expected} bytes"
    return f"{file} is truncated: it holds {at_least}; download it again."


def _not_safetensors(file: Path, start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return (
            f"{file} is a git-lfs pointer, not the weights; fetch the file itself (git lfs pull)."
        )
    if start.lstrip().startswith(b"<"):
        return f"{file} is a web page, not a safetensors file; download the file itself."
    return f"{file} is not a safetensors file; download it again or choose another one."


def map_file(file: Path) -> dict[str, Tensor]:
    """Tensors that share one private mapping of the file, which lives as long as any of them."""
    with safe_open(file, framework="pt") as mapped:
        return {key: mapped.get_tensor(key) for key in mapped.keys()}  # noqa: SIM118


def read_text(file: Path) -> str:
    if not file.is_file():
        raise GLMImageError(f"{file} is missing; copy it from the hub's zai-org/GLM-Image.")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GLMImageError(f"{file} cannot be read ({error}); download it again.") from error


def read_json(file: Path) -> dict[str, Any]:
    return parse_json(read_text(file), str(file))


def parse_json(text: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise GLMImageError(f"{source} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise GLMImageError(f"{source} is not a JSON object; download it again.")
    return value
