"""The machine's devices under the names of a graph, and where a plan puts each stage."""

from collections.abc import Mapping
from dataclasses import dataclass

import comfy.model_management
import torch

from ...glm_core.placement.plan import AUTO, CPU, NAME, Device, Part, Plan


@dataclass(frozen=True)
class Placement:
    """What a loader does with its network.

    load, offload: where it computes, and where its weights wait.
    limit: bytes of its weights that may lie on the load device; None for all that fit.
    segments: layers that are put elsewhere, and where; the network keeps those before them.
    """

    load: torch.device
    offload: torch.device
    limit: int | None = None
    segments: tuple[tuple[range, "Placement"], ...] = ()


@dataclass(frozen=True)
class DevicePlan:
    """GLM_DEVICE_PLAN: a plan, and what its names mean on this machine."""

    plan: Plan
    devices: Mapping[str, torch.device]

    def placement(self, stage: str) -> Placement | None:
        """None for a stage that the planned checkpoint does not have."""
        first, *others = [self._placement(part) for part in self.plan.of_stage(stage)] or [None]
        if not others:
            return first
        ranges = [part.layers for part in self.plan.of_stage(stage)]
        return Placement(
            first.load, first.offload, first.limit, tuple(zip(ranges[1:], others, strict=True))
        )

    def _placement(self, part: Part) -> Placement:
        limit = part.resident if self.plan.least and part.offloaded else None
        return placement_on(self.devices[part.device], limit)


def placement_on(device: torch.device, limit: int | None = None) -> Placement:
    """With weights waiting in host memory, or where they compute if the user has all of them stay
    there (--highvram, --gpu-only)."""
    waits_on_host = comfy.model_management.is_device_cpu(
        comfy.model_management.unet_offload_device()
    )
    return Placement(device, torch.device("cpu") if waits_on_host else device, limit)


def default_placement() -> Placement:
    """ComfyUI's own choice for a diffusion model."""
    return placement_on(comfy.model_management.get_torch_device())


def machine() -> dict[str, torch.device]:
    """gpu:0, gpu:1, ... in the host's order, then cpu."""
    current = comfy.model_management.get_torch_device()
    found = [] if comfy.model_management.is_device_cpu(current) else _accelerators(current)
    return {f"gpu:{i}": device for i, device in enumerate(found)} | {CPU: torch.device("cpu")}


def _accelerators(current: torch.device) -> list[torch.device]:
    listed = getattr(comfy.model_management, "get_all_torch_devices", None)
    if listed is not None:  # current hosts have it, 0.3.75 has not
        return listed()
    backend = getattr(torch, current.type, None)  # torch.cuda, torch.xpu, torch.npu, torch.mps ...
    count = backend.device_count() if hasattr(backend, "device_count") else 1
    return [torch.device(current.type, i) for i in range(count)] if count > 1 else [current]


def name_of(device: torch.device) -> str:
    """What a graph calls a device of this machine."""
    return next((name for name, known in machine().items() if known == device), str(device))


def device_names() -> list[str]:
    """What a stage can be set to on this machine."""
    return [AUTO, CPU, *(name for name in machine() if name != CPU)]


def check_device(stage: str, name: str | None) -> bool | str:
    """For `validate_inputs`: a device that another machine has passes, and falls back later."""
    if name is None or name == AUTO or NAME.fullmatch(name):
        return True
    return f"{stage} is set to '{name}'; devices are called auto, cpu, gpu:0, gpu:1 ..."


def rooms(reserve: int) -> list[Device]:
    """The machine's devices with the bytes that a plan may use of each.

    What ComfyUI has loaded counts as free, for it goes when something else needs its room.
    """
    return [
        Device(name, _free(device) - (0 if name == CPU else reserve))
        for name, device in machine().items()
    ]


def _free(device: torch.device) -> int:
    loaded = (
        entry.model_loaded_memory()
        for entry in comfy.model_management.current_loaded_models
        if entry.device == device and entry.model is not None
    )
    free = comfy.model_management.get_free_memory(device)
    cpu = comfy.model_management.is_device_cpu(device)
    return int(free if cpu else free + sum(loaded))
