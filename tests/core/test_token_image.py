"""Pictures of tokens: palettes, cells, outlines and sheets."""

import itertools

import pytest
import torch
from glm_image.glm_core.data.token_image import (
    DARK,
    LIGHT,
    codebook_palette,
    draw_sheet,
    hash_palette,
    sheet_grid,
)
from glm_image.glm_core.data.tokens import UNKNOWN


@pytest.mark.parametrize("codebook", [50, 16384])
def test_hash_colours_are_distinct_and_never_change(codebook):
    palette = hash_palette(codebook)
    assert palette.shape == (codebook, 3)
    assert palette.min() > DARK - 1e-6
    assert palette.max() <= 1
    assert torch.equal(palette[:50], hash_palette(50))
    sample = palette[-1024:]
    nearest = torch.cdist(sample, sample).fill_diagonal_(1).min()
    assert nearest > 0.5 / codebook ** (1 / 3)
    # Screenshots show these colours, so they must not change.
    torch.testing.assert_close(
        palette[1], torch.tensor([0.4009, 0.2705, 0.1637]), atol=1e-3, rtol=0
    )


def clusters(count=5, size=20, dim=32):
    """Codes around a few directions, and the direction of each."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(count, dim, generator=generator)
    which = torch.arange(count).repeat(size)
    noise = 0.1 * torch.randn(count * size, dim, generator=generator)
    lengths = torch.rand(count * size, 1, generator=generator) + 0.5
    return lengths * (centres[which] + noise), which


def test_similar_codes_have_similar_colours():
    codes, which = clusters()
    palette = codebook_palette(codes)
    assert palette.shape == (len(codes), 3)
    assert palette.min() >= 0
    assert palette.max() <= 1
    distances = torch.cdist(palette, palette)
    similar = which[:, None] == which
    assert distances[similar].max() < distances[~similar].min()


def test_codebook_colours_are_principal_components():
    codes, _ = clusters()
    directions = codes / codes.norm(dim=1, keepdim=True)
    u, s, _ = torch.linalg.svd(directions - directions.mean(dim=0), full_matrices=False)
    components = u[:, :3] * s[:3]
    components = components / components.std(dim=0)
    unclipped = (0.5 + components.abs() / 4).clamp(max=1)
    palette = codebook_palette(codes)
    torch.testing.assert_close((palette - 0.5).abs() + 0.5, unclipped, atol=1e-4, rtol=0)


def test_cells_have_the_colours_of_their_tokens():
    palette = hash_palette(10)
    tokens = torch.tensor([[[1, 2, 3], [4, UNKNOWN, 6]]])
    picture = draw_sheet(tokens, palette, cell_size=4)
    assert picture.shape == (8, 12, 3)
    for row in range(2):
        for column in range(3):
            cell = picture[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            token = int(tokens[0, row, column])
            colour = torch.full((3,), DARK) if token == UNKNOWN else palette[token]
            assert torch.equal(cell, colour.expand(4, 4, 3))


@pytest.mark.parametrize(("cell_size", "width"), [(4, 1), (16, 2)])
def test_locked_cells_are_outlined(cell_size, width):
    palette, locked = hash_palette(4), torch.tensor([[True, False], [False, True]])
    tokens = torch.tensor([[[0, 1], [2, 3]]])
    plain = draw_sheet(tokens, palette, cell_size)
    picture = draw_sheet(tokens, palette, cell_size, locked)
    changed = (picture != plain).any(dim=-1)
    assert (picture[changed] == LIGHT).all()
    first = changed[:cell_size, :cell_size]
    assert first[:width].all()
    assert first[:, -width:].all()
    assert not first[width:-width, width:-width].any()
    assert not changed[:cell_size, cell_size:].any()
    assert torch.equal(first, changed[cell_size:, cell_size:])


def test_a_batch_is_drawn_row_by_row():
    palette = hash_palette(5)
    tokens = torch.arange(5)[:, None, None].expand(5, 2, 2)
    sheet = draw_sheet(tokens, palette, cell_size=4)
    assert sheet.shape == (2 * 8 + 2, 3 * 8 + 2 * 2, 3)
    for i in range(5):
        row, column = divmod(i, 3)
        part = sheet[10 * row : 10 * row + 8, 10 * column : 10 * column + 8]
        assert torch.equal(part, palette[i].expand(8, 8, 3))
    assert (sheet[8:10] == DARK).all()
    assert (sheet[10:, 20:] == DARK).all()


def test_a_batch_is_numbered_from_0():
    tokens = torch.zeros(12, 16, 16, dtype=torch.int32)
    palette = torch.full((1, 3), 0.5)
    sheet = draw_sheet(tokens, palette, 4, numbered=True)
    corners = [
        sheet[66 * row :, 66 * column :][:7, :9, 0]
        for row, column in (divmod(i, 4) for i in range(12))
    ]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(corners, 2))
    assert all(((corner == LIGHT) | (corner == DARK))[:, :5].all() for corner in corners)
    seven, eleven = corners[7], corners[11]
    assert "".join(".#"[int(dot)] for dot in seven[1, :5] == LIGHT) == ".###."
    assert (eleven[5] == LIGHT).sum() == 6  # the feet of both ones
    single = draw_sheet(tokens[:1], palette, 4, numbered=True)
    assert torch.equal(single, draw_sheet(tokens[:1], palette, 4))


@pytest.mark.parametrize(
    ("batch", "shape", "expected"),
    [
        (1, (16, 16), (1, 1)),
        (4, (16, 16), (2, 2)),
        (8, (16, 16), (3, 3)),
        (8, (9, 27), (4, 2)),
        (3, (48, 5), (1, 3)),
    ],
)
def test_sheets_are_nearly_square(batch, shape, expected):
    assert sheet_grid(batch, *shape) == expected
