"""Bytes that a decoder's block moves at the hub's sizes, counted: docs/speed.md has the table.

A block runs on the meta device. Every operation that is no view reads its arguments and writes its
results once. Attention counts as one operation, as on GPUs where torch fuses it.
"""

import json
from collections import Counter

import pytest
import torch
from glm_image.glm_core.decoder.embeddings import rotary
from glm_image.glm_core.decoder.kernels import modulation, rotation, triton_operations
from glm_image.glm_core.decoder.model import Block, DecoderConfig
from glm_image.glm_core.decoder.operations import PLAIN, Operations
from glm_image.glm_core.layers import Layers
from test_step_counts import HUB, META, SPEED, VIEWS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TEXT = 24
BF16 = torch.bfloat16


class Moved(TorchDispatchMode):
    """Counts the bytes of tensors that operations read or write."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        out = function(*args, **(kwargs or {}))
        if name not in VIEWS:
            kind = "products" if name in ("mm", "addmm", "bmm") else name
            self.count(kind, (args, kwargs, out))
        return out

    def count(self, kind: str, tensors) -> None:
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor):
                self.nbytes[kind] += x.untyped_storage().nbytes() if 0 in x.stride() else x.nbytes


class CountedKernel:
    """Every argument of a kernel is read or written once; one that is given twice counts once."""

    def __init__(self, moved: Moved) -> None:
        self.moved = moved

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs) -> None:
        tensors = {id(x): x for x in args if isinstance(x, Tensor)}
        self.moved.count("kernels", [*tensors.values()])


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_) -> Tensor:
    return q.transpose(1, 2).flatten(2)  # on the meta device a view: the same as for both


def between_products(side: int, operations: Operations, moved: Moved) -> float:
    """GB of one block beside its products, attention and GELU."""
    config = DecoderConfig.from_dict(json.loads((HUB / "transformer_config.json").read_text()))
    block = Block(config, Layers(nn, META, BF16), attention)
    grid = (side // 16, side // 16)
    img, txt = (
        torch.empty(1, length, config.hidden_size, device=META, dtype=BF16)
        for length in (grid[0] * grid[1], TEXT)
    )
    vec = torch.empty(1, config.time_embed_dim, device=META, dtype=BF16)
    rope = rotary(grid, TEXT, config.attention_head_dim, META)
    with moved:
        block(img, txt, vec, rope, operations=operations)
    left_out = ("products", "gelu", "clone")  # clone: the heads of a result of attention, joined
    return sum(n for kind, n in moved.nbytes.items() if kind not in left_out) / 1e9


@pytest.mark.parametrize("side", [1024, 2048])
def test_the_table_of_a_blocks_bytes_is_true(side, monkeypatch) -> None:
    plain = between_products(side, PLAIN, Moved())
    moved = Moved()
    for module in (modulation, rotation):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, CountedKernel(moved))
    kernels = {field: found["triton"] for field, found in triton_operations().items()}
    fused = between_products(side, Operations(**kernels), moved)
    row = f"| {side}x{side} | {plain:.2f} GB | {fused:.2f} GB |"
    assert row in SPEED.read_text(), row
