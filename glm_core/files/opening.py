"""Opening a component: headers and configs are read and checked, and no weight is read.

A component is read from a hub snapshot (a folder with one subfolder per component, each sharded
or one file) or from a single safetensors file that carries the configs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, FileError, WeightsError, first_few, quoted, shown
from ..foreign import parse_json, wall
from ..schema import OBJECT, TEXT, Kind, optional, read
from ..vae import VAEConfig
from .component import COMPONENTS, Component, ComponentKind, Processor
from .headers import TensorInfo, read_header
from .json_files import is_file, read_json, read_text
from .quantisation import read_quantisation
from .saved import Part, read_parts

HUB_NAME = "zai-org/GLM-Image"


def open_component(path: Path | str, component: str) -> Component:
    """Read the headers and configs of a component.

    Args:
        path: a hub snapshot's folder, or one safetensors file that carries its config.
        component: a key of `COMPONENTS`.

    Raises:
        GLMImageError: anything is missing, broken or of another model.
    """
    path = Path(path)
    with wall(f"{path} cannot be read"):
        if path.is_dir():
            return _open_snapshot(path, component)
        if path.is_file():
            return _open_single_file(path, component)
    raise FileError(
        f"{path} does not exist; put the {COMPONENTS[component].title} there, or choose another."
    )


# ---- hub snapshots -----------------------------------------------------------------------------


def _open_snapshot(snapshot: Path, component: str) -> Component:
    kind = COMPONENTS[component]
    folder = snapshot / kind.folder
    if not folder.is_dir():
        raise FileError(
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
    """The configs that the decoder needs beside its own: the scheduler's and the VAE's."""
    return {
        "scheduler": read_json(snapshot / "scheduler" / "scheduler_config.json"),
        "vae": _of_vae(read_json(snapshot / COMPONENTS["vae"].folder / "config.json")),
    }


def _of_vae(config: dict[str, Any]) -> dict[str, Any]:
    """The config, which is checked here, as the decoder needs only some of its values."""
    VAEConfig.from_dict(config)
    return config


def _read_processor(snapshot: Path, weights: Path) -> Processor:
    folder = snapshot / "processor"
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    generation = weights / "generation_config.json"
    template = folder / "chat_template.jinja"
    if is_file(template):
        chat_template = read_text(template)
    else:
        chat_template = _value(tokenizer_config, "chat_template", TEXT, "tokenizer_config.json")
    # The hub has preprocessor_config.json; newer libraries save processor_config.json instead.
    image = None
    if is_file(folder / "processor_config.json"):
        saved = read_json(folder / "processor_config.json")
        image = _value(saved, "image_processor", OBJECT, "processor_config.json")
    return Processor(
        tokenizer=read_text(folder / "tokenizer.json"),
        tokenizer_config=tokenizer_config,
        chat_template=chat_template,
        generation_config=read_json(generation) if is_file(generation) else {},
        image=_with_pixel_limits(image or read_json(folder / "preprocessor_config.json")),
    )


def _value(config: Mapping[str, Any], key: str, kind: Kind, source: str) -> Any:
    """An optional value of a file in the processor folder."""
    advice = "download the processor folder again"
    return read(config, {key: optional(kind)}, source, advice)[key]


def _with_pixel_limits(image: dict[str, Any]) -> dict[str, Any]:
    """The config with `min_pixels` and `max_pixels`, as the hub's has them.

    Newer libraries save the same pixel counts as `size.shortest_edge` and `size.longest_edge`.
    """
    size = _value(image, "size", OBJECT, "The processor's image config") or {}
    if "shortest_edge" in size and "longest_edge" in size:
        low, high = size["shortest_edge"], size["longest_edge"]
    else:
        low, high = image.get("min_pixels"), image.get("max_pixels")
    if low is None or high is None:
        raise CheckpointError(
            "The processor's image config has neither min_pixels and max_pixels nor a size with "
            "shortest_edge and longest_edge; download the processor folder again."
        )
    return {**image, "min_pixels": low, "max_pixels": high}


def _read_weights(folder: Path, kind: ComponentKind) -> dict[str, TensorInfo]:
    index = folder / f"{kind.stem}.safetensors.index.json"
    single = folder / f"{kind.stem}.safetensors"
    if is_file(index) and is_file(single):
        raise FileError(
            f"{folder} holds both {index.name} and {single.name}; remove the one that is stale."
        )
    if is_file(index):
        return _read_shards(index)
    if is_file(single):
        return read_header(single)[0]
    raise FileError(
        f"{folder} holds neither {single.name} nor {index.name}; "
        f"download the {kind.title}'s safetensors files into it."
    )


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{index} has no weight_map; download it again.")
    tensors: dict[str, TensorInfo] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise FileError(
                f"{index} gives {quoted(name)} as the file of {shown(key)}; download it again."
            )
    for name in sorted(set(weight_map.values())):
        stored = _read_shard(index, name)
        twice = [key for key in stored if key in tensors]
        if twice:
            raise FileError(
                f"{index.parent / name} holds weights that {tensors[twice[0]].file.name} holds too "
                f"({first_few(twice)}); download both shards again."
            )
        tensors.update(stored)
    misplaced = [
        key
        for key in dict.fromkeys((*weight_map, *tensors))
        if key not in tensors or tensors[key].file.name != weight_map.get(key)
    ]
    if misplaced:
        raise FileError(
            f"{index} and its shards disagree about {len(misplaced)} weights "
            f"({first_few(misplaced)}); download the index and the shards again."
        )
    return tensors


def _read_shard(index: Path, name: str) -> dict[str, TensorInfo]:
    shard = index.parent / name
    if Path(name).name != name:
        raise FileError(
            f"{index} names a file outside its folder, {quoted(name)}; download it again."
        )
    if not is_file(shard):
        raise FileError(f"{shown(str(shard))} is missing, which {index.name} names; download it.")
    return read_header(shard)[0]


# ---- single files ------------------------------------------------------------------------------


def _open_single_file(file: Path, component: str) -> Component:
    kind = COMPONENTS[component]
    parts = read_parts(file)
    _check_component(file, parts, component)
    tensors, metadata = parts[component]
    config = _parsed(metadata, "config", file)
    _check_identity(config, kind, file)
    quantisation, quantised = read_quantisation(file, tensors, metadata)
    if quantisation is not None and not kind.quantisable:
        raise WeightsError(
            f"{file} holds the {kind.title} in {quantisation}, which only the AR model and the "
            "decoder may have; convert the snapshot again."
        )
    companions = {}
    if component == "decoder":
        companions = {
            "scheduler": _parsed(metadata, "scheduler", file),
            "vae": _of_vae(_parsed(metadata, "vae", file)),
        }
    return Component(
        name=component,
        path=file,
        config=config,
        tensors=_tie(tensors, kind),
        processor=_parse_processor(metadata, file) if component == "ar" else None,
        **companions,
        quantisation=quantisation,
        quantised=quantised,
    )


def _check_component(file: Path, parts: Mapping[str, Part], component: str) -> None:
    if not parts:
        raise CheckpointError(
            f"{file} is not a GLM-Image checkpoint: it carries no GLM-Image config; "
            "use a hub snapshot's folder or a file that was saved with one."
        )
    if component not in parts:
        others = " and ".join(map(_title, parts))
        raise CheckpointError(
            f"{file} holds {others}, not {_title(component)}; choose another file."
        )


def _title(component: str) -> str:
    kind = COMPONENTS.get(component)
    return f"the {kind.title}" if kind else f"the component '{component:.200}'"


def _parse_processor(metadata: Mapping[str, str], file: Path) -> Processor:
    return Processor(
        tokenizer=_require(metadata, "tokenizer", file),
        tokenizer_config=_parsed(metadata, "tokenizer_config", file),
        chat_template=metadata.get("chat_template"),
        generation_config=_parsed(metadata, "generation_config", file),
        image=_with_pixel_limits(_parsed(metadata, "processor", file)),
    )


def _parsed(metadata: Mapping[str, str], key: str, file: Path) -> dict[str, Any]:
    return parse_json(_require(metadata, key, file), f"The {key} in the metadata of {file}")


def _require(metadata: Mapping[str, str], key: str, file: Path) -> str:
    if key not in metadata:
        raise FileError(f"{file} has no '{key}' in its metadata; save the file again with it.")
    return metadata[key]


# ---- both ---------------------------------------------------------------------------------------


def _check_identity(config: Mapping[str, Any], kind: ComponentKind, source: Path) -> None:
    key, value = kind.identity
    if config.get(key) != value:
        raise CheckpointError(
            f"{source} does not belong to GLM-Image's {kind.title}: "
            f"its {key} is {quoted(config.get(key))} and not {value!r}; choose a GLM-Image "
            "checkpoint."
        )


def _tie(tensors: dict[str, TensorInfo], kind: ComponentKind) -> dict[str, TensorInfo]:
    """Each tied weight once, under the network's name for it."""
    tied = dict(tensors)
    for alias, name in kind.tied:
        if alias in tied:
            tied.setdefault(name, tied.pop(alias))
    return tied
