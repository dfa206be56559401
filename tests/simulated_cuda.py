"""torch.cuda's streams and graphs as `graphs.py` uses them, on a CPU.

A graph is a tape of operations. Streams, graphs and rules are counted: a capture needs a stream
that matrices were multiplied on, in the same state of the device, and ends on it. Dropping a graph
frees the stream's workspace, as in torch since 2.12, and running another graph of it is an error.
"""

from contextlib import contextmanager

from tape import Tape


class Stream:
    def __init__(self, cuda, device):
        self.cuda = cuda
        self.warm = False
        self.waited_for = []
        cuda.streams.append(self)

    def wait_stream(self, other):
        self.waited_for.append(other)


class SimulatedCuda:
    """Stands in for the module `torch.cuda`.

    fail: "begin" or "end" raises RuntimeError there.
    """

    OutOfMemoryError = RuntimeError

    def __init__(self):
        self.streams = []
        self.default = Stream(self, None)
        self.streams.clear()
        self.current = self.default
        self.alive = []
        self.captures = 0
        self.in_capture_mode = False
        self.synchronised = False
        self.fail = None
        cuda = self

        class CUDAGraph(Graph):
            def __init__(self):
                super().__init__(cuda)

        self.CUDAGraph = CUDAGraph

    def Stream(self, device):  # noqa: N802
        return Stream(self, device)

    def current_stream(self, device=None):
        return self.current

    def current_device(self):
        return 0

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
            stream.warm = stream.warm or not self.in_capture_mode
        finally:
            self.current = before

    def synchronize(self, device=None):
        assert not self.in_capture_mode
        self.synchronised = True

    def empty_cache(self):
        assert not self.in_capture_mode, "captures_underway.empty()"

    def graph_pool_handle(self):
        return object()

    def get_allocator_backend(self):
        return "cudaMallocAsync"

    def end_allocate_to_pool(self, index, pool):
        """`torch._C._cuda_endAllocateToPool`"""
        if not self.in_capture_mode:
            raise RuntimeError("capture_underway is false")
        self.in_capture_mode = False


class Graph:
    def __init__(self, cuda):
        self.cuda = cuda
        self.tape = None
        self.stream = None

    def capture_begin(self, pool, capture_error_mode):
        cuda = self.cuda
        cuda.captures += 1
        assert cuda.synchronised
        assert cuda.current in cuda.streams
        assert cuda.current.warm
        cuda.synchronised = False
        cuda.in_capture_mode = True
        if cuda.fail == "begin":
            raise RuntimeError("begin: operation not permitted\nsee the manual")
        self.stream = cuda.current
        self.tape = Tape()
        self.tape.__enter__()

    def capture_end(self):
        assert self.cuda.current is self.stream
        self.tape.__exit__(None, None, None)
        if self.cuda.fail == "end":
            raise RuntimeError("end: capture invalidated\nsee the manual")
        self.cuda.in_capture_mode = False
        self.cuda.alive.append(self)

    def replay(self):
        assert self in self.cuda.alive, "this graph, or one of the same stream, was dropped"
        self.tape()

    def reset(self):
        self.stream.warm = False
        self.cuda.alive = [graph for graph in self.cuda.alive if graph.stream is not self.stream]
