"""Products with packed matrices: every kernel, in every layout, against the dequantised matrix."""

import pytest
import torch
import torch.nn.functional as F
from glm_image.glm_core.quant.kernels import (
    IN_TILES,
    GroupedInt4,
    Int8InNibbles,
    Kernel,
    RowwiseInt8,
    kernel_for,
    kernels_of,
    passes_trial,
)
from glm_image.glm_core.quant.linear import PackedLinear, lay_out, pack_layers
from glm_image.glm_core.quant.packing import FORMATS, Packing, dequantise, packing, quantise
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

CPU = torch.device("cpu")
SHAPES = [(64, 64), (192, 96), (256, 4096), (128, 160)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.float() - expected).norm() / expected.norm()).item()


def cpu_nibbles():
    """This machine's int4 product."""
    (kernel,) = (k for k in kernels_of(CPU) if isinstance(k, GroupedInt4))
    return kernel.nibbles


def variants() -> dict[str, Kernel]:
    """Kernels of a CPU, and of other devices with the CPU's product in them."""
    nibbles = cpu_nibbles()
    return {
        "grouped": GroupedInt4(nibbles),
        "grouped, read by its product": GroupedInt4(nibbles._replace(read=None)),
        "rowwise": RowwiseInt8(),
        "int8 in nibbles": Int8InNibbles(nibbles),
        "int8 in nibbles, read by its product": Int8InNibbles(nibbles._replace(read=None)),
    }


def stored_matrix(shape: tuple[int, int], kernel: Kernel) -> tuple[Packing, Tensor]:
    form = packing(shape, f"int{kernel.bits}")
    return form, quantise(random(*shape) + 0.1, form.name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", variants())
def test_a_kernel_multiplies_as_the_dequantised_matrix_does(variant, shape) -> None:
    kernel = variants()[variant]
    form, stored = stored_matrix(shape, kernel)
    assert kernel.takes(form)
    laid_out = kernel.lay_out(form, stored)
    for rows in (1, 3, 40):
        x = random(rows, shape[1], seed=1).bfloat16()
        expected = F.linear(x.float(), dequantise(stored, form, torch.float32))
        assert relative_error(kernel.product(form, x, laid_out), expected) < 0.006


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", variants())
def test_unpacking_restores_the_stored_bytes(variant, shape) -> None:
    kernel = variants()[variant]
    form, stored = stored_matrix(shape, kernel)
    laid_out = kernel.lay_out(form, stored)
    assert torch.equal(kernel.restore(form, laid_out), stored)
    assert laid_out.nbytes <= 1.3 * stored.nbytes  # narrow groups


@pytest.mark.parametrize("name", FORMATS)
def test_a_cpu_has_a_kernel_for_the_full_sizes(name) -> None:
    for shape in ((4096, 4096), (256, 4096), (27392, 4096), (4096, 13696)):
        assert kernel_for(packing(shape, name), CPU) is not None


def test_a_kernel_with_another_order_of_numbers_is_not_used() -> None:
    nibbles = cpu_nibbles()
    swapped = nibbles._replace(lay_out=lambda joined: nibbles.lay_out(joined << 4 | joined >> 4))
    other_rows = nibbles._replace(lay_out=lambda joined: nibbles.lay_out(joined.flip(0)))
    assert passes_trial(GroupedInt4(nibbles), CPU)
    for wrong in (swapped, other_rows):
        assert not passes_trial(GroupedInt4(wrong), CPU)
        assert not passes_trial(Int8InNibbles(wrong), CPU)


def test_a_kernel_that_the_device_refuses_is_not_used() -> None:
    """Torch has no CPU kernel of IN_TILES."""
    assert not passes_trial(GroupedInt4(IN_TILES), CPU)
    assert all(kernel.operation != IN_TILES.operation for kernel in kernels_of(CPU))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no room"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling")],
)
def test_a_full_device_says_nothing_about_its_kernels(monkeypatch, error) -> None:
    """The trial is made again when there is room."""
    (kernel,) = (k for k in kernels_of(CPU) if isinstance(k, GroupedInt4))

    def full(form, stored):
        raise error

    kernels_of.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(kernel, "lay_out", full)
        with pytest.raises(RuntimeError, match=str(error)):
            kernels_of(CPU)
    assert kernel in kernels_of(CPU)


