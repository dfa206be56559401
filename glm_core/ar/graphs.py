"""CUDA graphs of steps: one capture stream a device, and no capture after one that failed."""

import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
from torch import cuda

log = logging.getLogger(__name__)

Step = Callable[[], None]

_failed: list[Any] = []
"""What was captured when it failed. It is kept: torch before 2.13 keeps pointers to the graph."""


class CaptureError(RuntimeError):
    """The device did not record a step, which may still be run."""


def captures_failed() -> bool:
    """Whether a capture failed in this process; no other one is tried then.

    A failed capture may leave torch's allocator in a state in which it frees nothing any more, or
    in which the next capture breaks other programs' tensors.
    """
    return bool(_failed)


class CaptureStream:
    """A device's one stream for captures, and whose graphs were captured on it.

    torch keeps cuBLAS' workspace, 32 MB on some cards, for every stream that was ever used. From
    2.12 on it frees the stream's workspace when any graph of the stream is dropped, although other
    graphs address it. So there is one stream, and all of its graphs have one owner.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = cuda.Stream(device)
        self._owner: Callable[[], CudaGraphs | None] = lambda: None

    def take(self, owner: "CudaGraphs") -> None:
        """Become the stream of `owner`'s graphs; those of another owner are dropped."""
        before = self._owner()
        if before is owner:
            return
        if before is not None:
            before.drop()
        self._owner = weakref.ref(owner)


@cache
def capture_stream(device: torch.device) -> CaptureStream:
    return CaptureStream(device)


class CudaGraphs:
    """A `Recorder` of CUDA graphs, which share a pool of memory and are dropped together.

    ROCm's devices have them under the same name.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._graphs: dict[Hashable, cuda.CUDAGraph] = {}
        self._warm_thread: int | None = None  # cuBLAS' handles are of a thread

    def warm_up(self, step: Step) -> None:
        """Run a step on the capture stream: kernels are chosen, and cuBLAS takes its workspace."""
        capture = capture_stream(self._device)
        capture.take(self)
        current = cuda.current_stream(self._device)
        capture.stream.wait_stream(current)
        with cuda.stream(capture.stream):
            step()
        current.wait_stream(capture.stream)
        self._warm_thread = threading.get_ident()

    def record(self, work: Hashable, step: Step) -> None:
        """Record a step as `work`.

        Raises:
            CaptureError: the device refused it, now or earlier in this process.
        """
        if captures_failed():
            raise CaptureError("a capture failed earlier")
        if self._warm_thread != threading.get_ident():
            self.warm_up(step)
        cuda.synchronize(self._device)  # an earlier error shows here, and is none of the capture
        cuda.empty_cache()  # a capture cannot free cached memory when it needs some
        if self._pool is None:
            self._pool = cuda.graph_pool_handle()
        self._graphs[work] = self._capture(step)

    def replay(self, work: Hashable) -> bool:
        """Run a recording; False if there is none."""
        graph = self._graphs.get(work)
        if graph is not None:
            graph.replay()
        return graph is not None

    def drop(self) -> None:
        """Free all graphs and their memory."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cudaMallocAsync tells of each tensor of a graph
            for graph in self._graphs.values():
                graph.reset()
        self._graphs = {}
        self._pool = self._warm_thread = None

    def _capture(self, step: Step) -> cuda.CUDAGraph:
        graph = cuda.CUDAGraph()
        with cuda.stream(capture_stream(self._device).stream):
            try:
                # thread_local: the server's other threads may use the device meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            except RuntimeError as error:
                # Its pool shows the native allocator whether this capture had begun. The other
                # one cannot tell it from a capture of another thread.
                if cuda.get_allocator_backend() == "native":
                    self._leave_capture_mode()
                raise _failure(graph, error) from error
            try:
                step()
            except BaseException as error:
                self._abandon(graph, error)
                raise
            try:
                graph.capture_end()
            except RuntimeError as error:
                self._leave_capture_mode()
                raise _failure(graph, error) from error
        return graph

    def _abandon(self, graph: cuda.CUDAGraph, error: BaseException) -> None:
        """End a capture in the middle of a step.

        Raises:
            CaptureError: the device raised `error`. Other errors, such as interrupts, are the
                caller's to raise again, whether the capture ends well or not.
        """
        refused = isinstance(error, RuntimeError)
        try:
            graph.capture_end()
            graph.reset()
        except RuntimeError as second:
            self._leave_capture_mode()
            failure = _failure(graph, error if refused else second)
        else:
            if not refused:
                return
            failure = _failure(graph, error)
        if refused:
            raise failure from error

    def _leave_capture_mode(self) -> None:
        """Tell torch's allocator that the capture has ended.

        torch before 2.13 leaves that out if the capture ends in an error. Then cudaMallocAsync
        frees nothing any more in this process, and the native allocator fails in `empty_cache`.
        """
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end is None:
            return
        index = self._device.index
        try:
            end(cuda.current_device() if index is None else index, self._pool)
        except RuntimeError:
            return  # it had been told


def _failure(graph: cuda.CUDAGraph, error: BaseException) -> CaptureError:
    _failed.append(graph)
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    log.warning(
        "The AR model's steps run without graphs, slower, until the program starts again, "
        "because one could not be recorded: %s",
        reason,
    )
    return CaptureError(reason)
