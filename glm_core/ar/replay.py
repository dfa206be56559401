"""Recording a step as a CUDA graph, for ROCm's devices too, which torch reaches under one name."""

from collections.abc import Callable

import torch


class CudaGraphs:
    """Records a device's steps as graphs that share a stream and a pool of memory.

    For graphs that are dropped together: a pool ends with the last of its graphs, and what cuBLAS
    keeps for a stream with any graph recorded on it. The stream names the device, for torch's own
    stream for recordings is one for all.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """
        Raises:
            RuntimeError: the device refuses to record the step; it may still be run.
        """
        graph = torch.cuda.CUDAGraph()
        # thread_local: the server's other threads may use the device meanwhile.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        here = torch.cuda.current_stream(self._stream.device)
        with torch.cuda.stream(here), recording:  # after a failure torch's own stays on its stream
            step()
        return graph.replay
