"""Kinds of changes in LoRA files: the tensors of each, and whether they fit a layer."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from .lora import TENSOR_SUFFIX

UP, DOWN, MID, RESHAPE = "lora_up.weight", "lora_down.weight", "lora_mid.weight", "reshape_weight"
# Suffixes of one meaning, and the one that we give the host.
SAME = {
    "lora_B.weight": UP, "lora_B": UP, "lora_up": UP, "lora.up.weight": UP,
    "lora_linear_layer.up.weight": UP,
    "lora_A.weight": DOWN, "lora_A": DOWN, "lora_down": DOWN, "lora.down.weight": DOWN,
    "lora_linear_layer.down.weight": DOWN,
    "lora_mid": MID, "w_norm": "diff", "b_norm": "diff_b",
}  # fmt: skip

Tensors = Mapping[str, Tensor]
MISFIT = Size()


# ---- shapes of changes, from tensors without values --------------------------------------------


def _as_layer(change: Tensor, shape: Size) -> Size:
    """The layer's shape if the change has its rows and columns, however it is folded."""
    return shape if change.flatten(1).shape == (shape[0], shape[1:].numel()) else MISFIT


def _lora(t: Tensors, shape: Size) -> Size:
    up, down = t[UP].flatten(1), t[DOWN]
    if MID in t:  # a convolution's
        down = torch.einsum("m n h w, n j -> m j h w", t[MID], down.flatten(1))
    return _as_layer(up @ down.flatten(1), shape)


def _loha(t: Tensors, shape: Size) -> Size:
    if ("hada_t1" in t) != ("hada_t2" in t):
        return MISFIT
    first, second = (
        _product(t[f"hada_w{i}_a"], t[f"hada_w{i}_b"], t.get(f"hada_t{i}")) for i in "12"
    )
    return _as_layer(first * second, shape) if first.shape == second.shape else MISFIT


def _lokr(t: Tensors, shape: Size) -> Size:
    """A core, `lokr_t2`, is a convolution's, and neither model has one."""
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    second = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return _as_layer(second.repeat(first.shape), shape) if "lokr_t2" not in t else MISFIT


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    return a @ b if core is None else torch.einsum("i j h w, j r, i p -> p r h w", core, b, a)


