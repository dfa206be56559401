"""int8 and int4: the error of a number, the bytes of a matrix, and which weights are packed."""

import json
from pathlib import Path

import pytest
import torch
from glm_image.glm_core.ar.model import ARConfig, ARModel
from glm_image.glm_core.decoder.model import Decoder, DecoderConfig
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files.weight_dtypes import is_layer_matrix
from glm_image.glm_core.quant.packing import (
    FORMATS,
    SLICE,
    dequantise,
    packing,
    quantise,
)
from glm_image.glm_core.vision.encoder import VISION_PREFIXES
from torch import Tensor

HUB = Path(__file__).parents[1] / "configs" / "hub"
BF16 = 2.0**-9  # the relative error of rounding to bf16


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def outliers() -> Tensor:
    """A number of 40 deviations in every row, and a row of large numbers."""
    weight = gaussian(48, 256)
    weight[:, 7] = 40
    weight[3] += 100
    return weight


def flat() -> Tensor:
    """Rows of zeros, of one repeated number, and of bf16's smallest number."""
    weight = torch.zeros(4, 128)
    weight[1] = 0.1
    weight[2] = -3
    weight[3] = torch.finfo(torch.bfloat16).tiny
    return weight


WEIGHTS = {"gaussian": gaussian(96, 256), "outliers": outliers(), "flat": flat()}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_int8_changes_a_number_by_at_most_half_a_scale(weight) -> None:
    form = packing(tuple(weight.shape), "int8")
    error = (dequantise(quantise(weight, "int8"), form, torch.float32) - weight).abs()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    assert (error <= 0.5 * scale * (1 + 2 * BF16) + 1e-30).all()


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_int4_changes_a_number_by_at_most_half_a_step_and_the_roundings(weight) -> None:
    form = packing(tuple(weight.shape), "int4")
    restored = dequantise(quantise(weight, "int4"), form, torch.float32)
    grouped = weight.unflatten(1, (-1, form.group))
    error = (restored.unflatten(1, (-1, form.group)) - grouped).abs()
    low, high = (edge.unsqueeze(-1) for edge in grouped.aminmax(dim=-1))
    step = (high - low) / 15
    middle = (low + 8 * step).abs()
    # Rounded to bf16 are the step, 15 of which reach the far end, and the middle.
    roundings = BF16 * (16 * step + middle * 1.01)
    assert (error <= 0.5 * step + roundings + 1e-30).all()


@pytest.mark.parametrize("name", FORMATS)
def test_the_error_of_gaussian_weights_is_that_of_even_steps(name) -> None:
    """Errors spread evenly over a step, so their deviation is a step times sqrt(1 / 12)."""
    weight = gaussian(512, 1024)
    form = packing((512, 1024), name)
    error = dequantise(quantise(weight, name), form, torch.float32) - weight
    steps = (
        weight.abs().amax(dim=1) / 127
        if name == "int8"
        else (lambda low, high: (high - low) / 15)(*weight.unflatten(1, (-1, 128)).aminmax(dim=-1))
    )
    expected = steps.square().mean().sqrt() / 12**0.5
    assert error.std().item() == pytest.approx(expected.item(), rel=0.03)


@pytest.mark.parametrize("name", FORMATS)
def test_slicing_rows_changes_nothing(name, monkeypatch) -> None:
    weight = gaussian(33, 64)
    whole = quantise(weight, name)
    assert weight.numel() < SLICE
    monkeypatch.setattr(f"{quantise.__module__}.SLICE", 5 * 64)
    assert torch.equal(quantise(weight, name), whole)


@pytest.mark.parametrize("name", FORMATS)
def test_bf16_weights_and_their_float32_copies_are_packed_alike(name) -> None:
    weight = gaussian(16, 128).bfloat16()
    assert torch.equal(quantise(weight, name), quantise(weight.float(), name))


@pytest.mark.parametrize(
    ("columns", "group"), [(256, 128), (13696, 128), (192, 64), (96, 32), (160, 32)]
)
def test_int4_takes_the_widest_group_that_divides(columns, group) -> None:
    form = packing((64, columns), "int4")
    assert form.group == group
    assert form.nbytes == 64 * columns // 2 + 4 * 64 * columns // group


def test_int4_refuses_a_width_that_no_group_divides() -> None:
    with pytest.raises(GLMImageError, match=r"multiple of 32.*width 72; choose int8"):
        packing((64, 72), "int4")


def test_a_file_of_packed_matrices_stays_aligned() -> None:
    assert packing((3, 5), "int8").nbytes == 64
    assert all(packing((rows, 96), name).nbytes % 64 == 0 for rows in (1, 7) for name in FORMATS)


# ---- which weights -----------------------------------------------------------------------------


def hub_shapes(network: str) -> dict[str, torch.Size]:
    """Names and shapes at full size."""
    kind, config, folder = {
        "ar": (ARModel, ARConfig, "vision_language_encoder"),
        "decoder": (Decoder, DecoderConfig, "transformer"),
    }[network]
    read = json.loads((HUB / f"{folder}_config.json").read_text())
    with torch.device("meta"):
        state = kind(config.from_dict(read)).state_dict()
    return {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize(
    ("network", "layers", "matrices", "unpacked"),
    [
        ("ar", 40, 6, {"model.language_model.embed_tokens.weight", "lm_head.weight"}),
        (
            "decoder",
            30,
            6,
            {
                "glyph_projector.net.0.proj.weight",
                "glyph_projector.net.2.weight",
                "image_projector.proj.weight",
                "norm_out.linear.weight",
                "prior_projector.net.0.proj.weight",
                "prior_projector.net.2.weight",
                "prior_token_embedding.weight",
                "proj_out.weight",
                "time_condition_embed.condition_embedder.linear_1.weight",
                "time_condition_embed.condition_embedder.linear_2.weight",
                "time_condition_embed.timestep_embedder.linear_1.weight",
                "time_condition_embed.timestep_embedder.linear_2.weight",
                *(f"transformer_blocks.{i}.norm1.linear.weight" for i in range(30)),
            },
        ),
    ],
)
def test_the_layers_matrices_are_packed_and_no_others(network, layers, matrices, unpacked) -> None:
    shapes = hub_shapes(network)
    packed = {key for key, shape in shapes.items() if is_layer_matrix(key, len(shape))}
    assert len(packed) == layers * matrices
    assert {key for key, shape in shapes.items() if len(shape) == 2} - packed == unpacked


def test_the_vision_tower_is_not_packed() -> None:
    assert not is_layer_matrix("model.visual.blocks.0.attn.qkv.weight", 2)
    assert all(prefix.startswith("model.v") for prefix in VISION_PREFIXES)


@pytest.mark.parametrize(
    ("network", "name", "gibibytes"),
    [
        ("ar", "int8", 9.01),
        ("ar", "int4", 5.45),
        ("decoder", "int8", 7.28),
        ("decoder", "int4", 4.64),
    ],
)
def test_bytes_at_full_size(network, name, gibibytes) -> None:
    """The numbers of the documentation's table."""
    nbytes = sum(
        packing(tuple(shape), name).nbytes
        if is_layer_matrix(key, len(shape))
        else 2 * shape.numel()
        for key, shape in hub_shapes(network).items()
    )
    assert nbytes / 2**30 == pytest.approx(gibibytes, abs=0.005)
