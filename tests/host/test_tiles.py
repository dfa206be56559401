"""Tiles of a larger picture: painted with their own tokens, or refused, as tile upscalers ask."""

from dataclasses import replace

import comfy.samplers
import pytest
import torch
import torch.nn.functional as F
from comfy_extras.nodes_custom_sampler import SamplerCustom
from glm_image.glm_core.errors import GLMImageError
from helpers import relative_error, stages
from torch import Tensor

import nodes as host

SEED = 5
TILE = 96
"""Pixels of a tile's side: that of the first picture, so that its size tells nothing."""


@pytest.fixture(scope="module")
def run(nodes):
    return stages(nodes, "small", "a poster with the word 'ONE'", (TILE, TILE))


@pytest.fixture(scope="module")
def scaled(nodes, run) -> Tensor:
    """The picture at twice its size, with the texture that it lacks."""
    generator = torch.Generator().manual_seed(0)
    pixels = F.interpolate(run.image.movedim(-1, 1), scale_factor=2, mode="bilinear")
    return (pixels.movedim(1, -1) + torch.rand(1, 192, 192, 3, generator=generator) / 2).clamp(0, 1)


@pytest.fixture(scope="module")
def whole(nodes, run, scaled):
    """The tokens of the scaled picture, and its positive and negative."""
    tokens, *_ = nodes["GLMImageEncodeTokens"].execute(run.ar, scaled, 192, 192).result
    positive, negative, _ = nodes["GLMImageApplyTokens"].execute(run.positive, tokens, -1).result
    return tokens, positive, negative


def cropped(conditioning: list, region, canvas, tile) -> list:
    """A conditioning as Ultimate SD Upscale hands it on for a tile.

    Latents of references are scaled to the canvas, cut out and scaled to the tile, all at 8 pixels
    a latent. A region is (left, top, right, bottom), canvas and tile are (width, height).
    """

    def of_tile(latent: Tensor) -> Tensor:
        size = (canvas[1] // 8, canvas[0] // 8)
        if latent.shape[-2:] != size:
            latent = F.interpolate(latent, size=size, mode="bilinear", align_corners=False)
        left, top, right, bottom = (round(side / 8) for side in region)
        latent = latent[:, :, top:bottom, left:right]
        size = (tile[1] // 8, tile[0] // 8)
        return F.interpolate(latent, size=size, mode="bilinear", align_corners=False)

    out = []
    for states, values in conditioning:
        latents = values.get("reference_latents")
        tiles = {"reference_latents": [of_tile(x) for x in latents]} if latents else {}
        out.append([states, {**values, **tiles}])
    return out


def by_ksampler(model, positive, negative, latent):
    arguments = (model, SEED, 2, 1.5, "euler", "simple", positive, negative, latent)
    return host.common_ksampler(*arguments, denoise=0.5)[0]["samples"]


def by_sampler_custom(model, positive, negative, latent):
    levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
    euler = comfy.samplers.sampler_object("euler")
    inputs = (model, True, SEED, 1.5, positive, negative, euler, levels, latent)
    run = getattr(SamplerCustom, "execute", None) or SamplerCustom().sample
    out = run(*inputs)
    return getattr(out, "result", out)[0]["samples"]


def upscaled(run, sample, picture: Tensor, positive, negative, region, tile=(TILE, TILE), count=1):
    """The latent of a tile, painted in the way of Ultimate SD Upscale."""
    left, top, right, bottom = region
    pixels = picture[:, top:bottom, left:right].movedim(-1, 1)
    pixels = F.interpolate(pixels, size=tile[::-1], mode="bilinear").movedim(1, -1)
    (latent,) = host.VAEEncode().encode(run.vae, pixels.repeat(count, 1, 1, 1))
    canvas = (picture.shape[2], picture.shape[1])
    sides = (cropped(side, region, canvas, tile) for side in (positive, negative))
    return sample(run.model.clone(), *sides, latent)


SAMPLERS = pytest.mark.parametrize("sample", [by_ksampler, by_sampler_custom])


@SAMPLERS
@pytest.mark.parametrize(
    ("region", "tile"),
    [
        ((0, 0, 96, 96), (96, 96)),
        ((96, 32, 192, 128), (96, 96)),
        ((64, 96, 192, 192), (128, 96)),
        ((0, 0, 192, 192), (192, 192)),
    ],
)
def test_a_tile_is_painted_with_the_tokens_of_its_place(
    nodes, run, scaled, whole, sample, region, tile
):
    tokens, positive, negative = whole
    found = upscaled(run, sample, scaled, positive, negative, region, tile)
    left, top, right, bottom = (side // 32 for side in region)
    cells = tokens.tokens[:, top:bottom, left:right]
    own = replace(tokens, tokens=cells, width=tile[0], height=tile[1])
    others = replace(own, tokens=own.tokens.flip(2))
    apply = nodes["GLMImageApplyTokens"].execute
    alone, wrong = (apply(run.positive, given, -1).result[:2] for given in (own, others))
    pixels = scaled[:, region[1] : region[3], region[0] : region[2]]
    (latent,) = host.VAEEncode().encode(run.vae, pixels)
    assert relative_error(found, sample(run.model, *alone, latent)) < 1e-5
    assert relative_error(found, sample(run.model, *wrong, latent)) > 1e-3


def test_a_tile_that_the_upscaler_has_scaled_a_little(run, scaled, whole) -> None:
    """Inner tiles get their padding on both sides and are scaled to the size of the outer ones."""
    _, positive, negative = whole
    scaled_down = upscaled(run, by_ksampler, scaled, positive, negative, (32, 32, 160, 160))
    assert scaled_down.shape == (1, 16, 12, 12)


@SAMPLERS
@pytest.mark.parametrize("region", [(0, 0, 96, 96), (96, 96, 192, 192)])
def test_tokens_of_the_first_picture_are_refused_for_a_tile(run, scaled, sample, region) -> None:
    sentence = (
        r"^The latent is a tile of 96 x 96 pixels, and shows 48 x 48 of the 96 x 96 that .*; .* "
        r"Encode Tokens .* 'Upscale in tiles'\."
    )
    with pytest.raises(GLMImageError, match=sentence):
        upscaled(run, sample, scaled, run.positive, run.negative, region)


def test_tiles_in_one_batch_are_refused(run, scaled, whole) -> None:
    _, positive, negative = whole
    with pytest.raises(GLMImageError, match=r"A batch of 2 tiles .* batch_size to 1\."):
        upscaled(run, by_ksampler, scaled, positive, negative, (0, 0, 96, 96), count=2)


def test_a_tile_of_no_grid_is_refused(run, scaled, whole) -> None:
    _, positive, negative = whole
    with pytest.raises(GLMImageError, match=r"104 x 96 pixels; scale or pad"):
        upscaled(run, by_ksampler, scaled, positive, negative, (0, 0, 104, 96), (104, 96))


def test_references_of_other_nodes_are_kept_beside_the_map(nodes, run) -> None:
    theirs = torch.ones(1, 16, 4, 4)
    positive = [
        [states, {**values, "reference_latents": [theirs]}] for states, values in run.positive
    ]
    for _ in range(2):
        positive, *_ = nodes["GLMImageApplyTokens"].execute(positive, run.tokens, -1).result
        places, kept = positive[0][1]["reference_latents"]
        assert places.shape == (1, 2, 12, 12)
        assert kept is theirs
