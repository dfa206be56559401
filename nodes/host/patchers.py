"""ComfyUI's patchers for our networks: dynamic, limited, or one for each range of a split one."""

from collections.abc import Iterable, Sequence
from typing import Any

import comfy.hooks
import comfy.model_patcher
import torch
from torch import Tensor, nn

from ...glm_core.errors import GLMImageError
from ...glm_core.quant.linear import lay_out
from ...glm_core.split import LayerSegment
from .devices import Placement
from .quant import is_packed

ModelPatcher = comfy.model_patcher.ModelPatcher
SEGMENTS = "glm_segments"
LIMIT = "glm_limit"
ON_PARTIAL_UNLOAD = "glm_on_partial_unload"
"""A kind of callback beside the host's own, called with the patcher before weights are moved."""


def make_patcher(
    model: nn.Module,
    placement: Placement,
    disable_dynamic: bool = False,
    segments: Sequence[LayerSegment] = (),
) -> ModelPatcher:
    """ComfyUI's patcher; its dynamic one (hosts since 0.4) where that is on and allowed.

    Args:
        segments: layers that lie apart from the model, as `placement.segments` has them.
    """
    where = {"load_device": placement.load, "offload_device": placement.offload}
    if segments:
        patcher = SplitPatcher(model, **where, size=nbytes(model))
        parts = [
            make_patcher(part, there, disable_dynamic=True)
            for part, (_, there) in zip(segments, placement.segments, strict=True)
        ]
        patcher.set_additional_models(SEGMENTS, parts)
    elif placement.limit is not None:
        patcher = LimitedPatcher(model, **where)
    else:
        return _kind(model, disable_dynamic)(model, **where)
    patcher.set_attachments(LIMIT, placement.limit)
    return patcher


def _kind(model: nn.Module, disable_dynamic: bool) -> type[ModelPatcher]:
    if is_packed(model):
        return PackedPatcher
    chosen = getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
    return NotifyingPatcher if disable_dynamic or chosen is ModelPatcher else chosen


def nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


class NotifyingPatcher(ModelPatcher):
    """What is kept beside the weights may be larger than the part that the host takes away."""

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        for callback in self.get_all_callbacks(ON_PARTIAL_UNLOAD):
            callback(self)
        return super().partially_unload(*args, **kwargs)


