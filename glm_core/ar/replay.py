"""Running steps as they come, or recorded once as a CUDA graph and replayed."""

import logging
from collections.abc import Callable
from typing import Protocol

import torch

from .model import ARModel
from .step import StepBuffers, StepShape

log = logging.getLogger(__name__)

Step = Callable[[], None]
Recorder = Callable[[Step], Step]
"""Records a step, which may run it, and returns a function that does the same work again."""


class Runner(Protocol):
    """Holds a run's buffers and runs its steps."""

    def buffers(self, model: ARModel, shape: StepShape) -> StepBuffers:
        """Buffers of that shape; an earlier run may have used them, but left no NaN."""

    def run(self, step: Step, span: int) -> None:
        """Run a step over the buffers given last; steps of the same span are the same work."""


class EagerRunner:
    """Allocates buffers for each run, and runs steps as they come."""

    def buffers(self, model: ARModel, shape: StepShape) -> StepBuffers:
        return StepBuffers.allocate(model, shape)

    def run(self, step: Step, span: int) -> None:
        step()


class ReplayRunner:
    """Records a step once for each span and replays it, also for later prompts of that shape.

    A recording holds addresses. It is dropped when the shape, the options or the address of any
    weight is another than when it was made.
    """

    def __init__(self, new_recorder: Callable[[], Recorder]) -> None:
        """new_recorder: called before the first recording, and anew after each `drop`."""
        self._new_recorder = new_recorder
        self.drop()

    def drop(self) -> None:
        """Free the buffers and all recordings."""
        self._made_for: tuple | None = None
        self._buffers: StepBuffers | None = None
        self._warmed_up: set[int] = set()
        self._record: Recorder | None = None
        self._recorded: dict[int, Step] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the KV cache that is allocated; the other buffers are small beside it."""
        return 0 if self._buffers is None else self._buffers.cache.nbytes

    def buffers(self, model: ARModel, shape: StepShape) -> StepBuffers:
        made_for = shape, tuple(weight.data_ptr() for weight in model.parameters())
        if self._buffers is None or made_for != self._made_for:
            self.drop()
            self._buffers, self._made_for = StepBuffers.allocate(model, shape), made_for
        return self._buffers

    def run(self, step: Step, span: int) -> None:
        if span not in self._warmed_up:  # kernels are chosen and memory is taken outside a graph
            self._warmed_up.add(span)
            step()
            return
        if span not in self._recorded:
            self._recorded[span] = self._recording(step)
        self._recorded[span]()

    def _recording(self, step: Step) -> Step:
        """A recording of the step, or the step itself where the device refuses to record it."""
        try:
            self._record = self._record or self._new_recorder()
            return self._record(step)
        except RuntimeError as error:
            log.warning("The AR model's steps run without graphs, slower: %s", error)
            self._record = _unrecorded  # until all is dropped: the next span would be refused too
            return step


def _unrecorded(step: Step) -> Step:
    return step


class CudaGraphs:
    """A `Recorder` of CUDA graphs that share a stream and a pool of memory.

    ROCm's devices have them under the same name. The graphs are dropped together: the pool, and
    cuBLAS' workspace for the stream, live as long as any of them. The stream is of the device, for
    torch's own recording stream is one for all devices.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """
        Raises:
            RuntimeError: the device refuses to record the step; it may still be run.
        """
        graph = torch.cuda.CUDAGraph()
        # thread_local: the server's other threads may use the device meanwhile.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        current = torch.cuda.current_stream(self._stream.device)
        # After a failure torch stays on the recording stream; the outer block leaves it.
        with torch.cuda.stream(current), recording:
            step()
        return graph.replay
