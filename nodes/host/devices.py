"""The machine's devices under their names in a graph, and where a plan puts each stage."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import comfy.model_management
import torch

from ...glm_core.errors import shown
from ...glm_core.placement.plan import AUTO, CPU, Device, Part, Plan
from ...glm_core.placement.splits import NAME


@dataclass(frozen=True)
class Placement:
    """Where a loader puts a network.

    load, offload: where it computes, and where its weights wait.
    limit: the most bytes of its weights on the load device; None for all that fit.
    segments: later layers on devices of their own; the network itself has the layers before them.
    """

    load: torch.device
    offload: torch.device
    limit: int | None = None
    segments: tuple[tuple[range, "Placement"], ...] = ()


@dataclass(frozen=True)
class DevicePlan:
    """GLM_DEVICE_PLAN: a plan, and this machine's devices by the names in it."""

    plan: Plan
    devices: Mapping[str, torch.device]

    def placement(self, stage: str) -> Placement | None:
        """None for a stage that the planned checkpoint does not have."""
        parts = self.plan.of_stage(stage)
        if not parts:
            return None
        first, *others = parts
        segments = tuple((part.layers, self._placement(part)) for part in others)
        return replace(self._placement(first), segments=segments)

    def _placement(self, part: Part) -> Placement:
        limit = part.resident if self.plan.least_memory and part.offloaded else None
        return placement_on(self.devices[part.device], limit)


def placement_on(device: torch.device, limit: int | None = None) -> Placement:
    """A placement on the device. Weights wait in host memory, or on the device itself if the user
    chose so (--highvram, --gpu-only)."""
    waits_on_host = comfy.model_management.is_device_cpu(
        comfy.model_management.unet_offload_device()
    )
    return Placement(device, torch.device("cpu") if waits_on_host else device, limit)


def default_placement() -> Placement:
    """ComfyUI's own choice for a diffusion model."""
    return placement_on(comfy.model_management.get_torch_device())


def machine() -> dict[str, torch.device]:
    """The devices by name: gpu:0, gpu:1, ... in the host's order, then cpu."""
    current = comfy.model_management.get_torch_device()
    gpus = [] if comfy.model_management.is_device_cpu(current) else _accelerators(current)
    return {f"gpu:{i}": device for i, device in enumerate(gpus)} | {CPU: torch.device("cpu")}


def _accelerators(current: torch.device) -> list[torch.device]:
    listed = getattr(comfy.model_management, "get_all_torch_devices", None)
    if listed is not None:  # current hosts have it, 0.3.75 has not
        return listed()
    backend = getattr(torch, current.type, None)  # torch.cuda, torch.xpu, torch.npu, torch.mps ...
    count = backend.device_count() if hasattr(backend, "device_count") else 1
    return [torch.device(current.type, i) for i in range(count)] if count > 1 else [current]


def name_of(device: torch.device) -> str:
    """The name of a device in a graph; torch's own if this machine does not list it."""
    return next((name for name, known in machine().items() if known == device), str(device))


def device_names() -> list[str]:
    """The choices for a stage on this machine."""
    return [AUTO, CPU, *(name for name in machine() if name != CPU)]


def check_device(stage: str, name: str | None) -> bool | str:
    """For `validate_inputs`: a device that only another machine has passes, and counts as auto."""
    if name is None or name == AUTO or (isinstance(name, str) and NAME.fullmatch(name)):
        return True
    return f"{stage} is set to '{shown(name)}'; devices are called auto, cpu, gpu:0, gpu:1 ..."


def rooms(reserve: int) -> list[Device]:
    """The machine's devices with the bytes that a plan may use of each."""
    return [
        Device(name, usable(device) - (0 if name == CPU else reserve))
        for name, device in machine().items()
    ]


def usable(device: torch.device) -> int:
    """Free bytes. Models that ComfyUI has loaded count as free, since it unloads them when others
    need room."""
    loaded = (
        entry.model_loaded_memory()
        for entry in comfy.model_management.current_loaded_models
        if entry.device == device and entry.model is not None
    )
    free = comfy.model_management.get_free_memory(device)
    cpu = comfy.model_management.is_device_cpu(device)
    return int(free if cpu else free + sum(loaded))
