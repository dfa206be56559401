"""A recording of a step on the CPU, in place of a CUDA graph.

Like a graph it records operations with the addresses they read and write. Whatever a step takes
from Python, a number or a shape, is fixed in the recording and shows as wrong tokens. A step that
reads a value back from the device fails.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_OF_THE_DEVICE = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}


class DeviceReadError(Exception):
    pass


class Tape(TorchDispatchMode):
    """A step's operations; calling the tape runs them again on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in READS_OF_THE_DEVICE:
            raise DeviceReadError(func._schema.name)
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(out)))
        return out

    @property
    def operations(self):
        """Their names."""
        return {func._schema.name for func, *_ in self.calls}

    def __call__(self):
        for func, args, kwargs, outputs in self.calls:
            for recorded, new in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(recorded, torch.Tensor) and recorded.data_ptr() != new.data_ptr():
                    recorded.copy_(new)


class Recorder:
    """A `replay.Recorder` of tapes."""

    def __init__(self):
        self.tapes = []
        self.recorded = {}

    def warm_up(self, step):
        step()

    def record(self, work, step):
        tape = Tape()
        with tape:
            step()
        self.tapes.append(tape)
        self.recorded[work] = tape

    def replay(self, work):
        if work in self.recorded:
            self.recorded[work]()
        return work in self.recorded

    def drop(self):
        self.recorded = {}
