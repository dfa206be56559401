"""A component as one safetensors file, in fewer bits if asked.

The file is written tensor by tensor under another name and renamed when it is whole. What is left
of a broken run is taken up again after the last tensor that is complete.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import GLMImageError
from ..quant.packing import ALIGNMENT, FORMATS, SLICE, packing, quantise
from .component import (
    FILE_FORMATS,
    FORMAT,
    QUANTISABLE,
    QUANTISATION,
    SCALE,
    Component,
    layer_of,
)
from .headers import DTYPES, TensorInfo
from .weight_dtypes import is_layer_matrix

TOOL = "glm_core.convert 1"
CHOICES = ("bf16", "fp8", "int8", "int4")
FP8 = torch.float8_e4m3fn
NAMES = {dtype: name for name, dtype in DTYPES.items()}
KEPT_AS_THEY_ARE = ("glyph",)
"""T5 is trained in float32, and its 218 M weights run once a prompt: little to gain."""

Progress = Callable[[int, int], None]


class Entry(NamedTuple):
    """A tensor of the file to be: its header entry, and how to make its bytes in a few pieces."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    parts: Callable[[], Iterator[Tensor]]


def convert(component: Component, dtype: str, folder: Path, progress: Progress) -> Path:
    """Write a component as one file in `folder`, and return its path.

    Args:
        dtype: one of `CHOICES`. fp8 and fewer bits are for the AR's and the decoder's layers.
        progress: is told the bytes done and the bytes of the whole file.

    Raises:
        GLMImageError: the component is quantised already, has layers that int4 does not take, or
            the disk is too small.
    """
    if component.quantisation is not None:
        raise GLMImageError(
            f"{component.path} is {component.quantisation} already; convert from the snapshot."
        )
    entries = _entries(component, dtype)
    header = _header(entries, _metadata(component, dtype, entries))
    file = folder / _file_name(component, dtype)
    partial = file.with_name(f"{file.name}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    done = _take_up(partial, header, entries, component)
    total = len(header) + sum(entry.nbytes for entry in entries)
    _require_space(file.parent, total - (partial.stat().st_size if done else 0))
    with partial.open("r+b" if done else "wb") as stream:
        if not done:
            stream.write(header)
        stream.seek(0, os.SEEK_END)
        for entry in entries[done:]:
            for part in entry.parts():
                stream.write(part.contiguous().flatten().view(torch.uint8).numpy())
                progress(stream.tell(), total)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
    return file


def _take_up(partial: Path, header: bytes, entries: list[Entry], component: Component) -> int:
    """How many tensors of an earlier run's file can be kept; what follows them is cut off.

    0 where it was written from another source, or with other options: the header differs, or
    the source is younger.
    """
    if not partial.is_file() or partial.stat().st_mtime < _changed(component):
        return 0
    with partial.open("r+b") as stream:
        if stream.read(len(header)) != header:
            return 0
        size, end, done = partial.stat().st_size, len(header), 0
        for entry in entries:
            if end + entry.nbytes > size:
                break
            end += entry.nbytes
            done += 1
        stream.truncate(end)
    return done


def _changed(component: Component) -> float:
    return max(file.stat().st_mtime for file in _sources(component))


def _sources(component: Component) -> list[Path]:
    return list(dict.fromkeys(info.file for info in component.tensors.values()))


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise GLMImageError(
            f"{folder} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} are needed; "
            "free some or give another folder."
        )


# ---- what is written ---------------------------------------------------------------------------


def _entries(component: Component, dtype: str) -> list[Entry]:
    """The file's tensors, the widest-aligned first: so each begins where its dtype may."""
    entries = []
    for key, info in component.tensors.items():
        narrow = component.name in QUANTISABLE and is_layer_matrix(key, len(info.shape))
        if narrow and dtype in FORMATS:
            entries.append(_packed(component, key, info, dtype))
        elif narrow and dtype == "fp8":
            entries += _scaled(component, key, info)
        else:
            entries.append(_plain(component, key, info))
    packed = {entry.key for entry in entries if entry.dtype == torch.uint8}
    return sorted(entries, key=lambda e: -(ALIGNMENT if e.key in packed else e.dtype.itemsize))


def _plain(component: Component, key: str, info: TensorInfo) -> Entry:
    """In bf16, except what is kept as it is."""
    whole = component.name in KEPT_AS_THEY_ARE or not info.dtype.is_floating_point
    dtype = info.dtype if whole else torch.bfloat16
    nbytes = info.shape.numel() * dtype.itemsize
    return Entry(key, dtype, info.shape, nbytes, lambda: (part.to(dtype) for part in _read(info)))


def _read(info: TensorInfo) -> Iterator[Tensor]:
    """A tensor's numbers in pieces, read and not mapped: pages of a map stay with the process."""
    with info.file.open("rb") as stream:
        stream.seek(info.begin)
        left = info.nbytes
        while left:
            piece = stream.read(min(left, SLICE * info.dtype.itemsize))
            left -= len(piece)
            yield torch.frombuffer(bytearray(piece), dtype=info.dtype)


def _packed(component: Component, key: str, info: TensorInfo, dtype: str) -> Entry:
    nbytes = packing(tuple(info.shape), dtype).nbytes
    return Entry(
        key,
        torch.uint8,
        (nbytes,),
        nbytes,
        lambda: iter([quantise(component.tensor(key), dtype)]),
    )


def _scaled(component: Component, key: str, info: TensorInfo) -> list[Entry]:
    """fp8 numbers, and beside them the float32 scale that makes the greatest fp8's greatest."""

    def scale() -> Tensor:
        # A matrix of zeros has any scale.
        greatest = max(part.abs().max().float() for part in _read(info))
        return (greatest / torch.finfo(FP8).max).clamp(min=torch.finfo(torch.float32).tiny)

    def numbers() -> Iterator[Tensor]:
        by = scale()
        return ((part.float() / by).to(FP8) for part in _read(info))

    return [
        Entry(key, FP8, info.shape, info.shape.numel(), numbers),
        Entry(f"{layer_of(key)}.{SCALE}", torch.float32, (), 4, lambda: iter([scale()])),
    ]


def _header(entries: list[Entry], metadata: dict[str, str]) -> bytes:
    """The safetensors header, padded so that the first tensor is aligned."""
    header: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for entry in entries:
        header[entry.key] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, begin + entry.nbytes],
        }
        begin += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _metadata(component: Component, dtype: str, entries: list[Entry]) -> dict[str, str]:
    """Everything beside the weights that a loader needs, and where the file comes from."""
    metadata = {
        "format": FORMAT,
        "component": component.name,
        "config": json.dumps(component.config),
        "provenance": json.dumps(
            {
                "tool": TOOL,
                "source": _source_name(component),
                "files": {file.name: file.stat().st_size for file in _sources(component)},
                "dtype": dtype,
            }
        ),
    }
    if (processor := component.processor) is not None:
        metadata |= {
            "tokenizer": processor.tokenizer,
            "tokenizer_config": json.dumps(processor.tokenizer_config),
            "generation_config": json.dumps(processor.generation_config),
            "processor": json.dumps(processor.image),
        }
        if processor.chat_template is not None:
            metadata["chat_template"] = processor.chat_template
    if component.scheduler is not None:
        metadata |= {
            "scheduler": json.dumps(component.scheduler),
            "vae": json.dumps(component.vae),
        }
    narrow = [layer_of(e.key) for e in entries if e.dtype in (torch.uint8, FP8)]
    if narrow:
        name = next(name for name, ours in FILE_FORMATS.items() if ours.startswith(dtype))
        layers = {layer: {"format": name} for layer in narrow}
        metadata[QUANTISATION] = json.dumps({"format_version": "1.0", "layers": layers})
    return metadata


def _source_name(component: Component) -> str:
    """The snapshot's name, or that of the single file."""
    path = component.path
    return path.stem if path.is_file() else path.parent.name


def _file_name(component: Component, dtype: str) -> str:
    if component.name in KEPT_AS_THEY_ARE:
        dtype = NAMES[component.dtype].lower()
    elif component.name not in QUANTISABLE:
        dtype = "bf16"
    return f"{_source_name(component)}_{component.name}_{dtype}.safetensors"
