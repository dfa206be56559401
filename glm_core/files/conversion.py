"""Writing a component as one safetensors file, quantised if asked.

The file is written tensor by tensor under another name and renamed once it is complete. A run that
follows an interrupted one continues after the last complete tensor, see `journal`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import FileError, WeightsError
from ..quant.packing import ALIGNMENT, FORMATS, SLICE, packing, quantise
from .component import COMPONENTS, FORMAT, Component
from .headers import DTYPES, TensorInfo
from .hub_cache import hub_name, repository_of
from .journal import Journal
from .quantisation import FP8, SCALE, layer_of, write_quantisation
from .weight_dtypes import is_layer_matrix

TOOL = "glm_core.convert 1"
CHOICES = ("bf16", "fp8", "int8", "int4")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNCONVERTED = ("glyph",)
"""T5 is trained in float32, and its 218 M weights run once per prompt: there is little to gain."""

Progress = Callable[[int, int], None]


class OutputTensor(NamedTuple):
    """A tensor of the new file: its header entry, and a function that yields chunks of values."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterator[Tensor]]


class Output(NamedTuple):
    """The file that a component becomes."""

    name: str
    header: bytes
    tensors: list[OutputTensor]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def output(component: Component, dtype: str) -> Output:
    """
    Args:
        dtype: one of `CHOICES`. fp8, int8 and int4 apply to the layers of the AR and the decoder.

    Raises:
        GLMImageError: the component is quantised already, or has layers of a width that int4 does
            not take.
    """
    if component.quantisation is not None:
        raise WeightsError(
            f"{component.path} is {component.quantisation} already; convert from the snapshot."
        )
    tensors = _output_tensors(component, dtype)
    header = _header(tensors, _metadata(component, dtype, tensors))
    return Output(_file_name(component, dtype), header, tensors)


def is_converted(component: Component, output: Output, folder: Path) -> bool:
    """Whether an earlier run has written the file from the component as it is now."""
    file = folder / output.name
    if not file.is_file() or file.stat().st_size != output.nbytes:
        return False
    if _modified(file) < max(map(_modified, _sources(component))):
        return False
    with file.open("rb") as stream:
        return stream.read(len(output.header)) == output.header


