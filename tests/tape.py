"""Records a step on the CPU in place of a CUDA graph.

A tape stores the operations with the addresses they read and write, as a graph does. A number or a
shape that a step takes from the host is therefore fixed, and a replay shows it as wrong tokens. A
step that reads the device raises.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_OF_THE_DEVICE = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}


class DeviceReadError(Exception):
    pass


class Tape(TorchDispatchMode):
    """The operations of a step. Calling the tape repeats them on the same memory."""

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
        """Names of the recorded operations."""
        return {func._schema.name for func, *_ in self.calls}

    def __call__(self):
        for func, args, kwargs, outputs in self.calls:
            for recorded, new in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(recorded, torch.Tensor) and recorded.data_ptr() != new.data_ptr():
                    recorded.copy_(new)


class Recorder:
    def __init__(self):
        self.tapes = []

    def __call__(self, step):
        tape = Tape()
        with tape:
            step()
        self.tapes.append(tape)
        return tape
