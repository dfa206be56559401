"""LoRA files: the names that trainers give our weights, and the alphas they save as metadata.

A host's LoRA code reads the tensors (`lora_A`, `lora_up`, LoKr, ...). It needs a map from a
module's name in the file to a weight of the model, and each alpha as a tensor `<module>.alpha`.
PEFT and diffusers save alpha as JSON instead.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import GLMImageError, first_few
from .headers import map_file, read_header
from .json_files import parse_json, read_json

# Prefixes of dotted module names: "" by a model's save_lora_adapter, "base_model.model." by PEFT.
DOTTED = {
    "decoder": ("", "transformer.", "diffusion_model.", "base_model.model."),
    "ar": ("", "vision_language_encoder.", "base_model.model."),
}
# Prefixes of module names with underscores for dots, as kohya and LyCORIS save them.
UNDERSCORED = {
    "decoder": ("lora_unet_", "lora_transformer_", "lycoris_"),
    "ar": ("lora_te_", "lycoris_"),
}
# PEFT leaves this root out of the names if it trained the AR's inner model alone.
OPTIONAL_ROOT = {"decoder": "", "ar": "model."}

# What follows a module's name, for each kind of tensor that ComfyUI's adapters read.
TENSOR_SUFFIX = re.compile(
    r"\.(?:lora_(?:A|B|up|down|mid)(?:\.weight)?"
    r"|lora\.(?:up|down)\.weight|lora_linear_layer\.(?:up|down)\.weight"
    r"|hada_\w+|lokr_\w+|oft_\w+|rescale|[ab][12]\.weight"
    r"|alpha|dora_scale|reshape_weight|diff|diff_b|set_weight|[wb]_norm)$"
)
ADAPTER_NAME = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")  # part of PEFT's in-memory names


def read_lora(path: Path | str) -> dict[str, Tensor]:
    """A LoRA file's tensors, memory-mapped, with every alpha as a tensor `<module>.alpha`.

    Alphas come from diffusers' `lora_adapter_metadata`, or from the `adapter_config.json` that
    PEFT saves beside `adapter_model.safetensors`. Without one, the host sets alpha to the rank.

    Raises:
        GLMImageError: the file is missing, truncated or no safetensors file, or its metadata is
            broken.
    """
    path = Path(path)
    if not path.is_file():
        raise GLMImageError(f"The LoRA {path} does not exist; choose another one.")
    metadata = read_header(path)[1]
    lora = {ADAPTER_NAME.sub(r".\1.weight", key): value for key, value in map_file(path).items()}
    config = {}
    if "lora_adapter_metadata" in metadata:
        source = f"The lora_adapter_metadata of {path}"
        config = parse_json(metadata["lora_adapter_metadata"], source)
    elif path.name == "adapter_model.safetensors":
        config = read_json(path.with_name("adapter_config.json"))
    return _alphas(lora, config) | lora


def lora_key_map(weights: Iterable[str], component: str, root: str = "") -> dict[str, str]:
    """Every name that a file may use for a module, mapped to the module's weight.

    Args:
        weights: keys of the model's state dict, as the host names them.
        component: "decoder" or "ar".
        root: what the host puts before the checkpoint's names, such as "diffusion_model.".
    """
    names = {}
    for weight in weights:
        if not weight.startswith(root) or not weight.endswith(".weight"):
            continue
        module = weight.removeprefix(root).removesuffix(".weight")
        for name in (module, module.removeprefix(OPTIONAL_ROOT[component])):
            flat = name.replace(".", "_")
            names.update({prefix + name: weight for prefix in DOTTED[component]})
            names.update({prefix + flat: weight for prefix in UNDERSCORED[component]})
    return names


def unmatched_keys(lora: Iterable[str], *key_maps: Mapping[str, str]) -> list[str]:
    """The keys of modules that no map names, and of tensors of a kind that no host reads."""

    def matches(key: str) -> bool:
        module, suffixes = TENSOR_SUFFIX.subn("", key)
        return suffixes == 1 and any(module in names for names in key_maps)

    return [key for key in lora if not matches(key)]


def require_match(path: Path | str, lora: Iterable[str], *key_maps: Mapping[str, str]) -> None:
    """Refuse a LoRA without a key of any of the models.

    Raises:
        GLMImageError: no key matches.
    """
    keys = list(lora)
    if len(unmatched_keys(keys, *key_maps)) == len(keys):
        raise GLMImageError(
            f"None of the {len(keys)} keys in {path} belongs to the connected models "
            f"({first_few(keys)}); choose a LoRA of GLM-Image and connect the model it is for."
        )


def _alphas(lora: Mapping[str, Tensor], adapter_config: Mapping[str, Any]) -> dict[str, Tensor]:
    """`<module>.alpha` of every LoRA pair for which the adapter's config has one.

    A host scales by alpha / rank. PEFT's `use_rslora` scales by alpha / sqrt(rank).
    """
    alphas = {}
    configs = _configs_by_model(adapter_config)
    for key, value in lora.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        for prefix, config in configs.items():
            if not module.startswith(prefix) or config.get("lora_alpha") is None:
                continue
            alpha = _alpha_of(module.removeprefix(prefix).removeprefix("base_model.model."), config)
            if config.get("use_rslora"):
                alpha *= math.sqrt(value.shape[0])
            alphas[f"{module}.alpha"] = torch.tensor(alpha)
    return alphas


def _configs_by_model(adapter_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields of an adapter's config by the model's prefix.

    diffusers' pipelines save `transformer.lora_alpha`, PEFT and single models `lora_alpha`.
    """
    configs: dict[str, dict[str, Any]] = {}
    for key, value in adapter_config.items():
        field = key.rpartition(".")[2]
        configs.setdefault(key.removesuffix(field), {})[field] = value
    return configs


def _alpha_of(module: str, config: Mapping[str, Any]) -> float:
    """The module's entry in `alpha_pattern`, else `lora_alpha`.

    A key of `alpha_pattern` is the end of a module's name, or `^` and the whole name. PEFT takes
    any regular expression; others are refused, as a hostile one could hang.
    """
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        name = pattern.replace(r"\.", ".").removesuffix("$")
        end = name.removeprefix("^")
        if not re.fullmatch(r"[\w.]+", end):
            raise GLMImageError(
                f"The LoRA's alpha_pattern holds the regular expression {pattern!r}; "
                "save the LoRA with plain module names there."
            )
        if module == end or (name == end and module.endswith(f".{end}")):
            return _number(alpha)
    return _number(config["lora_alpha"])


def _number(alpha: Any) -> float:
    try:
        return float(alpha)
    except (TypeError, ValueError):
        raise GLMImageError(
            f"The LoRA's lora_alpha {alpha!r} is no number; save the LoRA again."
        ) from None
