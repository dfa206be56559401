"""The AR model's step as a graph, where the host has all of its weights on the GPU."""

from collections.abc import Callable, Hashable
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from comfy.cli_args import args

from ...glm_core.ar.graphs import captures_failed
from ...glm_core.ar.replay import EagerRunner, Recorder, ReplayRunner, Runner
from .patchers import ON_PARTIAL_UNLOAD


class StepGraphs:
    """Chooses how a patcher's steps run, and drops its graphs when weights move."""

    def __init__(self, new_recorder: Callable[[], Recorder]) -> None:
        self._replay = ReplayRunner(new_recorder)
        self._made_for: Hashable = None

    def watch(self, patcher: Any) -> None:
        """Notice when the patcher's weights move. Call it once: clones inherit the callbacks."""
        calls = comfy.patcher_extension.CallbacksMP
        patcher.add_callback(calls.ON_DETACH, self._on_detach)
        # A load gives weights and scales new addresses, and graphs hold the old ones.
        patcher.add_callback(calls.ON_LOAD, lambda *_: self._replay.drop())
        patcher.add_callback(ON_PARTIAL_UNLOAD, lambda _: self._replay.drop())

    def allocated_for(self, shape: Hashable) -> int:
        """Bytes still allocated from an earlier run of the same shape; other buffers are freed.

        Call it before weights are loaded, for they need room beside the buffers.

        Args:
            shape: what the shapes of the run's buffers depend on.
        """
        if shape != self._made_for:
            self._replay.drop()
        self._made_for = shape
        return self._replay.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes still allocated from an earlier run."""
        return self._replay.nbytes

    def runner(self, patcher: Any) -> Runner:
        """For a run that begins now; the patcher must be loaded."""
        if runs_graphs(patcher.load_device) and is_resident(patcher):
            return self._replay
        self._replay.drop()
        return EagerRunner()

    def _on_detach(self, patcher: Any, unpatch_all: bool) -> None:
        if unpatch_all:  # else a clone was deleted, and the weights stay where they are
            self._replay.drop()


def is_trusted(device: torch.device) -> bool:
    """Whether a device takes graphs and kernels: CUDA's and ROCm's, which torch has as one."""
    management = comfy.model_management
    return not management.is_device_cpu(device) and (management.is_nvidia() or management.is_amd())


def runs_graphs(device: torch.device) -> bool:
    """Whether steps can be graphs.

    Hosts since 0.36 have a flag against graphs; it is for theirs and for ours.
    """
    forbidden = getattr(args, "disable_cuda_graphs", False) or captures_failed()
    return is_trusted(device) and not forbidden


def is_resident(patcher: Any) -> bool:
    """Whether every weight is on the load device, and no layer fetches or patches one as it runs.

    It is false for split models, whose moves between devices cannot be recorded, and for dynamic
    patchers (hosts since 0.4), which move weights during a run.
    """
    dynamic = getattr(patcher, "is_dynamic", None)
    if dynamic is not None and dynamic():
        return False
    model = patcher.model
    if model.segments:
        return False
    patched_late = any(
        getattr(module, "weight_function", None) or getattr(module, "bias_function", None)
        for module in model.modules()
    )
    return not patched_late and all(
        weight.device == patcher.load_device for weight in model.parameters()
    )
