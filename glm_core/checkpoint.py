"""A GLM-Image component on disk: its headers and configs checked, its weights memory-mapped.

A component is read from a hub snapshot (a folder with one subfolder per component, each sharded
or one file) or from a single safetensors file whose metadata carries the configs. Opening parses
JSON and safetensors headers only, so everything that can be wrong is said before a weight is read.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import GLMImageError
from .quant import FORMATS, packing

FORMAT = "glm_image_checkpoint"
HUB_NAME = "zai-org/GLM-Image"


@dataclass(frozen=True)
class ComponentKind:
    """What a component is called and how its folder is recognised.

    Args:
        title: the component in an error sentence.
        folder: its folder in a hub snapshot.
        stem: the weight files' name before `.safetensors`.
        identity: a key of config.json and the value that says it is this component.
        files: the folder of ComfyUI's models that single files of it go into.
        tied: alias -> name of weights that the checkpoint may hold under either name, or both.
    """

    title: str
    folder: str
    stem: str
    identity: tuple[str, str]
    files: str
    tied: tuple[tuple[str, str], ...] = ()


COMPONENTS: dict[str, ComponentKind] = {
    "ar": ComponentKind(
        "AR model",
        "vision_language_encoder",
        "model",
        ("model_type", "glm_image"),
        "text_encoders",
    ),
    "decoder": ComponentKind(
        "diffusion decoder",
        "transformer",
        "diffusion_pytorch_model",
        ("_class_name", "GlmImageTransformer2DModel"),
        "diffusion_models",
    ),
    # T5 ties its input embedding: files hold `shared.weight`, the encoder's alias, or both.
    "glyph": ComponentKind(
        "glyph encoder",
        "text_encoder",
        "model",
        ("model_type", "t5"),
        "text_encoders",
        (("encoder.embed_tokens.weight", "shared.weight"),),
    ),
    "vae": ComponentKind(
        "VAE", "vae", "diffusion_pytorch_model", ("_class_name", "AutoencoderKL"), "vae"
    ),
}

QUANTISABLE = ("ar", "decoder")

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
QUANTISATION = "_quantization_metadata"
"""Metadata key of a quantised file, as ComfyUI has it: {"layers": {name: {"format": ...}}}."""
FILE_FORMATS = {"float8_e4m3fn": "fp8_e4m3fn", "glm_int8": "int8", "glm_int4": "int4"}
"""The names of formats in files, and our loaders' names for them."""
SCALE = "weight_scale"
"""Beside the weight of an fp8 layer: a number to multiply it by."""

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


@dataclass(frozen=True)
class Processor:
    """The files beside the AR weights that turn a prompt and images into its input.

    Args:
        tokenizer: the text of tokenizer.json.
        image: the image processor's config, with `min_pixels` and `max_pixels` whichever way the
            library that saved it wrote them.
    """

    tokenizer: str
    tokenizer_config: dict[str, Any]
    chat_template: str | None
    generation_config: dict[str, Any]
    image: dict[str, Any]