class PackedPatcher(NotifyingPatcher):
    """Lays out packed weights for the device before it loads any; hosts' dynamic patchers, which
    know no `set_weight`, do not serve them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The other mode keeps patched matrices and copies them over the packed bytes.
        self.hook_mode = comfy.hooks.EnumHookMode.MinVram

    def load(self, device_to: torch.device | None = None, *args: Any, **kwargs: Any) -> None:
        lay_out(self.model, self.load_device)
        super().load(device_to, *args, **kwargs)


class LimitedPatcher(PackedPatcher):
    """Leaves the weights beyond a limit in host memory, even where there is room for them."""

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> Any:
        limit = self.get_attachment(LIMIT)
        if limit is not None:
            extra_memory = min(extra_memory, limit - self.loaded_size())
        return super().partially_load(device_to, extra_memory, force_patch_weights)


class SplitPatcher(LimitedPatcher):
    """Of a network some of whose layers lie apart, in patchers of their own.

    Those are additional models, which the host loads, frees and clones with this one. Patches go
    to whoever has the weight.
    """

    @property
    def segments(self) -> list[ModelPatcher]:
        return self.get_additional_models_with_key(SEGMENTS)

    def add_patches(
        self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list:
        own, added = dict(patches), []
        for part in self.segments:
            keys = part.model.state_dict().keys()
            theirs = {key: own.pop(key) for key in list(own) if _weight(key) in keys}
            added += part.add_patches(theirs, strength_patch, strength_model)
        return added + super().add_patches(own, strength_patch, strength_model)

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, Any]:
        """Of this patcher's own weights, for the model's lists all."""
        theirs = {key for part in self.segments for key in part.model.state_dict()}
        state = super().model_state_dict(filter_prefix)
        return {key: value for key, value in state.items() if key not in theirs}

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list]:
        patches = super().get_key_patches(filter_prefix)
        for part in self.segments:
            patches |= part.get_key_patches(filter_prefix)
        return patches

    def add_hook_patches(self, *_: Any, **__: Any) -> list:
        raise GLMImageError(
            "LoRA hooks cannot change a model that a device plan has split; "
            "load the LoRA into the MODEL instead, or plan it onto one device."
        )

    def set_injections(self, *_: Any, **__: Any) -> None:
        raise GLMImageError(
            "What is injected into layers, such as a LoRA that bypasses weights, does not reach "
            "those of a model that a device plan has split; load the LoRA into the weights "
            "instead, or plan the model onto one device."
        )

    def deepclone_multigpu(self, *_: Any, **__: Any) -> ModelPatcher:
        raise GLMImageError(
            "This model is split over devices by a device plan and cannot be copied to another "
            "one as well; remove MultiGPU CFG Split or Select Device, or the split."
        )


def _weight(key: Any) -> str:
    """A patch's key is a weight's name, or a tuple that begins with it."""
    return key if isinstance(key, str) else key[0]


def with_segments(patcher: ModelPatcher) -> list[ModelPatcher]:
    """A patcher and those of its segments, which have to be loaded together."""
    return [patcher, *patcher.get_additional_models_with_key(SEGMENTS)]


def layer_devices(patcher: ModelPatcher, total: int) -> list[tuple[range, torch.device]]:
    """Which of a model's layers compute where: first its own, then its segments'."""
    parts = patcher.get_additional_models_with_key(SEGMENTS)
    own = parts[0].model.numbers.start if parts else total
    return [
        (range(own), patcher.load_device),
        *((part.model.numbers, part.load_device) for part in parts),
    ]


def all_patches(patcher: ModelPatcher) -> dict[str, list]:
    """Of a model, its segments included: a copy."""
    return {
        key: list(entries)
        for part in with_segments(patcher)
        for key, entries in part.patches.items()
    }


def same_patches(ours: dict[str, list], theirs: dict[str, list]) -> bool:
    """Whether two patchers' weights are changed alike; a LoRA loaded again counts as the same."""
    return ours.keys() == theirs.keys() and all(
        len(ours[key]) == len(theirs[key]) and all(map(_same_patch, ours[key], theirs[key]))
        for key in ours
    )


def _same_patch(ours: tuple, theirs: tuple) -> bool:
    (strength, patch, weight_strength, *_), (other_strength, other, other_weight, *_) = ours, theirs
    if (strength, weight_strength) != (other_strength, other_weight):
        return False
    return patch is other or (
        type(patch) is type(other) and _same_value(_parts(patch), _parts(other))
    )


def _parts(patch: Any) -> Any:
    """What an adapter of the host is made of; other patches are plain values."""
    return getattr(patch, "weights", patch)


def _same_value(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours.shape == theirs.shape and torch.equal(ours, theirs.to(ours.device))
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        return len(ours) == len(theirs) and all(map(_same_value, ours, theirs))
    return bool(ours == theirs)


class ListsSegments:
    """A patcher's model whose state dict lists the layers that lie apart: what reads names from
    it, such as a LoRA loader, finds them all."""

    segments: Iterable[LayerSegment] = ()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        for part in self.segments:
            state.update(part.state_dict(**kwargs))
        return state


def require_layers(placement: Placement, total: int, what: str) -> None:
    """
    Raises:
        GLMImageError: the plan splits a model of another number of layers.
    """
    if placement.segments and placement.segments[-1][0].stop != total:
        raise GLMImageError(
            f"The device plan splits {placement.segments[-1][0].stop} layers and this {what} has "
            f"{total}; choose the same model in GLM-Image Device Plan."
        )
