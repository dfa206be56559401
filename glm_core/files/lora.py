"""LoRA files: the names that trainers give our weights, and what they save as metadata.

A host's LoRA code reads tensors of a few names (`lora_A`, `lora_up`, LoKr, ...). It needs a map
from a module's name in the file to a weight of the model, and each alpha as a tensor
`<module>.alpha`. PEFT and diffusers save alpha as JSON, and name DoRA's magnitudes and biases their
own way.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoraError, first_few
from ..foreign import parse_json
from .adapter_config import AdapterConfigs
from .headers import map_file, read_header
from .json_files import read_json

# Prefixes of dotted module names: "" by a model's save_lora_adapter, "base_model.model." by PEFT,
# "pipe.dit." by DiffSynth.
DOTTED = {
    "decoder": ("", "transformer.", "diffusion_model.", "base_model.model.", "pipe.dit."),
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
    r"(?:\.lora_(?:A|B|up|down|mid)(?:\.weight)?"
    r"|[._]lora\.(?:up|down)\.weight|\.lora_linear_layer\.(?:up|down)\.weight"
    r"|\.(?:hada_\w+|lokr_\w+|oft_\w+|rescale|[ab][12]\.weight"
    r"|alpha|dora_scale|reshape_weight|diff|diff_b|set_weight|[wb]_norm))$"
)
# Names in a PEFT model's memory hold the adapter's name, as "default" does in DiffSynth's files.
ADAPTER_NAME = re.compile(
    r"\.(lora_[AB])\.[^.]+\.(weight|bias)$"
    r"|\.((?:hada|lokr|oft)_\w+|lora_embedding_[AB])\.[^.]+$"
)
MAGNITUDE = re.compile(r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$")
BIAS = ".lora_B.bias"

# Ends of the names of tensors whose rows are the rank.
BY_RANK = re.compile(r"\.(?:lora_A\.weight|hada_w1_b|lokr_w[12]_b)$")


def read_lora(path: Path | str) -> dict[str, Tensor]:
    """A LoRA file's tensors, memory-mapped, under names that a host reads.

    Every alpha is a tensor `<module>.alpha`; they come from diffusers' `lora_adapter_metadata`, or
    from the `adapter_config.json` that PEFT saves beside `adapter_model.safetensors`. Without one,
    the host sets alpha to the rank. DoRA's magnitudes are columns `<module>.dora_scale`, and the
    bias of a pair is `<module>.diff_b`.

    Raises:
        GLMImageError: the file is missing, truncated or no safetensors file, or its metadata is
            broken.
    """
    path = Path(path)
    if not path.is_file():
        raise LoraError(f"The LoRA {path} does not exist; choose another one.")
    metadata = read_header(path)[1]
    lora = _with_host_names(path, map_file(path))
    config = {}
    if "lora_adapter_metadata" in metadata:
        source = f"The lora_adapter_metadata of {path}"
        config = parse_json(metadata["lora_adapter_metadata"], source)
    elif path.name == "adapter_model.safetensors":
        config = read_json(path.with_name("adapter_config.json"))
    return _with_biases(_with_alphas(lora, AdapterConfigs(config)))


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
        raise LoraError(
            f"None of the {len(keys)} keys in {path} belongs to the connected models "
            f"({first_few(key[:200] for key in keys)}); choose a LoRA of GLM-Image and connect the "
            "model it is for."
        )


def _with_host_names(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors under the names and in the shapes that a host reads.

    Raises:
        GLMImageError: two tensors get one name, as those of two adapters do.
    """
    lora: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = ADAPTER_NAME.sub(_without_adapter, key)
        if MAGNITUDE.search(name):
            name = MAGNITUDE.sub(".dora_scale", name)
            value = value.reshape(-1, *[1] * max(1, value.ndim - 1))
        elif name.endswith(".dora_scale") and value.ndim == 1:
            value = value[:, None]
        elif name.endswith((".lora_embedding_A", ".lora_embedding_B")) and value.ndim == 2:
            # An embedding's matrix is (entries, width), and PEFT's pair makes its transpose.
            up = name.endswith("A")
            name = f"{name[:-17]}.lora_{'B' if up else 'A'}.weight"
            value = value.T
        if name in lora:
            raise LoraError(
                f"{path} holds {name[:200]} twice, under two names, as a file of several adapters "
                "does; save one adapter."
            )
        lora[name] = value
    return lora


def _without_adapter(match: re.Match[str]) -> str:
    pair, ending, other = match.groups()
    return f".{other}" if other else f".{pair}.{ending}"


def _with_alphas(lora: Mapping[str, Tensor], configs: AdapterConfigs) -> dict[str, Tensor]:
    """The tensors and `<module>.alpha` of every module that the adapter's config scales.

    A host scales by alpha / rank, except a LoKr of two whole matrices. PEFT scales that too: its
    first matrix is multiplied here.
    """
    found: dict[str, Tensor] = {}
    scaled: dict[str, Tensor] = {}
    for key, value in lora.items():
        module = BY_RANK.sub("", key)
        if module != key and value.ndim:
            alpha = configs.alpha(module, value.shape[0])
            if alpha is not None:
                found[f"{module}.alpha"] = torch.tensor(alpha)
        module = key.removesuffix(".lokr_w1")
        if module != key and f"{module}.lokr_w2" in lora:
            scaled[key] = value * configs.scale(module)
    return found | dict(lora) | scaled


def _with_biases(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with each pair's bias, which PEFT scales as its product, as `diff_b`."""
    result = dict(lora)
    for key in lora:
        down = key.removesuffix(BIAS) + ".lora_A.weight"
        if not key.endswith(BIAS) or down not in lora or lora[down].ndim == 0:
            continue
        module = key.removesuffix(BIAS)
        alpha = lora.get(f"{module}.alpha")
        scale = 1.0 if alpha is None else alpha.float() / lora[down].shape[0]
        result[f"{module}.diff_b"] = result.pop(key) * scale
    return result
