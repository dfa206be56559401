"""safetensors files: headers that are checked before any tensor is read, and mapped tensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import FileError, shown
from ..foreign import depth, require_few_elements, wall
from .json_files import is_file

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

# Bounds of what is read, as a broken file may lie in a folder that is only listed.
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
MAX_TENSORS = 50_000  # GLM-Image's AR model has about 1,000
MAX_DIMENSIONS = 16
MAX_DEPTH = 8  # a tensor's shape is the third level
MAX_BYTES = 2**63 - 1


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


class BrokenHeaderError(ValueError):
    """What the header holds is not of the safetensors format."""


def read_header(file: Path, *, whole: bool = True) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a safetensors file, from its header and its size alone.

    The format: 8 bytes little-endian header length, JSON, then the tensors' bytes without gaps.

    Args:
        whole: whether the file must hold the tensors' bytes.

    Raises:
        GLMImageError: the file is truncated, broken, without weights or no safetensors file, or
            its header is beyond the bounds above.
    """
    if not is_file(file):  # reading a pipe would wait for its writer
        raise FileError(f"{file} is no file; choose another one.")
    with wall(f"{file} cannot be read"):
        size = file.stat().st_size
        raw = _read_json_part(file, size)
    begin = 8 + len(raw)
    with wall(f"The header of {file} is broken or of an unknown format"):
        header = _parse(raw, str(file))
        metadata = _metadata(header.pop("__metadata__", {}))
        tensors = {key: _tensor_info(file, key, entry, begin) for key, entry in header.items()}
    if whole:
        _check_bytes(file, tensors, begin, size)
    return tensors, metadata


def mentions(file: Path, *words: str) -> bool:
    """Whether a safetensors file's header holds any of the words.

    It is not parsed, as lists are made of files of all models.

    Raises:
        GLMImageError: the file cannot be read, or is no safetensors file.
    """
    if not is_file(file):
        return False
    with wall(f"{file} cannot be read"):
        header = _read_json_part(file, file.stat().st_size)
    return any(word.encode() in header for word in words)


def _read_json_part(file: Path, size: int) -> bytes:
    with file.open("rb") as stream:
        start = stream.read(512)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{" or length > MAX_HEADER_BYTES:
            raise FileError(_not_safetensors(file, start))
        if 8 + length > size:
            raise FileError(_truncated(file, size, 8 + length))
        stream.seek(8)
        return stream.read(length)


def _parse(raw: bytes, source: str) -> dict[str, Any]:
    """The header's JSON, as strictly as the safetensors library reads it."""
    text = raw.decode("utf-8")
    require_few_elements(text, f"The header of {source}")
    if text.count("{") > 2 * MAX_TENSORS:  # some are in metadata, as in a tokenizer's vocabulary
        raise BrokenHeaderError("too many tensors")
    header = json.loads(
        text, object_pairs_hook=_without_twins, parse_int=_natural, parse_constant=_no_number
    )
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise BrokenHeaderError("too many tensors")
    if depth(header, MAX_DEPTH) > MAX_DEPTH:
        raise BrokenHeaderError("nested too deeply")
    return header


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise BrokenHeaderError("a name is there twice")
    "".join(value).encode()  # half a surrogate pair is an error, here and in strings
    for item in value.values():
        if isinstance(item, str):
            item.encode()
    return value


def _natural(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 20:
        raise BrokenHeaderError(f"{shown(digits)} is no size")
    return int(digits)


def _no_number(name: str) -> None:
    raise BrokenHeaderError(f"{name} is no JSON")


def _metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BrokenHeaderError("metadata that is no text")
    return metadata


def _tensor_info(file: Path, key: str, entry: Any, begin: int) -> TensorInfo:
    """`begin`: the first tensor's offset in the file, from which the entry counts its own."""
    if not isinstance(entry, dict):
        raise BrokenHeaderError("an entry that is no object")
    first, end = _sizes(entry.get("data_offsets"))
    shape, dtype = _sizes(entry.get("shape")), DTYPES[entry["dtype"]]
    if len(shape) > MAX_DIMENSIONS:
        raise BrokenHeaderError("too many dimensions")
    return TensorInfo(file, key, torch.Size(shape), dtype, begin + first, begin + end)


def _sizes(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(
        type(size) is int and size <= MAX_BYTES for size in value
    ):
        raise BrokenHeaderError("a size that is no whole number")
    return value


def _nbytes(info: TensorInfo) -> int:
    """Bytes that a shape needs, and more than any file has if an array of it could not be made."""
    count = info.dtype.itemsize
    for size in info.shape:
        count *= max(size, 1)
    if count > MAX_BYTES:
        return MAX_BYTES
    return 0 if 0 in info.shape else count


def _check_bytes(file: Path, tensors: dict[str, TensorInfo], begin: int, size: int) -> None:
    """Check that the tensors fill the file from `begin` to its end without gaps."""
    if not tensors:
        raise FileError(f"{file} holds no weights; download it again.")
    end = begin
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin != end or info.nbytes != _nbytes(info):
            raise FileError(
                f"The header of {file} is broken at {shown(info.key)}; download it again."
            )
        end = info.end
    if end > size:
        raise FileError(_truncated(file, size, end))
    if end < size:
        raise FileError(
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
    with wall(f"{file} cannot be mapped"), safe_open(file, framework="pt") as mapped:
        return {key: mapped.get_tensor(key) for key in mapped.keys()}  # noqa: SIM118
