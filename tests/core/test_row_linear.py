"""A single row uses torch's vector kernel where that is faster, with equal results."""

import pytest
import torch
from glm_image.glm_core.ar import row_linear
from glm_image.glm_core.ar.row_linear import RowLinear, cpu_has
from tape import Tape
from torch import Tensor, nn

VECTOR = {"aten::mv", "aten::addmv"}
WIDTH, OUT = 96, 160


@pytest.fixture(params=[True, False], ids=["faster", "slower"])
def faster(request, monkeypatch) -> bool:
    """Whether the vector kernel counts as faster. Both kernels run on every CPU."""
    monkeypatch.setattr(row_linear, "_is_faster", lambda x: request.param)
    return request.param


def pair(bias: bool, dtype: torch.dtype) -> tuple[RowLinear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    ours = RowLinear(WIDTH, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def multiplied(layer: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """The product, and whether the vector kernel computed it."""
    with torch.inference_mode(), Tape() as tape:
        out = layer(x)
    return out, bool(tape.operations & VECTOR)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (1, 1, WIDTH)])
def test_a_single_row_in_bf16(faster, bias, shape):
    ours, plain = pair(bias, torch.bfloat16)
    x = torch.randn(shape).bfloat16()
    out, by_vector = multiplied(ours, x)
    assert by_vector == faster
    assert out.shape == (*shape[:-1], OUT)
    expected = plain.double()(x.double())
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.bfloat16, (1, 2, WIDTH)), (torch.float32, (1, 1, WIDTH))]
)
def test_other_inputs_use_the_plain_product(faster, dtype, shape):
    ours, plain = pair(bias=True, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    out, by_vector = multiplied(ours, x)
    assert not by_vector
    assert torch.equal(out, plain(x))


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True, "amx_bf16": True}, True), ({"avx512_bf16": True}, False)],
)
def test_the_vector_kernel_is_faster_only_with_amx(monkeypatch, capabilities, expected):
    monkeypatch.setattr(row_linear, "cpu_has", cpu_has.__wrapped__)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert row_linear._is_faster(torch.zeros(1)) == expected
    assert not row_linear._is_faster(torch.zeros(1, device="meta"))


def test_older_torch_lists_no_capabilities(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not cpu_has.__wrapped__("amx_bf16", "avx512_bf16")
