"""Triton's kernels for a block of the decoder against the plain operations, in the interpreter."""

import pytest
import torch
from glm_image.glm_core.decoder import operations as plain
from glm_image.glm_core.decoder.embeddings import rotary
from glm_image.glm_core.decoder.kernels import triton_operations
from glm_image.glm_core.decoder.model import Decoder
from glm_image.glm_core.decoder.operations import ATTENTION, FEED_FORWARD, Operations
from test_ar_kernels import normal
from test_decoder import inputs, pair
from torch import Tensor

KERNELS = {field: found["triton"] for field, found in triton_operations().items()}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""The interpreter cuts numbers to bf16 where a device rounds, an error of up to 2^-7 each."""
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# batch, text, rows and columns of the picture, heads, features of a head: the first is the hub's
SIZES = pytest.mark.parametrize(
    "sizes", [(1, 3, (2, 1), 32, 128), (2, 1, (3, 2), 3, 12), (3, 0, (1, 5), 4, 8)], ids=str
)


def require_equal(ours: Tensor, expected: Tensor) -> None:
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    error = (ours.float() - expected.float()).norm()
    assert error <= TOLERANCE[ours.dtype] * expected.float().norm()


def states(sizes, dtype) -> list[Tensor]:
    """Text, picture, attention's output and the vectors of a modulation."""
    batch, text, (rows, columns), heads, width = sizes
    lengths = (text, rows * columns, text + rows * columns, 12)
    return [
        normal(batch, length, heads * width, dtype=dtype, seed=seed) + 0.5
        for seed, length in enumerate(lengths)
    ]


@DTYPES
@SIZES
@pytest.mark.parametrize("first", [ATTENTION, FEED_FORWARD])
def test_modulate(sizes, dtype, first) -> None:
    txt, img, _, vectors = states(sizes, dtype)
    for given in (vectors, vectors[:1]):
        ours = KERNELS["modulate"](txt, img, given, first)
        require_equal(ours, plain.modulate(txt, img, given, first))


@DTYPES
@SIZES
def test_add_modulate(sizes, dtype) -> None:
    given = states(sizes, dtype)
    before = [x.clone() for x in given]
    ours, expected = KERNELS["add_modulate"](*given), plain.add_modulate(*given)
    for mine, theirs in zip(ours, expected, strict=True):
        require_equal(mine, theirs)
    assert all(map(torch.equal, given, before))


@DTYPES
@SIZES
def test_norm_rotate(sizes, dtype) -> None:
    batch, text, (rows, columns), heads, width = sizes
    length = text + rows * columns
    q, k = (normal(batch, length, heads, width, dtype=dtype, seed=seed) + 1 for seed in (1, 2))
    rope = rotary((rows, columns), text, width, "cpu")
    for mine, theirs in zip(
        KERNELS["norm_rotate"](q, k, rope), plain.norm_rotate(q, k, rope), strict=True
    ):
        require_equal(mine, theirs)


def test_states_that_other_nodes_left_in_another_layout() -> None:
    txt, img, attended, vectors = states((2, 2, (3, 2), 3, 12), torch.float32)
    img, attended = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (img, attended))
    given = txt, img, attended, vectors.expand(2, -1, -1)
    for mine, theirs in zip(
        KERNELS["add_modulate"](*given), plain.add_modulate(*given), strict=True
    ):
        require_equal(mine, theirs)


def with_operations(whole: Decoder, operations: Operations) -> Decoder:
    """The same weights under other operations."""
    with torch.device("meta"):
        ours = Decoder(whole.config, choose=lambda *_: operations)
    ours.load_state_dict(whole.state_dict(), assign=True)
    return ours


@pytest.mark.parametrize("shape", ["small", "other channels"])
def test_a_prediction_with_every_kernel(shape) -> None:
    whole, _ = pair(shape)
    args = inputs(whole.config, rows=2, cols=3)
    require_equal(with_operations(whole, Operations(**KERNELS))(**args), whole(**args))


def test_gradients_and_compilers_get_torchs_own_operations() -> None:
    whole, _ = pair("other channels")
    args = inputs(whole.config, rows=1, cols=2)
    expected = whole(**args)

    def refuse(*_):
        raise AssertionError("a kernel where it has no place")

    refusing = Operations(**dict.fromkeys(KERNELS, refuse))
    ours = with_operations(whole, refusing)
    with torch.enable_grad():
        assert torch.equal(ours(**args), expected)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**args), expected)
    # Some nodes compile block by block, and the step around them is not compiled.
    by_block = with_operations(whole, refusing)
    for block in by_block.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    assert torch.equal(by_block(**args), expected)
    torch._dynamo.reset()
