"""Adds LoRAs to patchers. glm_core reads the file's names, ComfyUI its tensors."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import comfy.lora
from comfy.weight_adapter import LoRAAdapter

from ...glm_core.errors import GLMImageError
from ...glm_core.files.lora import lora_key_map, read_lora, require_match, unmatched_keys
from ...glm_core.quant.linear import PackedLinear
from .patchers import with_segments

log = logging.getLogger(__name__)


def apply_lora(
    path: Path, decoder: Any | None, ar: Any | None, strength_decoder: float, strength_ar: float
) -> tuple[Any | None, Any | None]:
    """Clones of the decoder's and the AR's patcher with the LoRA added.

    At strength 0 it returns the patchers themselves: any patch would quantise narrow weights again
    and make a reference cache invalid.

    Raises:
        GLMImageError: the file is broken, matches neither model, or has matrices of other sizes.
    """
    lora = read_lora(path)
    targets = [
        (patcher, lora_key_map(patcher.model.state_dict(), component, root), strength)
        for patcher, component, root, strength in (
            (decoder, "decoder", "diffusion_model.", strength_decoder),
            (ar, "ar", "", strength_ar),
        )
        if patcher is not None
    ]
    key_maps = [key_map for _, key_map, _ in targets]
    require_match(path, lora, *key_maps)
    unmatched = unmatched_keys(lora, *key_maps)
    if unmatched:
        log.warning("%s: %d keys match no model: %s", path, len(unmatched), unmatched[:3])

    patches = [comfy.lora.load_lora(dict(lora), names, log_missing=False) for names in key_maps]
    if not any(patches):
        raise GLMImageError(
            f"{path} names layers of the connected models but holds no whole pair of matrices for "
            "any; save the LoRA again, or choose another file."
        )
    for (patcher, _, _), found in zip(targets, patches, strict=True):
        _require_shapes(path, patcher, found)
    patched = [
        _add(patcher, found, strength)
        for (patcher, _, strength), found in zip(targets, patches, strict=True)
    ]
    return (
        patched.pop(0) if decoder is not None else None,
        patched.pop(0) if ar is not None else None,
    )


def _require_shapes(path: Path, patcher: Any, patches: dict[str, Any]) -> None:
    """Refuses matrices that do not fit their layer; ComfyUI would only log and skip them.

    Other kinds of adapters, and pairs with a third matrix or a shape, are left to ComfyUI.

    Raises:
        GLMImageError: names the first layer that does not fit.
    """
    for key, adapter in patches.items():
        if not isinstance(adapter, LoRAAdapter):
            continue
        up, down, _, mid, _, reshape = adapter.weights
        rows, columns = _matrix(patcher, key.removesuffix(".weight"))
        sizes = [*up.shape[:1], up.shape[1:].numel(), *down.shape[:1], down.shape[1:].numel()]
        fits = sizes == [rows, sizes[1], sizes[1], columns]
        if mid is None and reshape is None and not fits:
            raise GLMImageError(
                f"{path} has matrices {list(up.shape)} and {list(down.shape)} for {key}, which is "
                f"{rows} x {columns}: it is a LoRA of another model; choose one of this model."
            )


def _matrix(patcher: Any, name: str) -> tuple[int, int]:
    """Rows and columns of a layer's weight, in whichever segment of a split model it is."""
    for part in with_segments(patcher):
        with suppress(AttributeError):
            layer = part.model.get_submodule(name)
            if isinstance(layer, PackedLinear):
                return layer.out_features, layer.in_features
            return layer.weight.shape[0], layer.weight.shape[1:].numel()
    raise AttributeError(name)


def _add(patcher: Any, patches: dict, strength: float) -> Any:
    if strength == 0:
        return patcher
    clone = patcher.clone()
    clone.add_patches(patches, strength)
    return clone
