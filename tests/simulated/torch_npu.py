"""Accelerators that do not exist: ComfyUI imports a module of this name and finds Ascend NPUs.

Tensors on "npu:0", "npu:1" ... lie in host memory and are computed by the CPU, under the rules of
an accelerator: those of different devices do not meet, and a device holds so many bytes and no
more. What ComfyUI loads, offloads, streams and splits, it does as on a card; speed and streams are
not simulated.

NPU_BYTES: of each device, with commas between.
NPU_EMPTY: if set, tensors there have sizes and no numbers; what is read from them is zero. Networks
of any size run so, for what they allocate to be counted.
"""

import os
import weakref
from collections import Counter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
CPU = torch.device("cpu")
EMPTY = "NPU_EMPTY" in os.environ
KEPT = torch.device("meta") if EMPTY else CPU
"""Where torch has the numbers, or only the sizes."""
READING = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}
"""What gives Python a number."""
CROSSING = {aten._to_copy.default, aten.copy_.default}
"""What takes tensors of several devices."""
PLACING = {"aten::to", "aten::type_as"}
"""What only then copies if the device is another one."""
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""What takes indices from the CPU."""


class Memory:
    """Of one device: what the storages of all living tensors take of it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken = self.peak = 0
        self._holders: Counter[int] = Counter()

    def hold(self, tensor: "NPUTensor") -> None:
        """Count a tensor's storage until the last tensor that has it is gone.

        Raises:
            torch.OutOfMemoryError: it is more than is free.
        """
        storage = tensor.kept.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if not self._holders[key]:
            if self.taken + nbytes > self.size:
                del self._holders[key]
                raise torch.OutOfMemoryError(
                    f"{tensor.device} holds {self.taken} of {self.size} bytes: no room for {nbytes}"
                )
            self.taken += nbytes
            self.peak = max(self.peak, self.taken)
        self._holders[key] += 1
        weakref.finalize(tensor, self._release, key, storage).atexit = False

    def _release(self, key: int, storage: torch.UntypedStorage) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.taken -= storage.nbytes()


MEMORY = [Memory(int(size)) for size in os.environ["NPU_BYTES"].split(",")]


class NPUTensor(Tensor):
    """A tensor on a simulated device; `kept` has its numbers, or its sizes alone."""

    kept: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, kept: Tensor, device: torch.device) -> "NPUTensor":
        self = Tensor._make_wrapper_subclass(
            cls, kept.size(), strides=kept.stride(), storage_offset=kept.storage_offset(),
            dtype=kept.dtype, device=device,
        )  # fmt: skip
        self.kept = kept
        MEMORY[device.index].hold(self)
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"{self.device}: {self.kept!r}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:
        name, kwargs = func._schema.name, dict(kwargs or {})
        if func is aten._has_compatible_shallow_copy_type.default:
            return False  # asked by modules that move: their parameters are made anew
        if name in PLACING:
            return func.decompose(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func not in CROSSING:
            _require_one_device(name, tensors)
        device = kwargs.pop("device", None)
        device = tensors[0].device if device is None else _indexed(device)
        if EMPTY and (name in READING or device == CPU):
            return _zeros(func, args, kwargs)
        if "device" in (argument.name for argument in func._schema.arguments):
            kwargs["device"] = KEPT
        return _wrap(func(*tree_map(_kept, args), **tree_map(_kept, kwargs)), tensors, device)


def _kept(x: Any) -> Any:
    if isinstance(x, NPUTensor):
        return x.kept
    return x.to(KEPT) if isinstance(x, Tensor) else x


def _zeros(func: Any, args: tuple, kwargs: dict) -> Any:
    """What `func` gives the CPU of tensors that are zero."""
    if func is aten._to_copy.default:  # of whole models: pages that nobody writes take no memory
        (x,) = args
        return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)

    def zeros(x: Any) -> Any:
        return torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, NPUTensor) else x

    return func(*tree_map(zeros, args), **tree_map(zeros, kwargs))


def _wrap(out: Any, given: list[Tensor], device: torch.device) -> Any:
    """Results on the device; a tensor that was given comes back as itself."""
    known = {id(x.kept): x for x in given if isinstance(x, NPUTensor)}
    for x in known.values():
        if x.kept.shape != x.shape:
            raise RuntimeError("A simulated tensor cannot follow a change of shape in place.")

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor) or device == CPU:
            return x
        return known[id(x)] if id(x) in known else NPUTensor(x, device)

    return tree_map(wrap, out)


def _indexed(device: torch.device | str | int) -> torch.device:
    device = torch.device(device)
    return torch.device("npu", 0) if device.type == "npu" and device.index is None else device


def _require_one_device(name: str, tensors: list[Tensor]) -> None:
    """
    Raises:
        RuntimeError: tensors lie on several; numbers may lie on the CPU.
    """
    if name in INDEXING:
        tensors = [tensors[0], *(x for x in tensors[1:] if x.device != CPU)]
    devices = {x.device for x in tensors if x.ndim or x.device != CPU}
    if len(devices) > 1:
        raise RuntimeError(f"{name} is given tensors on {' and '.join(map(str, devices))}")


# ---- what torch itself calls ---------------------------------------------------------------------

_operators = torch.library.Library("aten", "IMPL")


def _register_factory(name: str, overload: str) -> None:
    func = getattr(getattr(aten, name), overload)

    def make(*args, device=None, pin_memory=None, **kwargs) -> NPUTensor:
        return NPUTensor(func(*args, device=KEPT, **kwargs), _indexed(device))

    _operators.impl(f"{name}.{overload}".removesuffix(".default"), make, "PrivateUse1")


for _name, _overload in (
    ("empty", "memory_format"), ("empty_strided", "default"), ("arange", "default"),
    ("arange", "start"), ("arange", "start_step"), ("linspace", "default"), ("eye", "default"),
):  # fmt: skip
    _register_factory(_name, _overload)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _kept(target).copy_(_kept(source))
    return target


_operators.impl("_copy_from", _copy_from, "PrivateUse1")


# ---- torch.npu -----------------------------------------------------------------------------------


class Backend(ModuleType):
    """What ComfyUI and torch ask of `torch.npu`."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """There is no generator: ComfyUI's noise comes from the CPU, and so does ours."""

    def device_count(self) -> int:
        return len(MEMORY)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any) -> str:
        return "simulated"

    def synchronize(self, device: Any = None) -> None:
        """Nothing is ever under way."""

    def empty_cache(self) -> None:
        """Nothing is kept in reserve."""

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        memory = MEMORY[_indexed(device).index]
        return memory.size - memory.taken, memory.size

    def memory_stats(self, device: Any) -> dict[str, int]:
        taken = MEMORY[_indexed(device).index].taken
        return {"active_bytes.all.current": taken, "reserved_bytes.all.current": taken}


_setup_privateuseone_for_python_backend("npu", Backend("torch.npu"))
