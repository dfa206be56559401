"""ComfyUI's patchers for our networks, whole, limited or split, and a comparison of patches."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import comfy.hooks
import comfy.model_patcher
import torch
from torch import Tensor, nn

from ...glm_core.errors import DeviceError, LoraError, UnsupportedError
from ...glm_core.quant.linear import lay_out
from ...glm_core.split import LayerSegment
from .devices import Placement
from .quant import is_packed

ModelPatcher = comfy.model_patcher.ModelPatcher
SEGMENTS = "glm_segments"
LIMIT = "glm_limit"
ON_PARTIAL_UNLOAD = "glm_on_partial_unload"
"""Our own kind of callback; it is called with the patcher before weights are unloaded."""


def make_patcher(
    model: nn.Module,
    placement: Placement,
    disable_dynamic: bool = False,
    segments: Sequence[LayerSegment] = (),
) -> ModelPatcher:
    """ComfyUI's patcher; its dynamic one (hosts since 0.4) if that is enabled and allowed.

    Args:
        segments: the model's segments, one for each of `placement.segments`.
    """
    devices = {"load_device": placement.load, "offload_device": placement.offload}
    if segments:
        patcher = SplitPatcher(model, **devices, size=nbytes(model))
        parts = [
            make_patcher(segment, own_placement, disable_dynamic=True)
            for segment, (_, own_placement) in zip(segments, placement.segments, strict=True)
        ]
        patcher.set_additional_models(SEGMENTS, parts)
    elif placement.limit is not None:
        patcher = LimitedPatcher(model, **devices)
    else:
        return _patcher_class(model, disable_dynamic)(model, **devices)
    patcher.set_attachments(LIMIT, placement.limit)
    return patcher


def _patcher_class(model: nn.Module, disable_dynamic: bool) -> type[ModelPatcher]:
    if is_packed(model):
        return PackedPatcher
    host_class = getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
    if disable_dynamic or host_class is ModelPatcher:
        return NotifyingPatcher
    return _refusing(host_class)


@cache
def _refusing(patcher_class: type[ModelPatcher]) -> type[ModelPatcher]:
    return type(f"GLMImage{patcher_class.__name__}", (RefusesEmptyLoras, patcher_class), {})


def nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


class RefusesEmptyLoras:
    """A mixin that tells of a LoRA of which nothing fits; ComfyUI's loaders go on without it."""

    def add_patches(self, patches: dict, *args: Any, **kwargs: Any) -> list:
        if not patches:
            raise LoraError(
                "ComfyUI's LoRA loader knows none of the names in this file for GLM-Image; "
                "use GLM-Image Load LoRA, which also reads other trainers' names."
            )
        return super().add_patches(patches, *args, **kwargs)


class NotifyingPatcher(RefusesEmptyLoras, ModelPatcher):
    """Calls back before the host unloads some weights, so that buffers beside them are freed."""

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        for callback in self.get_all_callbacks(ON_PARTIAL_UNLOAD):
            callback(self)
        return super().partially_unload(*args, **kwargs)


