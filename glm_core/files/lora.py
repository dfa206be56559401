"""LoRA files: the names that trainers give our weights, and the scales they leave in metadata.

A host's LoRA code knows the forms of the tensors (`lora_A`, `lora_up`, LoKr, ...) and wants two
things: a map from a module's name in the file to a weight of the model, and each alpha as a tensor
`<module>.alpha`. PEFT and diffusers keep alpha in JSON instead.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import GLMImageError, first_few
from .headers import map_file, parse_json, read_header, read_json

# Before a dotted module name. "" is a model's own save_lora_adapter, "base_model.model." PEFT's.
DOTTED = {
    "decoder": ("", "transformer.", "diffusion_model.", "base_model.model."),
    "ar": ("", "vision_language_encoder.", "base_model.model."),
}
# Before a module name whose dots have become underscores: kohya's and LyCORIS's files.
UNDERSCORED = {
    "decoder": ("lora_unet_", "lora_transformer_", "lycoris_"),
    "ar": ("lora_te_", "lycoris_"),
}
# PEFT on the AR's inner model leaves out the name under which the whole model holds it.
OPTIONAL_ROOT = {"decoder": "", "ar": "model."}

# What follows a module's name, in the forms that the host's adapters read.
FORMS = re.compile(
    r"\.(?:lora_(?:A|B|up|down|mid)(?:\.weight)?"
    r"|lora\.(?:up|down)\.weight|lora_linear_layer\.(?:up|down)\.weight"
    r"|hada_\w+|lokr_\w+|oft_\w+|rescale|[ab][12]\.weight"
    r"|alpha|dora_scale|reshape_weight|diff|diff_b|set_weight|[wb]_norm)$"
)
ADAPTER_NAME = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")  # PEFT's in-memory names, saved as is


def read_lora(path: Path | str) -> dict[str, Tensor]:
    """A LoRA file's tensors, memory-mapped, with every alpha as a tensor `<module>.alpha`.

    Alphas in metadata are diffusers' `lora_adapter_metadata`, or the `adapter_config.json` that
    PEFT saves beside `adapter_model.safetensors`. Without any, the host takes alpha as the rank.

    Raises:
        GLMImageError: the file is missing, truncated, no safetensors file, or its metadata broken.
    """
    path = Path(path)
    if not path.is_file():
        raise GLMImageError(f"The LoRA {path} does not exist; choose another one.")
    _tensors, metadata = read_header(path)
    lora = {ADAPTER_NAME.sub(r".\1.weight", key): value for key, value in map_file(path).items()}
    saved = {}
    if "lora_adapter_metadata" in metadata:
        source = f"The lora_adapter_metadata of {path}"
        saved = parse_json(metadata["lora_adapter_metadata"], source)
    elif path.name == "adapter_model.safetensors":
        saved = read_json(path.with_name("adapter_config.json"))
    return _alphas(lora, saved) | lora


def lora_key_map(weights: Iterable[str], component: str, root: str = "") -> dict[str, str]:
    """Every name that a file may have for a module, mapped to the module's weight.

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
    """The file's keys that belong to no module of any map, or have a form that no host reads."""

    def matches(key: str) -> bool:
        module, forms = FORMS.subn("", key)
        return forms == 1 and any(module in names for names in key_maps)

    return [key for key in lora if not matches(key)]


def require_match(path: Path | str, lora: Iterable[str], *key_maps: Mapping[str, str]) -> None:
    """Refuse a LoRA of which no key belongs to any of the models.

    Raises:
        GLMImageError: nothing matches.
    """
    keys = list(lora)
    if len(unmatched_keys(keys, *key_maps)) == len(keys):
        raise GLMImageError(
            f"None of the {len(keys)} keys in {path} belongs to the connected models "
            f"({first_few(keys)}); choose a LoRA of GLM-Image and connect the model it is for."
        )


def _alphas(lora: Mapping[str, Tensor], saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """`<module>.alpha` of every LoRA pair for which PEFT's saved config has one.

    A host scales by alpha / rank. PEFT's `use_rslora` scales by alpha / sqrt(rank).
    """
    alphas = {}
    configs = _configs_by_model(saved)
    for key, value in lora.items():
        module, is_down = re.subn(r"\.lora_A\.weight$", "", key)
        for model, config in configs.items() if is_down else ():
            if not module.startswith(model) or config.get("lora_alpha") is None:
                continue
            alpha = _alpha_of(module.removeprefix(model).removeprefix("base_model.model."), config)
            if config.get("use_rslora"):
                alpha *= math.sqrt(value.shape[0])
            alphas[f"{module}.alpha"] = torch.tensor(alpha)
    return alphas


def _configs_by_model(saved: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """diffusers' pipelines save `transformer.lora_alpha`, PEFT and single models `lora_alpha`."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in saved.items():
        field = key.rpartition(".")[2]
        configs.setdefault(key.removesuffix(field), {})[field] = value
    return configs


def _alpha_of(module: str, config: Mapping[str, Any]) -> float:
    """The module's entry in `alpha_pattern`, else `lora_alpha`.

    Keys there are module names or the ends of some, `^` before a whole name. PEFT would take any
    regular expression; what is none of the above is refused, for it may hang on purpose.
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
