"""LoRAs on patchers: the file's names are glm_core's business, its tensors the host's."""

import logging
from pathlib import Path
from typing import Any

import comfy.lora

from ...glm_core.errors import GLMImageError
from ...glm_core.lora import lora_key_map, read_lora, require_match, unmatched_keys

log = logging.getLogger(__name__)


def apply_lora(
    path: Path, decoder: Any | None, ar: Any | None, strength_decoder: float, strength_ar: float
) -> tuple[Any | None, Any | None]:
    """Clones of the decoder's and the AR's patcher with the LoRA added; at strength 0 the patchers
    themselves, since any patch would quantise narrow weights anew and outdate a reference cache.

    Raises:
        GLMImageError: the file is broken, or holds nothing that belongs to either model.
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
            f"{path} names layers of the connected models and holds no whole pair of matrices for "
            "any; save the LoRA again, or take another file."
        )
    patched = [
        _add(patcher, found, strength)
        for (patcher, _, strength), found in zip(targets, patches, strict=True)
    ]
    return (
        patched.pop(0) if decoder is not None else None,
        patched.pop(0) if ar is not None else None,
    )


def _add(patcher: Any, patches: dict, strength: float) -> Any:
    if strength == 0:
        return patcher
    clone = patcher.clone()
    clone.add_patches(patches, strength)
    return clone