class PackedPatcher(NotifyingPatcher):
    """Lays out packed weights for the device before it loads them.

    Dynamic patchers never call `set_weight`, so packed weights need this one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The other mode caches patched matrices and copies them over the packed bytes.
        self.hook_mode = comfy.hooks.EnumHookMode.MinVram

    def add_weight_wrapper(self, name: str, function: Any) -> None:
        """Refuses training on packed bytes; its nodes would train them as if they were a bias."""
        if is_packed(self.model):
            raise LoraError(
                "A LoRA cannot be trained on int8 or int4 weights; load the decoder with "
                "weight_dtype default or fp8_e4m3fn from a snapshot."
            )
        super().add_weight_wrapper(name, function)

    def load(self, device_to: torch.device | None = None, *args: Any, **kwargs: Any) -> None:
        lay_out(self.model, self.load_device)
        super().load(device_to, *args, **kwargs)


class LimitedPatcher(PackedPatcher):
    """Leaves weights beyond a limit in host memory even if there is room for them."""

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> Any:
        limit = self.get_attachment(LIMIT)
        if limit is not None:
            extra_memory = min(extra_memory, limit - self.loaded_size())
        return super().partially_load(device_to, extra_memory, force_patch_weights)


class SplitPatcher(LimitedPatcher):
    """The patcher of a split network; each segment has a patcher of its own.

    Those are additional models, which the host loads, frees and clones with this one. A patch goes
    to the patcher that has the weight.
    """

    @property
    def segments(self) -> list[ModelPatcher]:
        return self.get_additional_models_with_key(SEGMENTS)

    def add_patches(
        self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list:
        own, added = dict(patches), []
        for segment in self.segments:
            keys = segment.model.state_dict().keys()
            theirs = {key: own.pop(key) for key in list(own) if _weight(key) in keys}
            if theirs:
                added += segment.add_patches(theirs, strength_patch, strength_model)
        if own or not patches:
            return added + super().add_patches(own, strength_patch, strength_model)
        # All are the segments'; the host still has to see that the model has changed.
        return added + ModelPatcher.add_patches(self, own, strength_patch, strength_model)

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, Any]:
        """The state dict without the segments' weights, which the model's own lists too."""
        theirs = {key for segment in self.segments for key in segment.model.state_dict()}
        state = super().model_state_dict(filter_prefix)
        return {key: value for key, value in state.items() if key not in theirs}

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list]:
        patches = super().get_key_patches(filter_prefix)
        for segment in self.segments:
            patches |= segment.get_key_patches(filter_prefix)
        return patches

    def add_hook_patches(self, *_: Any, **__: Any) -> list:
        raise LoraError(
            "LoRA hooks cannot change a model that a device plan has split; "
            "load the LoRA into the MODEL instead, or plan it onto one device."
        )

    def add_weight_wrapper(self, *_: Any, **__: Any) -> None:
        raise LoraError(
            "A LoRA cannot be trained on a model that a device plan has split, since the node sees "
            "only its first layers; plan the model onto one device."
        )

    def set_injections(self, *_: Any, **__: Any) -> None:
        raise LoraError(
            "Injections into layers, such as a LoRA that bypasses weights, do not reach all layers "
            "of a model that a device plan has split; load the LoRA into the weights instead, or "
            "plan the model onto one device."
        )

    def deepclone_multigpu(self, *_: Any, **__: Any) -> ModelPatcher:
        raise UnsupportedError(
            "This model is split over devices by a device plan and cannot be copied to another "
            "one as well; remove MultiGPU CFG Split or Select Device, or the split."
        )


def _weight(key: Any) -> str:
    """The weight's name in a patch's key, which is the name or a tuple that begins with it."""
    return key if isinstance(key, str) else key[0]


def with_segments(patcher: ModelPatcher) -> list[ModelPatcher]:
    """A patcher and those of its segments; all have to be loaded together."""
    return [patcher, *patcher.get_additional_models_with_key(SEGMENTS)]


def layer_devices(patcher: ModelPatcher, total: int) -> list[tuple[range, torch.device]]:
    """The numbers and devices of a model's layers: first its own, then its segments'."""
    segments = patcher.get_additional_models_with_key(SEGMENTS)
    own = segments[0].model.numbers.start if segments else total
    return [
        (range(own), patcher.load_device),
        *((segment.model.numbers, segment.load_device) for segment in segments),
    ]


def all_patches(patcher: ModelPatcher) -> dict[str, list]:
    """A copy of the patches of a model, its segments included."""
    return {
        key: list(entries)
        for part in with_segments(patcher)
        for key, entries in part.patches.items()
    }


def same_patches(ours: dict[str, list], theirs: dict[str, list]) -> bool:
    """Whether patches of two patchers are equal; a LoRA loaded again counts as the same."""
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
    """The values in an adapter of the host; other patches are values themselves."""
    return getattr(patch, "weights", patch)


def _same_value(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours.shape == theirs.shape and torch.equal(ours, theirs.to(ours.device))
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        return len(ours) == len(theirs) and all(map(_same_value, ours, theirs))
    return bool(ours == theirs)


class ListsSegments:
    """A mixin whose state dict lists the weights of the segments too, so that a LoRA loader, which
    reads names from it, finds all."""

    segments: Iterable[LayerSegment] = ()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        for segment in self.segments:
            state.update(segment.state_dict(**kwargs))
        return state


def require_layers(placement: Placement, total: int, what: str) -> None:
    """
    Raises:
        GLMImageError: the plan splits a model with another number of layers.
    """
    if placement.segments and placement.segments[-1][0].stop != total:
        raise DeviceError(
            f"The device plan splits {placement.segments[-1][0].stop} layers and this {what} has "
            f"{total}; choose the same model in GLM-Image Device Plan."
        )