@dataclass(frozen=True)
class Component:
    """A component whose headers and configs have been read, and none of its weights.

    Args:
        name: a key of `COMPONENTS`.
        path: the folder or file that holds the weights.
        tensors: every weight by the name that the network gives it.
        processor: the AR model's, None for the others.
        scheduler: the decoder's scheduler config, None for the others.
        vae: the config of the VAE whose latents the decoder was trained on, None for the others.
        quantisation: the format of the file's quantised layers, a value of `FILE_FORMATS`.
        quantised: the names of those layers.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    processor: Processor | None = None
    scheduler: dict[str, Any] | None = None
    vae: dict[str, Any] | None = None
    quantisation: str | None = None
    quantised: frozenset[str] = frozenset()

    @property
    def title(self) -> str:
        return COMPONENTS[self.name].title

    @property
    def nbytes(self) -> int:
        """Size of all weights in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the bytes have, quantised layers left out."""
        nbytes: dict[torch.dtype, int] = {}
        kept = [t for key, t in self.tensors.items() if layer_of(key) not in self.quantised]
        for info in kept:
            nbytes[info.dtype] = nbytes.get(info.dtype, 0) + info.nbytes
        return max(nbytes, key=nbytes.__getitem__)

    def check(
        self, expected: Mapping[str, torch.Size], ignored_prefixes: tuple[str, ...] = ()
    ) -> None:
        """Compare the stored keys and shapes with a network's, before any weight is read.

        Args:
            expected: the network's key -> shape (build it on the meta device).
            ignored_prefixes: stored keys that the network leaves out on purpose.

        Raises:
            GLMImageError: keys are missing or unexpected, or have other shapes.
        """
        found = _without(self.tensors, ignored_prefixes)
        if self.quantisation not in (None, *FORMATS):
            scales = dict.fromkeys((f"{layer}.{SCALE}" for layer in self.quantised), torch.Size())
            expected = {**expected, **scales}
        missing = [key for key in expected if key not in found]
        unexpected = [
            f"{key} in {info.file.name}" for key, info in found.items() if key not in expected
        ]
        reshaped = [
            f"{key} is {list(found[key].shape)} and not {list(shape)} in {found[key].file.name}"
            for key, shape in expected.items()
            if key in found and not self._has_shape(key, shape)
        ]
        problems = [
            f"{what} {len(items)} ({first_few(items)})"
            for what, items in (
                ("weights missing:", missing),
                ("weights unexpected:", unexpected),
                ("weights of another shape:", reshaped),
            )
            if items
        ]
        if problems:
            raise GLMImageError(
                f"The {self.title} in {self.path} does not fit its config: {'; '.join(problems)}. "
                "Download its weights and config again, from one and the same checkpoint."
            )

    def _has_shape(self, key: str, shape: torch.Size) -> bool:
        """Whether a stored weight is one of this shape; int8 and int4 hold it as a run of bytes."""
        info = self.tensors[key]
        if self.quantisation in FORMATS and layer_of(key) in self.quantised:
            fits = len(shape) == 2 and packing(tuple(shape), self.quantisation).nbytes
            return info.shape == (fits,)
        return info.shape == shape

    def state_dict(self, ignored_prefixes: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """The weights on the CPU as views of the mapped files: pages are read when first used.

        Args:
            ignored_prefixes: keys to leave out.
        """
        wanted = _without(self.tensors, ignored_prefixes)
        state: dict[str, Tensor] = {}
        for file in dict.fromkeys(info.file for info in wanted.values()):
            stored = map_file(file)
            state.update((k, stored[info.key]) for k, info in wanted.items() if info.file == file)
        return state

    def tensor(self, key: str) -> Tensor:
        """One of the weights, as a view of its mapped file."""
        info = self.tensors[key]
        return map_file(info.file)[info.key]


def open_component(path: Path | str, component: str) -> Component:
    """Read the headers and configs of a component.

    Args:
        path: a hub snapshot's folder, or one safetensors file with its config in the metadata.
        component: a key of `COMPONENTS`.

    Raises:
        GLMImageError: anything is missing, broken or of another model.
    """
    path = Path(path)
    if path.is_dir():
        return _open_snapshot(path, component)
    if path.is_file():
        return _open_single_file(path, component)
    raise GLMImageError(
        f"{path} does not exist; put the {COMPONENTS[component].title} there or choose another one."
    )


# ---- hub snapshots -----------------------------------------------------------------------------


def _open_snapshot(snapshot: Path, component: str) -> Component:
    kind = COMPONENTS[component]
    folder = snapshot / kind.folder
    if not folder.is_dir():
        raise GLMImageError(
            f"{snapshot} has no folder '{kind.folder}', which holds the {kind.title}; "
            f"copy that folder from the hub's {HUB_NAME} into it."
        )
    config = read_json(folder / "config.json")
    _check_identity(config, kind, folder / "config.json")
    return Component(
        name=component,
        path=folder,
        config=config,
        tensors=_tie(_read_weights(folder, kind), kind),
        processor=_read_processor(snapshot, folder) if component == "ar" else None,
        **(_read_companions(snapshot) if component == "decoder" else {}),
    )


def _read_companions(snapshot: Path) -> dict[str, Any]:
    """What the decoder needs of its neighbours: the schedule, and the statistics of its latents."""
    return {
        "scheduler": read_json(snapshot / "scheduler" / "scheduler_config.json"),
        "vae": read_json(snapshot / COMPONENTS["vae"].folder / "config.json"),
    }


def _read_processor(snapshot: Path, weights: Path) -> Processor:
    folder = snapshot / "processor"
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    generation = weights / "generation_config.json"
    template = folder / "chat_template.jinja"
    chat_template = tokenizer_config.get("chat_template")
    if template.is_file():
        chat_template = _read_text(template)
    # The hub has preprocessor_config.json; newer libraries save processor_config.json instead.
    image = {}
    if (folder / "processor_config.json").is_file():
        image = read_json(folder / "processor_config.json").get("image_processor", {})
    return Processor(
        tokenizer=_read_text(folder / "tokenizer.json"),
        tokenizer_config=tokenizer_config,
        chat_template=chat_template,
        generation_config=read_json(generation) if generation.is_file() else {},
        image=_with_pixel_limits(image or read_json(folder / "preprocessor_config.json")),
    )


def _with_pixel_limits(image: dict[str, Any]) -> dict[str, Any]:
    """`size.{shortest,longest}_edge` hold pixel counts, which the hub calls min and max_pixels."""
    size = image.get("size") or {}
    try:
        low, high = size["shortest_edge"], size["longest_edge"]
    except KeyError:
        low, high = image.get("min_pixels"), image.get("max_pixels")
    if low is None or high is None:
        raise GLMImageError(
            "The processor's image config has neither min_pixels and max_pixels nor a size with "
            "shortest_edge and longest_edge; download the processor folder again."
        )
    return {**image, "min_pixels": low, "max_pixels": high}


def _read_weights(folder: Path, kind: ComponentKind) -> dict[str, TensorInfo]:
    index = folder / f"{kind.stem}.safetensors.index.json"
    single = folder / f"{kind.stem}.safetensors"
    if index.is_file() and single.is_file():
        raise GLMImageError(
            f"{folder} holds both {index.name} and {single.name}; remove the one that is stale."
        )
    if index.is_file():
        return _read_shards(index)
    if single.is_file():
        return read_header(single)[0]
    raise GLMImageError(
        f"{folder} holds neither {single.name} nor {index.name}; "
        f"download the {kind.title}'s safetensors files into it."
    )


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise GLMImageError(f"{index} has no weight_map; download it again.")
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        shard = index.parent / name
        if Path(name).name != name:
            raise GLMImageError(f"{index} names a file outside its folder, {name}; get it again.")
        if not shard.is_file():
            raise GLMImageError(f"{shard} is missing, which {index.name} names; download it.")
        stored = read_header(shard)[0]
        twice = [key for key in stored if key in tensors]
        if twice:
            raise GLMImageError(
                f"{shard} holds weights that {tensors[twice[0]].file.name} holds too "
                f"({first_few(twice)}); download both shards again."
            )
        tensors.update(stored)
    misplaced = [
        key
        for key in dict.fromkeys((*weight_map, *tensors))
        if key not in tensors or tensors[key].file.name != weight_map.get(key)
    ]
    if misplaced:
        raise GLMImageError(
            f"{index} and its shards disagree about {len(misplaced)} weights "
            f"({first_few(misplaced)}); download the index and the shards again."
        )
    return tensors


# ---- single files ------------------------------------------------------------------------------


def _open_single_file(file: Path, component: str) -> Component:
    kind = COMPONENTS[component]
    tensors, metadata = read_header(file)
    if metadata.get("format") != FORMAT:
        raise GLMImageError(
            f"{file} is not a GLM-Image checkpoint: its metadata carries no GLM-Image config; "
            "use a hub snapshot's folder or a file that was saved with one."
        )
    stored = metadata.get("component", "")
    if stored != component:
        title = COMPONENTS[stored].title if stored in COMPONENTS else f"component '{stored}'"
        raise GLMImageError(f"{file} holds the {title}, not the {kind.title}; choose another file.")

    def parse(key: str) -> dict[str, Any]:
        return parse_json(_metadata(metadata, key, file), f"The {key} in the metadata of {file}")

    config = parse("config")
    _check_identity(config, kind, file)
    quantisation, quantised = _read_quantisation(file, component, tensors, metadata)
    return Component(
        name=component,
        path=file,
        config=config,
        tensors=_tie(tensors, kind),
        processor=(
            Processor(
                tokenizer=_metadata(metadata, "tokenizer", file),
                tokenizer_config=parse("tokenizer_config"),
                chat_template=metadata.get("chat_template"),
                generation_config=parse("generation_config"),
                image=_with_pixel_limits(parse("processor")),
            )
            if component == "ar"
            else None
        ),
        **({key: parse(key) for key in ("scheduler", "vae")} if component == "decoder" else {}),
        quantisation=quantisation,
        quantised=quantised,
    )


def _read_quantisation(
    file: Path, component: str, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[str | None, frozenset[str]]:
    """The format of a file's quantised layers, and their names."""
    saved = parse_json(metadata.get(QUANTISATION, "{}"), f"The {QUANTISATION} of {file}")
    layers = saved.get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise GLMImageError(f"The {QUANTISATION} of {file} is broken; convert the snapshot again.")
    unsaid = [
        key
        for key, info in tensors.items()
        if info.dtype in (torch.int8, torch.uint8) and layer_of(key) not in layers
    ]
    if unsaid:
        raise GLMImageError(
            f"{file} holds {len(unsaid)} quantised weights ({first_few(unsaid)}) and does not say "
            "in which format; convert the snapshot with `python -m glm_core.convert`."
        )
    if not layers:
        return None, frozenset()
    found = {str(layer.get("format")) for layer in layers.values()}
    if len(found) > 1 or not found <= FILE_FORMATS.keys() or component not in QUANTISABLE:
        raise GLMImageError(
            f"{file} holds the {COMPONENTS[component].title} quantised as "
            f"{' and '.join(sorted(found))}; what can be read is the AR model or the decoder in "
            f"one of {', '.join(FILE_FORMATS)}."
        )
    quantisation = FILE_FORMATS[found.pop()]
    stored = torch.uint8 if quantisation in FORMATS else torch.float8_e4m3fn
    broken = [
        layer
        for layer in layers
        if (info := tensors.get(f"{layer}.weight")) is None or info.dtype != stored
    ]
    if broken:
        raise GLMImageError(
            f"{file} says that {len(broken)} layers are {quantisation} ({first_few(broken)}), and "
            "they are missing or of another kind; convert the snapshot again."
        )
    return quantisation, frozenset(layers)


