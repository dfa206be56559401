"""safetensors files: headers that are checked before any tensor is read, and mapped tensors."""

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
    """A tensor's header entry: its name `key` in `file`, and its bytes `begin:end` of the file."""

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

    Raises:
        GLMImageError: the file is truncated, broken, without weights or no safetensors file.
    """
    size = file.stat().st_size
    raw = _read_json_part(file, size)
    begin = 8 + len(raw)
    try:
        header = json.loads(raw)
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        tensors = {key: _tensor_info(file, key, entry, begin) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GLMImageError(
            f"The header of {file} is broken or of an unknown format; download it again."
        ) from error
    _check_bytes(file, tensors, begin, size)
    return tensors, metadata


def _read_json_part(file: Path, size: int) -> bytes:
    with file.open("rb") as stream:
        start = stream.read(512)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{" or length > MAX_HEADER_BYTES:
            raise GLMImageError(_not_safetensors(file, start))
        if 8 + length > size:
            raise GLMImageError(_truncated(file, size, 8 + length))
        stream.seek(8)
        return stream.read(length)


def _tensor_info(file: Path, key: str, entry: dict[str, Any], begin: int) -> TensorInfo:
    """`begin`: the first tensor's offset in the file, from which the entry counts its own."""
    first, end = entry["data_offsets"]
    shape, dtype = torch.Size(entry["shape"]), DTYPES[entry["dtype"]]
    return TensorInfo(file, key, shape, dtype, begin + first, begin + end)


def _check_bytes(file: Path, tensors: dict[str, TensorInfo], begin: int, size: int) -> None:
    """Check that the tensors fill the file from `begin` to its end without gaps."""
    if not tensors:
        raise GLMImageError(f"{file} holds no weights; download it again.")
    end = begin
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin != end or info.nbytes != math.prod(info.shape) * info.dtype.itemsize:
            raise GLMImageError(f"The header of {file} is broken at {info.key}; download it again.")
        end = info.end
    if end > size:
        raise GLMImageError(_truncated(file, size, end))
    if end < size:
        raise GLMImageError(
            f"{file} is {size} bytes long and its header describes {end}; download it again."
        )


def _truncated(file: Path, size: int, expected: int) -> str:
    return f"{file} is truncated: it holds {size} of at least {expected} bytes; download it again."


def _not_safetensors(file: Path, start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return (
            f"{file} is a git-lfs pointer, not the weights; fetch the file itself (git lfs pull)."
        )
    if start.lstrip().startswith(b"<"):
        return f"{file} is a web page, not a safetensors file; download the file itself."
    return f"{file} is not a safetensors file; download it again or choose another one."


def map_file(file: Path) -> dict[str, Tensor]:
    """The file's tensors by name: views of a private mapping that lives as long as any of them."""
    with safe_open(file, framework="pt") as mapped:
        return {key: mapped.get_tensor(key) for key in mapped.keys()}  # noqa: SIM118
