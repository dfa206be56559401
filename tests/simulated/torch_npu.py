"""Accelerators that do not exist: ComfyUI imports a module of this name and finds Ascend NPUs.

Tensors on "npu:0", "npu:1" ... lie in host memory and are computed by the CPU, under the rules of
an accelerator: an operation takes tensors of one device, and a device has a limited number of
bytes. ComfyUI loads, offloads, streams and splits as on a card; speed and streams are not
simulated.

NPU_BYTES: the bytes of each device, separated by commas.
NPU_EMPTY: if set, tensors on the devices have sizes and no numbers, and read as zeros. So networks
of any size run, and their allocations are counted.
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
STORAGE = torch.device("meta") if EMPTY else CPU
"""Where torch stores the numbers, or only the sizes."""
READING = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}
"""Operations that give Python a number."""
CROSSING = {aten._to_copy.default, aten.copy_.default}
"""Operations that take tensors of several devices."""
PLACING = {"aten::to", "aten::type_as"}
"""Operations that copy only if the device is another one."""
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""Operations that take indices from the CPU."""


class Memory:
    """The memory of one device: the bytes of the storages of all living tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.in_use = self.peak = 0
        self._holders: Counter[int] = Counter()

    def hold(self, tensor: "NPUTensor") -> None:
        """Count a tensor's storage until the last tensor that uses it is gone.

        Raises:
            torch.OutOfMemoryError: it is larger than what is free.
        """
        storage = tensor.stored.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if not self._holders[key]:
            if self.in_use + nbytes > self.size:
                del self._holders[key]
                raise torch.OutOfMemoryError(
                    f"{tensor.device} holds {self.in_use} of {self.size} bytes, not {nbytes} more"
                )
            self.in_use += nbytes
            self.peak = max(self.peak, self.in_use)
        self._holders[key] += 1
        weakref.finalize(tensor, self._release, key, storage).atexit = False

    def _release(self, key: int, storage: torch.UntypedStorage) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.in_use -= storage.nbytes()


MEMORY = [Memory(int(size)) for size in os.environ["NPU_BYTES"].split(",")]


class NPUTensor(Tensor):
    """A tensor on a simulated device; `stored` has its numbers, or only its sizes."""

    stored: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, stored: Tensor, device: torch.device) -> "NPUTensor":
        self = Tensor._make_wrapper_subclass(
            cls, stored.size(), strides=stored.stride(), storage_offset=stored.storage_offset(),
            dtype=stored.dtype, device=device,
        )  # fmt: skip
        self.stored = stored
        MEMORY[device.index].hold(self)
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"{self.device}: {self.stored!r}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:
        name, kwargs = func._schema.name, dict(kwargs or {})
        if func is aten._has_compatible_shallow_copy_type.default:
            return False  # asked by modules that move: they then create new parameters
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
            kwargs["device"] = STORAGE
        return _wrap(func(*tree_map(_stored, args), **tree_map(_stored, kwargs)), tensors, device)


def _stored(x: Any) -> Any:
    if isinstance(x, NPUTensor):
        return x.stored
    return x.to(STORAGE) if isinstance(x, Tensor) else x


def _zeros(func: Any, args: tuple, kwargs: dict) -> Any:
    """The result of `func` on the CPU if its tensors are zero."""
    if func is aten._to_copy.default:  # of whole models: unwritten pages take no memory
        (x,) = args
        return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)

    def zeros(x: Any) -> Any:
        return torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, NPUTensor) else x

    return func(*tree_map(zeros, args), **tree_map(zeros, kwargs))


def _wrap(out: Any, given: list[Tensor], device: torch.device) -> Any:
    """Results as tensors on the device; an argument that is returned stays the same object."""
    known = {id(x.stored): x for x in given if isinstance(x, NPUTensor)}
    for x in known.values():
        if x.stored.shape != x.shape:
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
        RuntimeError: tensors lie on several devices; those without dimensions may be on the CPU.
    """
    if name in INDEXING:
        tensors = [tensors[0], *(x for x in tensors[1:] if x.device != CPU)]
    devices = {x.device for x in tensors if x.ndim or x.device != CPU}
    if len(devices) > 1:
        raise RuntimeError(f"{name} is given tensors on {' and '.join(map(str, devices))}")


# ---- what torch calls ----------------------------------------------------------------------------

_operators = torch.library.Library("aten", "IMPL")


def _register_factory(name: str, overload: str) -> None:
    func = getattr(getattr(aten, name), overload)

    def make(*args, device=None, pin_memory=None, **kwargs) -> NPUTensor:
        return NPUTensor(func(*args, device=STORAGE, **kwargs), _indexed(device))

    _operators.impl(f"{name}.{overload}".removesuffix(".default"), make, "PrivateUse1")


for _name, _overload in (
    ("empty", "memory_format"), ("empty_strided", "default"), ("arange", "default"),
    ("arange", "start"), ("arange", "start_step"), ("linspace", "default"), ("eye", "default"),
):  # fmt: skip
    _register_factory(_name, _overload)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _stored(target).copy_(_stored(source))
    return target


_operators.impl("_copy_from", _copy_from, "PrivateUse1")


# ---- torch.npu -----------------------------------------------------------------------------------


class Backend(ModuleType):
    """The functions of `torch.npu` that ComfyUI and torch call."""

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
        """No operation is ever pending."""

    def empty_cache(self) -> None:
        """No memory is cached."""

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        memory = MEMORY[_indexed(device).index]
        return memory.size - memory.in_use, memory.size

    def memory_stats(self, device: Any) -> dict[str, int]:
        in_use = MEMORY[_indexed(device).index].in_use
        return {"active_bytes.all.current": in_use, "reserved_bytes.all.current": in_use}


_setup_privateuseone_for_python_backend("npu", Backend("torch.npu"))