def _metadata(metadata: Mapping[str, str], key: str, file: Path) -> str:
    if key not in metadata:
        raise GLMImageError(f"{file} has no '{key}' in its metadata; save the file again with it.")
    return metadata[key]


# ---- files -------------------------------------------------------------------------------------


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


def _read_text(file: Path) -> str:
    if not file.is_file():
        raise GLMImageError(f"{file} is missing; copy it from the hub's {HUB_NAME}.")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GLMImageError(f"{file} cannot be read ({error}); download it again.") from error


def read_json(file: Path) -> dict[str, Any]:
    return parse_json(_read_text(file), str(file))


def parse_json(text: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise GLMImageError(f"{source} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise GLMImageError(f"{source} is not a JSON object; download it again.")
    return value


# ---- shared ------------------------------------------------------------------------------------


def layer_of(key: str) -> str:
    """The layer that a weight belongs to, or the scale beside it."""
    return key.removesuffix(f".{SCALE}").removesuffix(".weight")


def _check_identity(config: Mapping[str, Any], kind: ComponentKind, source: Path) -> None:
    key, value = kind.identity
    if config.get(key) != value:
        raise GLMImageError(
            f"{source} is not of GLM-Image's {kind.title}: "
            f"its {key} is {config.get(key)!r} and not {value!r}; choose a GLM-Image checkpoint."
        )


def _tie(tensors: dict[str, TensorInfo], kind: ComponentKind) -> dict[str, TensorInfo]:
    """Each tied weight once, under the network's name for it."""
    tied = dict(tensors)
    for alias, name in kind.tied:
        if alias in tied:
            tied.setdefault(name, tied.pop(alias))
    return tied


def _without(tensors: Mapping[str, TensorInfo], prefixes: tuple[str, ...]) -> dict[str, TensorInfo]:
    return {key: info for key, info in tensors.items() if not key.startswith(prefixes)}


def first_few(items: Iterable[str], count: int = 3) -> str:
    """The first few, with dots where there are more."""
    items = list(items)
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")
