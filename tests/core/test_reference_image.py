"""Reference images: their sizes, and pixels equal to those of Pillow and the processor."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.vision.pixels import (
    ImageConfig,
    bring_to_size,
    halve,
    opaque,
    reference_size,
    vision_pixels,
)
from PIL import Image
from transformers.models.glm_image.image_processing_pil_glm_image import (
    GlmImageImageProcessorPil,
    smart_resize,
)

HUB = json.loads(
    (Path(__file__).parents[1] / "configs" / "hub" / "processor_preprocessor_config.json")
    .read_text()
)  # fmt: skip
CONFIG = ImageConfig.from_dict(HUB)


def photo(height, width, kind="smooth", seed=0):
    """uint8 [H, W, 3]: waves as in a photo, noise, or black and white (which overshoots)."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "smooth":
        y, x = torch.linspace(0, 9, height)[:, None], torch.linspace(0, 7, width)
        waves = torch.stack([torch.sin(x + c) * torch.cos(y * (c + 1)) for c in range(3)], dim=-1)
        return ((waves + 1) * 127.5).round().to(torch.uint8)
    noise = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return noise if kind == "noise" else (noise > 127).to(torch.uint8) * 255


def pillow(image, size, filter=Image.Resampling.BICUBIC):
    return torch.from_numpy(np.array(Image.fromarray(image.numpy()).resize(size[::-1], filter)))


# ---- sizes --------------------------------------------------------------------------------------


def test_the_processor_takes_every_reference_size_as_it_is():
    sides = range(512, 2049, 32)
    for height, width in itertools.product(sides, sides):
        assert reference_size(height, width, CONFIG) == (height, width)
        theirs = smart_resize(height, width, 16, HUB["min_pixels"], HUB["max_pixels"])
        assert theirs == (height // 2, width // 2)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (1024, 1024)),
        ((1080, 1920), (1088, 1920)),
        ((1040, 1024), (1024, 1024)),
        ((384, 512), (512, 672)),
        ((3000, 2000), (2048, 1376)),
        ((32, 32), (512, 512)),
        ((32, 128), (512, 2048)),
        ((8000, 2001), (2048, 512)),
        ((520, 2080), (512, 2048)),
        ((100_000, 100_000), (2048, 2048)),
    ],
)
def test_the_reference_size_of_an_image(size, expected):
    assert reference_size(*size, CONFIG) == expected
    assert reference_size(*size[::-1], CONFIG) == expected[::-1]


def test_every_reference_size_is_within_the_limits():
    generator = torch.Generator().manual_seed(0)
    for height in torch.randint(32, 5000, (2000,), generator=generator).tolist():
        width = max(32, int(height * torch.empty(1).uniform_(0.25, 4, generator=generator)))
        if max(height, width) > 4 * min(height, width):
            continue
        h, w = reference_size(height, width, CONFIG)
        assert h % 32 == w % 32 == 0
        assert min(h, w) >= 512
        assert max(h, w) <= 2048
        assert max(h, w) <= 4 * min(h, w)
        assert abs(np.log((h / w) / (height / width))) < np.log(
            1 + 32 / 512
        )  # at most one step of 32


def test_the_limits_come_from_the_config():
    small = ImageConfig.from_dict(HUB | {"min_pixels": 100 * 100, "max_pixels": 700 * 700})
    assert (small.min_side, small.max_side) == (128, 672)
    assert reference_size(64, 64, small) == (128, 128)
    assert reference_size(900, 700, small) == (672, 512)  # 522.7 rounds down
    assert reference_size(144, 576, small) == (128, 512)  # 576 by 128 would be too long


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((31, 64), "64x31 pixels: use one with at least 32"),
        ((64, 31), "31x64 pixels"),
        ((100, 401), r"401x100 pixels, an aspect of 4.01: crop it .* at most 4 times"),
        ((401, 100), "100x401 pixels"),
    ],
)
def test_small_or_long_images_are_refused(size, said):
    with pytest.raises(GLMImageError, match=said):
        reference_size(*size, CONFIG)