def convert(component: Component, dtype: str, folder: Path, progress: Progress) -> Path:
    """Write a component as one file in `folder`, and return its path.

    Args:
        dtype: one of `CHOICES`. fp8, int8 and int4 apply to the layers of the AR and the decoder.
        progress: called with the bytes written and the bytes of the whole file.

    Raises:
        GLMImageError: the component is quantised already, has layers of a width that int4 does not
            take, or the disk is too small.
    """
    out = output(component, dtype)
    _, header, tensors = out
    file = folder / out.name
    partial = file.with_name(f"{file.name}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    total = out.nbytes
    with Journal(partial, header, changed=max(map(_modified, _sources(component)))) as journal:
        done = journal.resume([tensor.nbytes for tensor in tensors])
        _require_space(file.parent, total - (partial.stat().st_size if done else 0))
        with partial.open("r+b" if done else "wb") as stream:
            if not done:
                stream.write(header)
            stream.seek(0, os.SEEK_END)
            for tensor in tensors[done:]:
                written = hashlib.sha256()
                for chunk in tensor.chunks():
                    data = chunk.contiguous().flatten().view(torch.uint8).numpy()
                    stream.write(data)
                    written.update(data)
                    progress(stream.tell(), total)
                stream.flush()
                journal.add(written)
            os.fsync(stream.fileno())
        partial.replace(file)
    return file


def _modified(file: Path) -> float:
    return file.stat().st_mtime


def _sources(component: Component) -> list[Path]:
    return list(dict.fromkeys(info.file for info in component.tensors.values()))


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FileError(
            f"{folder} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} are needed; "
            "free some or give another folder."
        )


# ---- tensors -----------------------------------------------------------------------------------


def _output_tensors(component: Component, dtype: str) -> list[OutputTensor]:
    """The file's tensors, those with the widest alignment first, so that every one is aligned."""
    tensors = []
    for key, info in component.tensors.items():
        in_layer = COMPONENTS[component.name].quantisable and is_layer_matrix(key, len(info.shape))
        if in_layer and dtype in FORMATS:
            tensors.append(_packed(component, key, info, dtype))
        elif in_layer and dtype == "fp8":
            tensors += _scaled(key, info)
        else:
            tensors.append(_plain(component, key, info))
    packed = {tensor.key for tensor in tensors if tensor.dtype == torch.uint8}
    return sorted(tensors, key=lambda t: -(ALIGNMENT if t.key in packed else t.dtype.itemsize))


def _plain(component: Component, key: str, info: TensorInfo) -> OutputTensor:
    """A tensor in bf16, or in its own dtype if it holds integers or is in `UNCONVERTED`."""
    unchanged = component.name in UNCONVERTED or not info.dtype.is_floating_point
    dtype = info.dtype if unchanged else torch.bfloat16
    nbytes = info.shape.numel() * dtype.itemsize
    return OutputTensor(
        key, dtype, info.shape, nbytes, lambda: (chunk.to(dtype) for chunk in _read(info))
    )


def _read(info: TensorInfo) -> Iterator[Tensor]:
    """A tensor's values in chunks. They are read, as mapped pages would stay in memory."""
    with info.file.open("rb") as stream:
        stream.seek(info.begin)
        remaining = info.nbytes
        while remaining:
            chunk = stream.read(min(remaining, SLICE * info.dtype.itemsize))
            if not chunk:
                raise FileError(f"{info.file} became shorter while it was read; start again.")
            remaining -= len(chunk)
            yield torch.frombuffer(bytearray(chunk), dtype=info.dtype)


def _packed(component: Component, key: str, info: TensorInfo, dtype: str) -> OutputTensor:
    nbytes = packing(tuple(info.shape), dtype).nbytes
    return OutputTensor(
        key,
        torch.uint8,
        (nbytes,),
        nbytes,
        lambda: iter([quantise(component.tensor(key), dtype)]),
    )


def _scaled(key: str, info: TensorInfo) -> list[OutputTensor]:
    """fp8 numbers and their float32 scale. The largest number becomes the largest of fp8."""

    def scale() -> Tensor:
        largest = max(chunk.float().abs().max() for chunk in _read(info))
        # A matrix of zeros may have any scale but 0.
        return (largest / torch.finfo(FP8).max).clamp(min=torch.finfo(torch.float32).tiny)

    def numbers() -> Iterator[Tensor]:
        divisor = scale()
        return ((chunk.float() / divisor).to(FP8) for chunk in _read(info))

    return [
        OutputTensor(key, FP8, info.shape, info.shape.numel(), numbers),
        OutputTensor(f"{layer_of(key)}.{SCALE}", torch.float32, (), 4, lambda: iter([scale()])),
    ]


# ---- header ------------------------------------------------------------------------------------


def _header(tensors: list[OutputTensor], metadata: dict[str, str]) -> bytes:
    """The safetensors header, padded so that the first tensor is aligned."""
    header: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for tensor in tensors:
        header[tensor.key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.nbytes],
        }
        begin += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _metadata(component: Component, dtype: str, tensors: list[OutputTensor]) -> dict[str, str]:
    """What a loader needs beside the weights, and where the file comes from."""
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
    quantised = [layer_of(t.key) for t in tensors if t.dtype in (torch.uint8, FP8)]
    if quantised:
        metadata |= write_quantisation(quantised, "fp8_e4m3fn" if dtype == "fp8" else dtype)
    return metadata


def _source_name(component: Component) -> str:
    """The name of the snapshot, as on the hub if it lies in a hub's cache, or of the file."""
    path = component.path
    if path.is_file():
        return path.stem
    repository = repository_of(path.parent)
    return hub_name(repository).split("/")[-1] if repository else path.parent.name


def _file_name(component: Component, dtype: str) -> str:
    if component.name in UNCONVERTED:
        dtype = DTYPE_NAMES[component.dtype].lower()
    elif not COMPONENTS[component.name].quantisable:
        dtype = "bf16"
    return f"{_source_name(component)}_{component.name}_{dtype}.safetensors"