@pytest.mark.parametrize("kind", [GroupedInt4, Int8InNibbles])
def test_the_layout_for_gpus_has_the_shapes_that_torch_declares(kind) -> None:
    """Torch's shape functions check every argument, and nothing is computed."""
    kernel = kind(IN_TILES)
    form = packing((64, 256), f"int{kernel.bits}")
    with FakeTensorMode():
        laid_out = kernel.lay_out(form, torch.empty(form.nbytes, dtype=torch.uint8))
        out = kernel.product(form, torch.empty(3, 256, dtype=torch.bfloat16), laid_out)
        assert out.shape == (3, 64)
        assert out.dtype == torch.bfloat16
        assert kernel.restore(form, laid_out).shape == (form.nbytes,)


# ---- the layer ---------------------------------------------------------------------------------


def layer_of(shape: tuple[int, int], name: str, few_rows: bool) -> tuple[nn.Linear, PackedLinear]:
    """A plain layer with dequantised weights, and the packed one."""
    plain = nn.Linear(shape[1], shape[0])
    plain.weight = nn.Parameter(random(*shape), requires_grad=False)
    network = nn.ModuleDict({"layer": nn.Linear(shape[1], shape[0], device="meta")})
    pack_layers(network, {"layer": True}, name, few_rows)
    packed = network["layer"]
    state = {"weight": quantise(plain.weight, name), "bias": plain.bias}
    packed.load_state_dict(state, assign=True)
    plain.weight.copy_(dequantise(packed.weight, packed.form, torch.float32))
    return plain, packed


def test_a_bias_is_loaded_where_the_plain_layer_had_none_yet() -> None:
    """Some hosts' layers have neither weight nor bias before they are loaded."""
    network = nn.ModuleDict({"layer": nn.Linear(64, 32, bias=False, device="meta")})
    pack_layers(network, {"layer": True}, "int8", few_rows=False)
    weight, bias = quantise(random(32, 64), "int8"), random(32)
    network.load_state_dict({"layer.weight": weight, "layer.bias": bias}, assign=True)
    assert torch.equal(network["layer"](torch.zeros(1, 64))[0], bias)


@pytest.mark.parametrize("shape", [(64, 64), (72, 96), (128, 256)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_as_stored_equals_the_plain_one(name, shape) -> None:
    plain, packed = layer_of(shape, name, few_rows=False)
    lay_out(packed, CPU)
    assert packed.weight.ndim == 1
    x = random(2, 5, shape[1], seed=1)
    torch.testing.assert_close(packed(x), plain(x))
    assert packed(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", FORMATS)
def test_a_laid_out_layer_equals_the_plain_one_within_bf16(name) -> None:
    plain, packed = layer_of((128, 256), name, few_rows=True)
    before = packed.weight.nbytes
    lay_out(packed, CPU)
    laid_out = packed.weight
    assert laid_out.ndim == 2
    assert laid_out.nbytes == before
    x = random(2, 5, 256, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        out = packed(x.to(dtype))
        assert out.dtype == dtype
        assert relative_error(out, plain(x)) < 0.01
    lay_out(packed, CPU)
    assert packed.weight is laid_out


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_without_a_kernel_stays_as_stored(name) -> None:
    """No kernel takes 72 rows in int4, or 40 columns in int8."""
    shape = (72, 96) if name == "int4" else (72, 40)
    assert kernel_for(packing(shape, name), CPU) is None
    plain, packed = layer_of(shape, name, few_rows=True)
    lay_out(packed, CPU)
    x = random(1, shape[1], seed=1)
    torch.testing.assert_close(packed(x), plain(x))


@pytest.mark.parametrize("few_rows", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_is_dequantised_and_quantised_again_in_its_layout(name, few_rows) -> None:
    plain, packed = layer_of((128, 256), name, few_rows)
    lay_out(packed, CPU)
    weight = packed.dequantised(packed.weight, torch.float32)
    assert torch.equal(weight, plain.weight)
    again = packed.requantised(weight)
    assert again.shape == packed.weight.shape
    assert relative_error(packed.dequantised(again, torch.float32), weight) < 0.01


@pytest.mark.parametrize("name", FORMATS)
def test_a_pass_reads_nothing_back_from_the_device(name) -> None:
    """A fake tensor has no values, so reading one raises."""
    _, packed = layer_of((128, 256), name, few_rows=True)
    lay_out(packed, CPU)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert packed(torch.empty(1, 1, 256)).shape == (1, 1, 128)
