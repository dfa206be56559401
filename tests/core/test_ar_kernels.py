"""Triton's kernels for a step against the plain operations, in Triton's interpreter on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from glm_image.glm_core.ar import operations as plain
from glm_image.glm_core.ar.cache import step_mask
from glm_image.glm_core.ar.kernels import triton_operations
from glm_image.glm_core.ar.operations import Rotation, attend_by_products
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
KERNELS = triton_operations()
# batch, cells a step, heads, key heads, features of a head, rotated ones: the first is the hub's
HEADS = [(1, 1, 32, 2, 128, 64), (2, 3, 4, 2, 16, 8), (1, 4, 6, 1, 12, 12)]
DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def require_equal(ours: Tensor, expected: Tensor) -> None:
    """The interpreter cuts numbers to bf16 where a device rounds, an error of up to 2^-7 each."""
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    error = (ours.float() - expected.float()).norm() / expected.float().norm()
    assert error < (1e-6 if ours.dtype == torch.float32 else 2**-7)


def norm(width: int, seed: int, dtype: torch.dtype = torch.float32) -> nn.RMSNorm:
    module = nn.RMSNorm(width, eps=1e-5, dtype=dtype)
    module.weight.data.copy_(normal(width, seed=seed))
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 4096), (2, 3, 72)])
def test_add_norm(shape, dtype) -> None:
    x, y = (normal(*shape, dtype=dtype, seed=seed) for seed in (1, 2))
    after, following = norm(shape[-1], 3, dtype), norm(shape[-1], 4, dtype)
    for last in (following, None):
        ours = KERNELS["add_norm"]["triton"](x, y, after, last)
        expected = plain.add_norm(x, y, after, last)
        require_equal(ours[0], expected[0])
        if last is None:
            assert ours[1] is None
        else:
            require_equal(ours[1], expected[1])


def test_norms_that_a_host_patches_or_fetches_are_left_to_it() -> None:
    class Patched(nn.RMSNorm):
        weight_function = (lambda weight: 2 * weight,)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x, y = normal(1, 1, 64, seed=1), normal(1, 1, 64, seed=2)
    patched, other = Patched(64, eps=1e-5), norm(64, 3)
    ours = KERNELS["add_norm"]["triton"](x, y, other, patched)
    expected = plain.add_norm(x, y, other, patched)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2 * 13696), (3, 2, 2 * 96)])
def test_gate(shape, dtype) -> None:
    x = normal(*shape, dtype=dtype)
    require_equal(KERNELS["gate"]["triton"](x), plain.gate(x))


def linear(width: int, out: int, seed: int, dtype: torch.dtype, bias: bool) -> nn.Linear:
    layer = nn.Linear(width, out, bias=bias, dtype=dtype)
    for offset, part in enumerate(layer.parameters()):
        part.data.copy_(normal(*part.shape, seed=seed + offset))
    return layer


def projections(width=72, heads=64, kv_heads=24, dtype=torch.float32, bias=True) -> list[nn.Linear]:
    sizes = (heads, kv_heads, kv_heads)
    return [linear(width, size, 10 * place, dtype, bias) for place, size in enumerate(sizes)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "sizes"), [((1, 1, 4096), (48, 16)), ((2, 3, 72), (64, 24)), ((16, 1, 300), (96, 8))]
)
def test_project(shape, sizes, bias, dtype) -> None:
    x, layers = normal(*shape, dtype=dtype), projections(shape[-1], *sizes, dtype, bias)
    ours = KERNELS["project"]["triton"](x, *layers)
    for mine, expected in zip(ours, plain.project(x, *layers), strict=True):
        require_equal(mine, expected)


class Patched(nn.Linear):
    weight_function = (lambda weight: 2 * weight,)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.weight, self.bias)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(24, 72, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).T


def replaced_call(layer: nn.Linear) -> nn.Linear:
    call = layer.forward
    layer.forward = lambda x: 2 * call(x)
    return layer


def hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda layer, args, out: 2 * out)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        Patched(72, 24),
        Packed(),
        replaced_call(nn.Linear(72, 24)),
        hooked(nn.Linear(72, 24)),
        nn.Linear(72, 24, bias=False),
    ],
)
def test_projections_that_are_not_plain_are_called(layer) -> None:
    """The last has no bias, and the others have one."""
    x, (q_proj, k_proj, _) = normal(1, 2, 72), projections()
    ours = KERNELS["project"]["triton"](x, q_proj, k_proj, layer)
    for mine, expected in zip(ours, plain.project(x, q_proj, k_proj, layer), strict=True):
        assert torch.equal(mine, expected)


def test_more_rows_than_a_product_takes_are_left_to_the_layers() -> None:
    x, layers = normal(17, 1, 72), projections()
    ours = KERNELS["project"]["triton"](x, *layers)
    for mine, expected in zip(ours, plain.project(x, *layers), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "own"), [*((sizes, False) for sizes in HEADS), (HEADS[1], True)])
def test_rotate_write(sizes, own, dtype) -> None:
    """own: whether each sample has its own positions."""
    batch, length, heads, kv_heads, width, rotated = sizes
    q = normal(batch, length, heads, width, dtype=dtype, seed=1)
    k, v = (normal(batch, length, kv_heads, width, dtype=dtype, seed=seed) for seed in (2, 3))
    angles = normal(*((batch,) if own else ()), length, 1, width, seed=4)
    cos, sin = angles.cos(), angles.sin()
    cos[..., rotated:], sin[..., rotated:] = 1, 0
    rotation = Rotation(cos.to(dtype), sin.to(dtype), rotated)
    position = torch.arange(length) + 9
    written = []
    for rotate_write in (KERNELS["rotate_write"]["triton"], plain.rotate_write):
        layers = normal(5, 2, batch, kv_heads, 32, width, dtype=dtype, seed=5)  # one of several
        rotated_q = rotate_write(q, k, v, rotation, layers[2], position)
        written.append((rotated_q, layers))
    for ours, expected in zip(*written, strict=True):
        require_equal(ours, expected)
    changed = written[0][1] != normal(5, 2, batch, kv_heads, 32, width, dtype=dtype, seed=5)
    assert changed.any(-1).nonzero()[:, [0, 4]].unique(dim=0).tolist() == [
        [2, place] for place in position.tolist()
    ]


@pytest.mark.parametrize(
    ("sizes", "first", "dtype"),
    [
        (HEADS[0], 0, torch.float32),
        (HEADS[0], 64, torch.bfloat16),
        (HEADS[0], 250, torch.float32),
        (HEADS[1], 63, torch.float32),  # in the second part for some of its queries
        (HEADS[2], 126, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", ["split", "products"])
def test_attend(sizes, dtype, first, name) -> None:
    batch, length, heads, kv_heads, width, _ = sizes
    span, room = 256, 512
    layer = normal(2, batch, kv_heads, room, width, dtype=dtype, seed=1)
    q = normal(batch, length, heads, width, dtype=dtype, seed=2)
    position = torch.arange(length) + first
    layer[:, :, :, first + length :] = 1e4  # what no query may see
    keys, values = layer[..., :span, :]
    mask = step_mask(position, heads // kv_heads, span, dtype)
    attend = {**KERNELS["attend"], "products": attend_by_products}[name]
    ours = attend(q, keys, values, mask, position)
    require_equal(ours, plain.attend(q, keys, values, mask, position))


@pytest.mark.parametrize("padding", [(0, 0), (63, 64), (70, 130)])
@pytest.mark.parametrize("name", ["split", "products"])
def test_attend_sees_nothing_before_the_first_position(padding, name) -> None:
    batch, length, heads, kv_heads, width, _ = HEADS[1]
    layer = normal(2, batch, kv_heads, 256, width, seed=1)
    q = normal(batch, length, heads, width, seed=2)
    position, first = torch.arange(length) + 140, torch.tensor(padding)
    for sample, begin in enumerate(padding):
        layer[:, sample, :, :begin] = 1e4
    mask = step_mask(position, heads // kv_heads, 256, torch.float32, first)
    attend = {**KERNELS["attend"], "products": attend_by_products}[name]
    ours = attend(q, *layer, mask, position, first)
    require_equal(ours, plain.attend(q, *layer, mask, position, first))
    for sample, begin in enumerate(padding):
        alone = layer[:, sample : sample + 1, :, begin:]
        seen = step_mask(position - begin, heads // kv_heads, 256 - begin, torch.float32)
        expected = plain.attend(q[sample : sample + 1], *alone, seen, position - begin)
        require_equal(ours[sample : sample + 1], expected)


def test_the_kernels_compile_for_a_gpu(tmp_path) -> None:
    """The interpreter takes more than the compiler does."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("compile_kernels.py"))]
    result = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 8