def _glora(t: Tensors, shape: Size) -> Size:
    """W a1 a2 + b1 b2; in LyCORIS's older layout W a2 a1 + b2 b1."""
    a1, a2, b1, b2 = (t[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    weight = torch.empty(shape, device="meta").flatten(1)
    if b1.shape[0] == shape[0]:
        return _as_layer(weight @ a1 @ a2 + b1 @ b2, shape)
    return _as_layer(weight @ a2 @ a1 + b2 @ b1, shape)


def _oft(t: Tensors, shape: Size) -> Size:
    blocks, rows, columns = t["oft_blocks"].shape
    return shape if rows == columns and blocks * rows == shape[0] else MISFIT


def _boft(t: Tensors, shape: Size) -> Size:
    factors, blocks, rows, columns = t["oft_blocks"].shape
    square = rows == columns and rows % 2 == 0 and blocks * rows == shape[0]
    scaled = "rescale" not in t or t["rescale"].shape == (shape[0], *[1] * (len(shape) - 1))
    return shape if square and scaled and shape[0] % (rows << (factors - 1)) == 0 else MISFIT


# ---- kinds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """
    Args:
        required: suffixes of the tensors that it always has: one of each entry's alternatives.
        optional: suffixes of those that it may have.
        shape: what it changes, from its tensors and the layer's shape.
        target: what of the layer it changes.
        dims: dimensions of the first required tensor, where they tell kinds apart.
    """

    name: str
    required: tuple[tuple[tuple[str, ...], ...], ...]
    optional: tuple[str, ...]
    shape: Callable[[Tensors, Size], Size]
    target: str = "weight"
    dims: int | None = None

    def of(self, tensors: Tensors) -> dict[str, Tensor] | None:
        """Its tensors among a module's; None if one is missing."""
        names: list[str] = []
        for alternatives in self.required:
            whole = [option for option in alternatives if tensors.keys() >= set(option)]
            if not whole:
                return None
            names += whole[0]
        if self.dims is not None and tensors[names[0]].ndim != self.dims:
            return None
        names += [name for name in self.optional if name in tensors]
        return {name: tensors[name] for name in names}


def _all(*names: str) -> tuple[tuple[tuple[str, ...], ...], ...]:
    return ((names,),)


SCALES = ("alpha", "dora_scale")
KINDS = (
    Kind("LoRA", _all(UP, DOWN), (MID, RESHAPE, *SCALES), _lora),
    Kind(
        "LoHa",
        _all("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        ("hada_t1", "hada_t2", *SCALES),
        _loha,
    ),
    Kind(
        "LoKr",
        (
            (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")),
            (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")),
        ),
        ("lokr_t2", *SCALES),
        _lokr,
    ),
    Kind("GLoRA", _all("a1.weight", "a2.weight", "b1.weight", "b2.weight"), SCALES, _glora),
    Kind("OFT", _all("oft_blocks"), ("alpha",), _oft, dims=3),
    Kind("BOFT", _all("oft_blocks"), ("alpha", "rescale"), _boft, dims=4),
    Kind("difference", _all("diff"), (), lambda t, _: t["diff"].shape),
    Kind("weight", _all("set_weight"), (), lambda t, _: t["set_weight"].shape),
    Kind("difference", _all("diff_b"), (), lambda t, _: t["diff_b"].shape, target="bias"),
)


@dataclass(frozen=True)
class Change:
    """What a file does to one module.

    Args:
        module: its name in the file.
        keys: the file's keys.
        tensors: by the suffix that the host reads.
    """

    module: str
    kind: Kind
    keys: tuple[str, ...]
    tensors: dict[str, Tensor]

    def fits(self, shape: Size) -> bool:
        """Whether the layer's weight or bias, of this shape, can be changed so."""
        if not all(tensor.numel() for tensor in self.tensors.values()):
            return False
        empty = {name: torch.empty(t.shape, device="meta") for name, t in self.tensors.items()}
        try:
            changed = self.kind.shape(empty, shape)
        except (RuntimeError, IndexError, ValueError):  # of torch, which finds no such product
            return False
        return changed == shape and self._scales_fit(shape) and self._keeps(shape)

    def _scales_fit(self, shape: Size) -> bool:
        """alpha is one number; DoRA's magnitudes are a column or a row."""
        alpha, magnitudes = self.tensors.get("alpha"), self.tensors.get("dora_scale")
        if alpha is not None and not (alpha.numel() == 1 and math.isfinite(alpha.item())):
            return False
        ones = (1,) * (len(shape) - 1)
        return magnitudes is None or magnitudes.shape in (
            (shape[0], *ones),
            (1, *shape[1:2], *ones[1:]),
        )

    def _keeps(self, shape: Size) -> bool:
        """Whether the file leaves the layer its size."""
        size = self.tensors.get(RESHAPE)
        return size is None or size.tolist() == list(shape)


def changes_of(lora: Tensors) -> tuple[list[Change], list[str]]:
    """The changes in a file, and the keys that belong to none."""
    modules: dict[str, dict[str, str]] = {}
    unread = []
    for key in lora:
        match = TENSOR_SUFFIX.search(key)
        module, suffix = key[: match.start()] if match else "", match[0][1:] if match else key
        name = SAME.get(suffix, suffix)
        if match is None or name in modules.setdefault(module, {}):
            unread.append(key)
        else:
            modules[module][name] = key
    changes = []
    for module, keys in modules.items():
        read: set[str] = set()
        for kind in KINDS:
            tensors = kind.of({name: lora[key] for name, key in keys.items()})
            if tensors is not None:
                changes.append(Change(module, kind, tuple(keys[name] for name in tensors), tensors))
                read |= tensors.keys()
        unread += [key for name, key in keys.items() if name not in read]
    return changes, unread
