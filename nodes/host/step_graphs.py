"""The AR model's step as a graph, where the host has all of its weights on the GPU."""

from collections.abc import Callable, Hashable
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch

from ...glm_core.ar.step import EagerRunner, Recorder, ReplayRunner, Runner
from .patchers import ON_PARTIAL_UNLOAD


class StepGraphs:
    """Chooses how a patcher's steps are run, and forgets its graphs when weights move."""

    def __init__(self, new_recorder: Callable[[], Recorder]) -> None:
        self._replay = ReplayRunner(new_recorder)
        self._made_for: Hashable = None

    def watch(self, patcher: Any) -> None:
        """Called once; clones of the patcher inherit the callbacks."""
        calls = comfy.patcher_extension.CallbacksMP
        patcher.add_callback(calls.ON_DETACH, self._on_detach)
        # Graphs hold addresses, of scales too, that come anew when weights are put in place.
        patcher.add_callback(calls.ON_LOAD, lambda *_: self._replay.drop())
        patcher.add_callback(ON_PARTIAL_UNLOAD, lambda _: self._replay.drop())

    def held_for(self, run: Hashable) -> int:
        """Bytes of what a run will need that are held from one like it; what another left goes.

        Called before weights are loaded, which need room beside the buffers.

        Args:
            run: what the shapes of its buffers depend on.
        """
        if run != self._made_for:
            self._replay.drop()
        self._made_for = run
        return self._replay.nbytes

    def runner(self, patcher: Any) -> Runner:
        """For the run that begins now, after the patcher was loaded."""
        if runs_graphs(patcher.load_device) and is_resident(patcher):
            return self._replay
        self._replay.drop()
        return EagerRunner()

    def _on_detach(self, patcher: Any, unpatch_all: bool) -> None:
        if (
            unpatch_all
        ):  # a clone that is deleted detaches too, and leaves the weights where they are
            self._replay.drop()


def runs_graphs(device: torch.device) -> bool:
    """CUDA's and ROCm's devices, which torch reaches under one name."""
    management = comfy.model_management
    return not management.is_device_cpu(device) and (management.is_nvidia() or management.is_amd())


def is_resident(patcher: Any) -> bool:
    """Whether every weight lies on the load device and no layer fetches or patches one as it runs.

    A split model's do not, and its hops could not be recorded.

    Hosts with dynamic patchers (since 0.4) move weights during a run.
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
