"""Adds LoRAs to patchers. glm_core reads the file, ComfyUI computes with its tensors."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import comfy.lora
import torch
from torch import Size, nn

from ...glm_core.errors import LoraError, first_few
from ...glm_core.files.lora import lora_key_map, read_lora, require_match
from ...glm_core.files.lora_kinds import Change, changes_of
from ...glm_core.quant.linear import PackedLinear
from .patchers import with_segments

log = logging.getLogger(__name__)

NAMED = 50
"""How many tensors a warning names."""


def apply_lora(
    path: Path, decoder: Any | None, ar: Any | None, strength_decoder: float, strength_ar: float
) -> tuple[Any | None, Any | None]:
    """Clones of the decoder's and the AR's patcher with the LoRA added.

    A warning names the tensors that change neither. At strength 0 it returns the patchers
    themselves: any patch would quantise narrow weights again and make a reference cache invalid.

    Raises:
        GLMImageError: the file is broken, matches neither model, or has tensors of other sizes.
    """
    lora = read_lora(path)
    targets = [
        _Target(path, patcher, component, root, strength)
        for patcher, component, root, strength in (
            (decoder, "decoder", "diffusion_model.", strength_decoder),
            (ar, "ar", "", strength_ar),
        )
        if patcher is not None
    ]
    require_match(path, lora, *(target.names for target in targets))
    # Copied, as a trainer may write the file again, and a mapped file cut short ends the process.
    changes, unread = changes_of({key: value.clone() for key, value in lora.items()})
    for change in changes:
        added = [target.add(change) for target in targets]
        if not any(added):
            unread += change.keys
    if not any(target.rounds for target in targets):
        raise LoraError(
            f"{path} names layers of the connected models but holds no whole pair of matrices for "
            "any; save the LoRA again, or choose another file."
        )
    if unread:
        log.warning(
            "%s: %d of %d tensors are not applied, since the connected models have no such layer, "
            "or ComfyUI no such kind of LoRA: %s",
            path,
            len(unread),
            len(lora),
            first_few((key[:200] for key in unread), NAMED),
        )
    patched = {target.component: target.patched() for target in targets}
    return patched.get("decoder"), patched.get("ar")


class _Target:
    """A model and what a file changes in it."""

    def __init__(
        self, path: Path, patcher: Any, component: str, root: str, strength: float
    ) -> None:
        self.path = path
        self.patcher = patcher
        self.component = component
        self.strength = strength
        self.names = lora_key_map(patcher.model.state_dict(), component, root)
        self.rounds: list[dict[str, Any]] = []
        """The host's patches by key: two changes of one weight are in two rounds."""

    def add(self, change: Change) -> bool:
        """Whether the model has what is to be changed.

        Raises:
            GLMImageError: it has another size; ComfyUI would only log that, or fail.
        """
        weight = self.names.get(change.module)
        layer = weight and self._layer(weight.removesuffix(".weight"))
        shape = layer and _shape(layer, change.kind.target)
        if not shape:
            return False
        self._require_fit(change, weight, shape)
        for key, patch in _host_patches(change, weight).items():
            free = [patches for patches in self.rounds if key not in patches]
            if not free:
                self.rounds.append({})
            (free or self.rounds)[-1][key] = patch
        return True

    def patched(self) -> Any:
        if self.strength == 0 or not self.rounds:
            return self.patcher
        clone = self.patcher.clone()
        for patches in self.rounds:
            clone.add_patches(patches, self.strength)
        return clone

    def _layer(self, name: str) -> nn.Module:
        """The layer of that name, in whichever segment of a split model it is."""
        for part in with_segments(self.patcher):
            with suppress(AttributeError):
                return part.model.get_submodule(name)
        raise AttributeError(name)

    def _require_fit(self, change: Change, weight: str, shape: Size) -> None:
        if not change.fits(shape):
            sizes = [f"{name} {list(value.shape)}" for name, value in change.tensors.items()]
            raise LoraError(
                f"{self.path} has a {change.kind.name} of {', '.join(sizes)} for "
                f"{weight.removesuffix('weight')}{change.kind.target}, which is "
                f"{' x '.join(map(str, shape))}: it is a LoRA of another model; "
                "choose one of this model."
            )


def _shape(layer: nn.Module, target: str) -> Size | None:
    """The shape of a layer's weight or bias; None if it has no bias."""
    if isinstance(layer, PackedLinear) and target == "weight":
        return Size([layer.out_features, layer.in_features])
    value = getattr(layer, target, None)
    return None if value is None else value.shape


def _host_patches(change: Change, weight: str) -> dict[str, Any]:
    """ComfyUI's patch, by the key that it changes."""
    tensors = {f"{change.module}.{name}": value for name, value in change.tensors.items()}
    if change.kind.name == "BOFT":  # ComfyUI compares its limit with 0, and has no default
        tensors.setdefault(f"{change.module}.alpha", torch.tensor(0.0))
    return comfy.lora.load_lora(tensors, {change.module: weight}, log_missing=False)