# ---- pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["noise", "black and white"])
def test_halving_equals_pillows_bicubic(kind):
    sides = [2, 4, 6, 8, 10, 14, 16, 34, 64, 96, 130]
    for height, width in itertools.product(sides, sides):
        image = photo(height, width, kind, seed=height * width)
        ours = halve(image[None])[0]
        # Two calls force rows first in every Pillow; version 13 may filter columns first.
        along_rows = pillow(image, (height, width // 2))
        assert torch.equal(ours, pillow(along_rows, (height // 2, width // 2))), (height, width)
        if height <= 2 * width:
            assert torch.equal(ours, pillow(image, (height // 2, width // 2))), (height, width)


def test_halving_treats_images_of_a_batch_alike():
    batch = torch.stack([photo(64, 32, "noise", seed) for seed in range(3)])
    assert torch.equal(halve(batch), torch.cat([halve(image[None]) for image in batch]))


def in_patches(pixels):
    """[B, C, H, W] in the processor's order: [B * h * w, C * 16 * 16]."""
    b, c, height, width = pixels.shape
    cells = pixels.reshape(b, c, height // 16, 16, width // 16, 16)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, c * 256)


@pytest.mark.parametrize("kind", ["smooth", "noise", "black and white"])
@pytest.mark.parametrize("size", [(512, 512), (640, 512), (512, 1024), (544, 2048), (1024, 512)])
def test_pixels_equal_the_processors(size, kind):
    image = photo(*size, kind)
    expected = GlmImageImageProcessorPil(**HUB)(Image.fromarray(image.numpy()))
    assert expected["image_grid_thw"].tolist() == [[1, size[0] // 32, size[1] // 32]]
    ours = vision_pixels(image[None] / 255, CONFIG)
    assert ours.dtype == torch.float32
    assert torch.equal(in_patches(ours), torch.as_tensor(expected["pixel_values"]))


def test_pixels_use_the_configs_numbers():
    numbers = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 0.5]}
    image = photo(512, 544)
    processor = GlmImageImageProcessorPil(**HUB | numbers | {"rescale_factor": 1 / 127})
    expected = processor(Image.fromarray(image.numpy()))["pixel_values"]
    config = ImageConfig.from_dict(HUB | numbers | {"rescale_factor": 1 / 127})
    ours = vision_pixels(image[None] / 255, config)
    assert torch.equal(in_patches(ours), torch.as_tensor(expected))


def test_pixels_are_rounded_to_8_bits():
    between, level = torch.full((1, 32, 32, 3), 100.6), torch.full((1, 32, 32, 3), 101.0)
    assert torch.equal(vision_pixels(between / 255, CONFIG), vision_pixels(level / 255, CONFIG))


def test_pixels_of_partial_tokens_are_refused():
    with pytest.raises(GLMImageError, match=r"64x48 .* multiples of 32"):
        vision_pixels(torch.zeros(1, 48, 64, 3), CONFIG)


@pytest.mark.parametrize("size", [(64, 96), (200, 31), (24, 320), (97, 61), (97, 100), (50, 61)])
def test_resizing_equals_pillows_lanczos_without_rounding(size):
    image = torch.rand(2, 97, 61, 3, generator=torch.Generator().manual_seed(3))
    ours = bring_to_size(image, size)
    assert ours.shape == (2, *size, 3)
    for b, channel in itertools.product(range(2), range(3)):
        theirs = pillow(image[b, ..., channel], size, Image.Resampling.LANCZOS).clamp(0, 1)
        assert (ours[b, ..., channel] - theirs).abs().max() < 1e-5
    assert ours.min() >= 0
    assert ours.max() <= 1


def test_resizing_to_the_same_size_changes_nothing():
    image = torch.rand(1, 64, 32, 3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(bring_to_size(image, (64, 32)), image)


def test_transparent_pixels_are_put_over_white():
    colour = torch.tensor([0.2, 0.4, 0.0])
    for alpha, expected in ((1.0, [0.2, 0.4, 0]), (0.0, [1, 1, 1]), (0.5, [0.6, 0.7, 0.5])):
        pixel = torch.cat([colour, torch.tensor([alpha])]).expand(1, 2, 2, 4)
        assert torch.allclose(opaque(pixel), torch.tensor(expected).expand(1, 2, 2, 3).float())


def test_opaque_pixels_are_clamped_to_0_and_1():
    image = torch.rand(1, 4, 4, 3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(opaque(image), image)
    assert opaque(torch.tensor([[[[-0.5, 0.5, 1.5]]]])).tolist() == [[[[0.0, 0.5, 1.0]]]]
    assert opaque(image.half()).dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_refused(value):
    image = torch.zeros(1, 4, 4, 3)
    image[0, 2, 1, 0] = value
    with pytest.raises(GLMImageError, match=r"^The image holds pixels that are no numbers"):
        opaque(image)


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(GLMImageError, match=r"^The image has 2 channels and not 3 or 4"):
        opaque(torch.zeros(1, 4, 4, 2))


# ---- config -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"merge_size": 2}, "merge_size is 2, but only 1"),
        ({"temporal_patch_size": 2}, "temporal_patch_size is 2"),
        ({"resample": 2}, "resample is 2"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"patch_size": 14}, "patch_size is 14, but a token of 32 pixels needs 16"),
        ({"max_pixels": 500 * 500}, "no side between 512 and 480"),
    ],
)
def test_an_unsupported_config_is_refused(change, said):
    with pytest.raises(GLMImageError, match=said):
        ImageConfig.from_dict(HUB | change)


def test_an_incomplete_config_is_refused():
    with pytest.raises(GLMImageError, match="no 'image_std'"):
        ImageConfig.from_dict({k: v for k, v in HUB.items() if k != "image_std"})
