"""Layouts as data: locks, masks of any size, composing, and sizes that fit."""

import pytest
import torch
from glm_image.glm_core.data.grids import preview_grid, token_grid
from glm_image.glm_core.data.layout import (
    cells_outside,
    common_batch,
    compose,
    lock,
    locked_cells,
    mask_to_grid,
    require_layout_fits,
    require_tokens_fit,
    sizes_that_fit,
    to_tokens,
)
from glm_image.glm_core.data.tokens import Layout
from glm_image.glm_core.errors import GLMImageError


def layout(height=1024, width=1024, batch=1, first=0, codebook=10_000):
    """A layout whose cells all have different tokens."""
    rows, columns = preview_grid(token_grid(height, width))
    ids = first + torch.arange(batch * rows * columns, dtype=torch.int32)
    locked = torch.zeros(rows, columns, dtype=torch.bool)
    return Layout(ids.view(batch, rows, columns), locked, codebook, height, width)


def half(height, width, *, left=False):
    """A mask over the top or the left half."""
    mask = torch.zeros(1, height, width)
    if left:
        mask[:, :, : width // 2] = 1
    else:
        mask[:, : height // 2] = 1
    return mask


@pytest.mark.parametrize("size", [(1024, 1024), (16, 16), (2, 2), (333, 51), (64, 2048)])
def test_masks_of_any_size_are_stretched_over_the_grid(size):
    mask = mask_to_grid(half(*size), (16, 13))
    assert mask[:8].all() if size[0] != 333 else mask[:7].all()
    assert not mask[8:].any()


def test_a_cell_is_masked_if_at_least_half_is_covered():
    mask = torch.zeros(64, 64)
    mask[:4, :2] = 1  # half of cell (0, 0), which has 4 x 4 pixels
    mask[4:8, :1] = 1  # a quarter of cell (1, 0)
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[0, 0] = True
    assert torch.equal(mask_to_grid(mask, (16, 16)), expected)
    assert torch.equal(mask_to_grid(mask / 2, (16, 16)), torch.zeros(16, 16, dtype=torch.bool))


@pytest.mark.parametrize(("size", "grid"), [((20, 20), (16, 16)), ((64, 64), (19, 13))], ids=str)
def test_partly_covered_pixels_count_by_area(size, grid):
    """The expected cells are means of pixels enlarged so that none crosses a cell's edge."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows, columns = (sorted(torch.randint(n + 1, (2,), generator=generator)) for n in size)
        mask = torch.zeros(size)
        mask[rows[0] : rows[1], columns[0] : columns[1]] = 1
        enlarged = mask.repeat_interleave(grid[0], 0).repeat_interleave(grid[1], 1)
        cells = enlarged.view(grid[0], size[0], grid[1], size[1]).mean(dim=(1, 3))
        assert torch.equal(mask_to_grid(mask, grid), cells >= 0.5 - 1e-6)


def test_a_batch_of_masks_is_refused():
    with pytest.raises(GLMImageError, match="2 masks"):
        mask_to_grid(torch.zeros(2, 8, 8), (16, 16))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_mask_with_pixels_that_are_no_numbers_is_refused(value):
    """Read as a product they would leave no cell of the whole mask."""
    mask = torch.ones(1, 8, 8)
    mask[0, 5, 5] = value
    with pytest.raises(GLMImageError, match="The mask holds pixels that are no numbers"):
        lock(layout(), "masked", mask=mask)
    assert lock(layout(), "masked", mask=mask, cells="0:0").locked.sum() == 1


def test_each_way_to_lock():
    plain, mask = layout(), half(100, 100)
    top = torch.arange(16)[:, None].expand(16, 16) < 8
    assert lock(plain, "whole").locked.all()
    assert torch.equal(lock(plain, "masked", mask=mask).locked, top)
    assert torch.equal(lock(plain, "outside mask", mask=mask).locked, ~top)
    assert not lock(lock(plain, "whole"), "none").locked.any()
    assert torch.equal(lock(plain, "whole").preview, plain.preview)
    assert not plain.locked.any()


@pytest.mark.parametrize("size", [(1024, 1024), (768, 1152)], ids=str)  # 16x16 and 13x19 cells
def test_halves_share_no_cell_and_leave_none_out(size):
    plain = layout(*size)
    rows, columns = plain.locked.shape
    left, right, top, bottom = (
        lock(plain, how).locked for how in ("left", "right", "top", "bottom")
    )
    assert torch.equal(~left, right)
    assert torch.equal(~top, bottom)
    assert left.sum() == rows * -(-columns // 2)  # the middle column is on the left
    assert top.sum() == columns * -(-rows // 2)
    assert left[:, 0].all()
    assert top[0].all()
    quarters = lock(lock(plain, "top"), "right").locked
    assert torch.equal(quarters, top | right)


def test_named_cells_are_locked_and_no_others():
    """Whatever `how`, the mask and earlier locks say; an empty text says nothing."""
    top = lock(layout(), "masked", mask=half(64, 64))
    named = lock(top, "whole", mask=half(64, 64), cells="8-15:0-7; 0:3")
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[8:, :8] = True
    expected[0, 3] = True
    assert torch.equal(named.locked, expected)
    assert lock(top, "none", cells="*").locked.all()
    assert lock(layout(), "whole", cells=" ").locked.all()
    with pytest.raises(GLMImageError, match="names row 16, but the grid has the rows 0 to 15"):
        lock(top, "whole", cells="0-16:0")
    with pytest.raises(GLMImageError, match="write 3-7"):
        lock(top, "whole", cells="7-3:0")


def test_locks_are_added_to_earlier_ones():
    top = lock(layout(), "masked", mask=half(64, 64))
    both = lock(top, "masked", mask=half(64, 64, left=True))
    assert both.locked[:8].all()
    assert both.locked[:, :8].all()
    assert not both.locked[8:, 8:].any()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mask_of_one_colour_locks_all_or_nothing_more(value):
    top, mask = lock(layout(), "masked", mask=half(64, 64)), torch.full((1, 64, 64), value)
    inside, outside = (lock(top, how, mask=mask).locked for how in ("masked", "outside mask"))
    everything, nothing_more = (inside, outside) if value else (outside, inside)
    assert everything.all()
    assert torch.equal(nothing_more, top.locked)


def test_locking_returns_one_layout_of_a_batch_or_all():
    batch = layout(batch=3)
    assert torch.equal(lock(batch, "whole", 2).preview, batch.preview[2:])
    assert torch.equal(lock(batch, "whole").preview, batch.preview[:1])
    assert torch.equal(lock(batch, "whole", -1).preview, batch.preview)
    with pytest.raises(GLMImageError, match="batch_index is 3 and there are 3 layouts; use 0 to 2"):
        lock(batch, "whole", 3)
    with pytest.raises(GLMImageError, match="there is one layout; use 0, or -1 for all"):
        lock(layout(), "whole", 1)


@pytest.mark.parametrize("how", ["masked", "outside mask"])
def test_locking_by_mask_needs_a_mask(how):
    with pytest.raises(GLMImageError, match=f"'{how}', connect a mask"):
        lock(layout(), how)


def test_a_mask_chooses_what_is_pasted():
    base, source = layout(), layout(first=1000)
    made = compose(base, source, mask=half(64, 64))
    assert torch.equal(made.preview[:, :8], source.preview[:, :8])
    assert torch.equal(made.preview[:, 8:], base.preview[:, 8:])
    assert torch.equal(base.preview, layout().preview)


@pytest.mark.parametrize(("row", "column"), [(3, 5), (-3, 5), (-3, -5), (15, 15)])
def test_cells_are_pasted_at_a_row_and_column(row, column):
    base, source = layout(), layout(512, 1024, first=1000)
    made = compose(base, source, row, column)
    rows, columns = source.locked.shape
    for r in range(16):
        for c in range(16):
            inside = 0 <= r - row < rows and 0 <= c - column < columns
            expected = source.preview[0, r - row, c - column] if inside else base.preview[0, r, c]
            assert made.preview[0, r, c] == expected
    assert (made.height, made.width) == (1024, 1024)


@pytest.mark.parametrize(("offset", "said"), [((16, 0), "At row 16"), ((0, -16), "column -16")])
def test_pasting_outside_of_the_base_is_refused(offset, said):
    with pytest.raises(GLMImageError, match=f"{said} no cell .* use -15 to 15"):
        compose(layout(), layout(), *offset)


def test_a_composed_layout_has_the_locks_of_both():
    base = lock(layout(), "masked", mask=half(64, 64))
    source = lock(layout(first=1000), "masked", mask=half(64, 64, left=True))
    made = compose(base, source, row=4)
    expected = base.locked.clone()
    expected[4:, :8] = True
    assert torch.equal(made.locked, expected)
    unmasked = compose(base, source, row=4, mask=torch.zeros(8, 8))
    assert torch.equal(unmasked.locked, base.locked)
    assert torch.equal(unmasked.preview, base.preview)
    union = lock(made, "masked", mask=torch.ones(4, 4).tril())
    assert torch.equal(union.locked, expected | mask_to_grid(torch.ones(4, 4).tril(), (16, 16)))


def test_a_single_layout_composes_with_a_batch():
    one, three = layout(), layout(batch=3, first=1000)
    mask = half(64, 64)
    onto_one, onto_three = compose(one, three, mask=mask), compose(three, one, mask=mask)
    assert torch.equal(onto_one.preview[:, :8], three.preview[:, :8])
    assert torch.equal(onto_one.preview[:, 8:], one.preview[:, 8:].repeat(3, 1, 1))
    assert torch.equal(onto_three.preview[:, :8], one.preview[:, :8].repeat(3, 1, 1))
    assert torch.equal(onto_three.preview[:, 8:], three.preview[:, 8:])
    with pytest.raises(GLMImageError, match="2 base layouts and 3 source layouts"):
        compose(layout(batch=2), three)


def test_composing_across_codebooks_is_refused():
    with pytest.raises(GLMImageError, match="codebook of 10000 and the source one of 9999"):
        compose(layout(), layout(codebook=9999))


@pytest.mark.parametrize("size", [(1024, 1024), (768, 1152), (1152, 384)])
def test_previews_become_the_tokens_of_small_images(size):
    made = layout(*size, batch=2)
    tokens = to_tokens(made)
    rows, columns = made.locked.shape
    assert torch.equal(tokens.tokens, made.preview)
    assert (tokens.height, tokens.width, tokens.codebook) == (32 * rows, 32 * columns, 10_000)


def test_a_layout_fits_every_size_with_a_preview_of_its_shape():
    for size in ((1024, 1024), (512, 512), (2048, 2048)):
        require_layout_fits(layout(), 10_000, *size)
    with pytest.raises(GLMImageError) as refusal:
        require_layout_fits(layout(), 10_000, 768, 1152)
    for part in ("16x16", "1152x768", "13x19", "Use 1024x1024,", "928x928 or 960x960"):
        assert part in str(refusal.value)


def test_a_layout_of_another_codebook_does_not_fit():
    with pytest.raises(
        GLMImageError, match="codebook of the layout is 10000 and the AR model's 64"
    ):
        require_layout_fits(layout(), 64, 1024, 1024)


def test_tokens_fit_only_their_own_size_and_model():
    tokens = to_tokens(layout())
    require_tokens_fit(tokens, 10_000, 512, 512)
    with pytest.raises(GLMImageError, match="images of 512x512 pixels, but 1024x512 are asked"):
        require_tokens_fit(tokens, 10_000, 512, 1024)
    with pytest.raises(
        GLMImageError, match="codebook of the tokens is 10000 and the AR model's 64"
    ):
        require_tokens_fit(tokens, 64, 512, 512)


def test_samples_cycle_through_the_layouts():
    batch = lock(layout(batch=3), "masked", -1, half(64, 64))
    forced = locked_cells(batch, 6)
    assert torch.equal(forced.values, torch.cat([batch.preview, batch.preview]))
    assert torch.equal(forced.mask, batch.locked)
    outside = cells_outside(half(8, 8), to_tokens(batch), 6)
    assert torch.equal(outside.values, forced.values)
    assert torch.equal(outside.mask, ~batch.locked)


@pytest.mark.parametrize("size", [(768, 1152), (384, 1152), (2048, 32)])
def test_suggested_sizes_fit(size):
    made = layout(*size)
    sizes = sizes_that_fit(made, 1024 * 1024)
    assert 1 <= len(sizes) <= 3
    assert sizes[0] == size
    for height, width in sizes:
        require_layout_fits(made, 10_000, height, width)


def test_the_common_batch_of_equal_or_single_ones():
    assert common_batch("a", 4, "b", 1) == common_batch("a", 1, "b", 4) == 4
    assert common_batch("a", 3, "b", 3) == 3
    with pytest.raises(GLMImageError, match="2 a and 4 b"):
        common_batch("a", 2, "b", 4)
