"""Grids and positions, compared with the reference's."""

import re

import pytest
import reference
import torch
from glm_image.glm_core.data import grids
from glm_image.glm_core.errors import GLMImageError
from transformers import GlmImageProcessor


def test_previews_equal_the_references_for_every_size():
    for height in range(32, 2560, 96):
        for width in range(32, 2560, 32):
            expected = GlmImageProcessor._get_target_shape(None, height, width)
            grid = grids.token_grid(height, width)
            assert (*grid, *grids.preview_grid(grid)) == expected


def test_known_previews():
    assert grids.preview_grid((32, 32)) == (16, 16)
    assert grids.preview_grid((36, 24)) == (19, 13)
    assert grids.preview_grid((64, 64)) == (16, 16)


@pytest.mark.parametrize(
    ("height", "width", "said"),
    [
        (333, 500, r"^An image of 500x333 .* positive multiples of 32\. Use 512x352, and crop"),
        (1000, 1024, r"1024x1000 .*Use 1024x1024, and crop"),
        (1024, 16, r"16x1024 .*Use 32x1024"),
        (1024, 0, r"0x1024 .*Use 32x1024"),
        (-32, 64, r"64x-32 .*Use 64x32"),
        (32, 32 * 257, "8224x32 pixels is too long"),
        (32 * 257, 32, "256 times the shorter"),
    ],
)
def test_sizes_without_a_grid_are_refused(height, width, said):
    with pytest.raises(GLMImageError, match=said):
        grids.token_grid(height, width)


def test_the_longest_aspect_has_a_preview():
    assert grids.preview_grid(grids.token_grid(32, 32 * 256)) == (1, 256)


def test_upsampling_makes_each_token_a_square_of_four():
    tokens = torch.arange(6).view(1, 2, 3)
    assert grids.upsample_tokens(tokens).tolist() == [
        [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5], [3, 3, 4, 4, 5, 5]]
    ]


@pytest.mark.parametrize("grid", [(3, 2), (2, 5), (4, 4)])
def test_positions_equal_the_references(grid):
    """Positions of a prompt, a preview and a large grid, in the order of decoding."""
    model = reference.reference_pipeline("small").vision_language_encoder.model
    preview = grids.preview_grid(grid)
    prompt = torch.full((1, 7), 70)
    prompt_positions, _ = model.get_rope_index(prompt, torch.tensor([[1, *grid], [1, *preview]]))
    assert torch.equal(grids.text_positions(7), prompt_positions[:, 0])
    ours = torch.cat(
        [grids.grid_positions(preview, 7), grids.grid_positions(grid, 7 + max(preview))], dim=1
    )
    end = 7 + max(preview) + max(grid)
    ours = torch.cat([ours, grids.text_positions(1, end)], dim=1)
    assert torch.equal(ours, model._cached_decode_position_ids[0])


@pytest.mark.parametrize(
    ("height", "width", "said"),
    [
        (512, 2048, []),
        (1024, 1024, []),
        (480, 1024, ["1024x480, .* weak at 512; sample a larger"]),
        (1024, 2080, ["2080x1024, .* 1024 to 2048 pixels; sample a smaller"]),
        (96, 4096, ["weak at 512", "sample a smaller"]),
    ],
)
def test_sizes_that_the_model_was_not_trained_for(height, width, said):
    sentences = grids.size_advice(height, width)
    assert len(sentences) == len(said)
    for sentence, part in zip(sentences, said, strict=True):
        assert re.search(part, sentence)
