"""Opening a component: everything that can be wrong is said before a weight is read.

A component is read from a hub snapshot (a folder with one subfolder per component, each sharded
or one file) or from a single safetensors file whose metadata carries the configs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import GLMImageError, first_few
from ..quant.packing import FORMATS
from .component import (
    COMPONENTS,
    FILE_FORMATS,
    FORMAT,
    HUB_NAME,
    QUANTISABLE,
    QUANTISATION,
    Component,
    ComponentKind,
    Processor,
    layer_of,
)
from .headers import TensorInfo, parse_json, read_header, read_json, read_text


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
        chat_template = read_text(template)
    # The hub has preprocessor_config.json; newer libraries save processor_config.json instead.
    image = {}
    if (folder / "processor_config.json").is_file():
        image = read_json(folder / "processor_config.json").get("image_processor", {})
    return Processor(
        tokenizer=read_text(folder / "tokenizer.json"),
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


# ---- both ---------------------------------------------------------------------------------------


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
