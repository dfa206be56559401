"""Forced cells: locked previews and redrawn regions, neither of which changes other draws."""

import pytest
import torch
from ar_pair import pair
from glm_image.glm_core.ar.step import SamplingOptions
from glm_image.glm_core.data.grids import preview_grid, token_grid
from glm_image.glm_core.data.tokens import Forced
from glm_image.glm_core.errors import GLMImageError

PROMPT = "a cat at the mat"
SIZES = {"512x768": (768, 512), "1024x1024": (1024, 1024), "strip": (384, 1152)}


def wholly(values):
    return Forced(values, torch.ones(values.shape[1:], dtype=torch.bool))


def some_cells(grid, share=0.5, seed=0):
    return torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 4])
def test_locking_a_runs_own_layout_gives_the_same_large_grid(size, batch):
    both, grid = pair("small"), token_grid(*SIZES[size])
    tokens, preview = both.tokens(PROMPT, grid, seed=11, batch=batch)
    locked, returned = both.tokens(PROMPT, grid, seed=11, batch=batch, preview=wholly(preview))
    assert torch.equal(returned, preview)
    assert torch.equal(locked, tokens)
    assert len(tokens.unique()) > 16


def test_a_wholly_locked_layout_takes_no_step(blocks):
    both, grid = pair("small"), token_grid(1024, 1024)
    prompt = len(both.prompt(PROMPT, grid))
    preview = torch.randint(0, 64, (1, 16, 16))
    reports = []
    both.tokens(PROMPT, grid, preview=wholly(preview), progress=lambda *r: reports.append(r))
    assert blocks == [prompt, 256] + [1] * 1023
    assert reports[-1] == (1024, 1024)
    blocks.clear()
    both.tokens(PROMPT, grid)
    assert blocks == [prompt] + [1] * 1279


def test_wholly_forced_grids_do_not_run_the_network(blocks):
    both, grid = pair("small"), (3, 5)
    preview = torch.randint(0, 64, (2, *preview_grid(grid)))
    large = torch.randint(0, 64, (2, *grid))
    forced = {"preview": wholly(preview), "large": wholly(large)}
    tokens, returned = both.tokens(PROMPT, grid, batch=2, **forced)
    assert torch.equal(tokens, large)
    assert torch.equal(returned, preview)
    assert blocks == []


@pytest.mark.parametrize("batch", [1, 3])
def test_a_layout_alone_equals_the_preview_of_a_full_run(batch, blocks):
    both, grid = pair("small"), (6, 9)
    layout = both.layout(PROMPT, grid, seed=4, batch=batch)
    assert len(blocks) == layout[0].numel()
    assert torch.equal(layout, both.tokens(PROMPT, grid, seed=4, batch=batch)[1])
    assert len({tuple(p.flatten().tolist()) for p in layout}) == batch


def test_locked_cells_stay_for_any_seed_temperature_and_prompt():
    both, grid = pair("small"), (6, 9)
    values = both.layout(PROMPT, grid, seed=1)
    mask = some_cells(preview_grid(grid))
    drawn = []
    for seed, options, prompt in (
        (2, SamplingOptions(), PROMPT),
        (3, SamplingOptions(), PROMPT),
        (2, SamplingOptions(temperature=3.0, top_p=1.0), "the heat"),
        (2, SamplingOptions(temperature=0), PROMPT),
    ):
        forced = Forced(values, mask)
        layout = both.layout(prompt, grid, seed=seed, options=options, preview=forced)
        assert torch.equal(layout[:, mask], values[:, mask])
        drawn.append(layout[:, ~mask])
        _, preview = both.tokens(prompt, grid, seed=seed, options=options, preview=forced)
        assert torch.equal(preview, layout)
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:i])


def test_locking_some_of_a_runs_own_cells_changes_nothing(blocks):
    both, grid = pair("small"), (6, 9)
    tokens, preview = both.tokens(PROMPT, grid, seed=8, batch=2)
    preview_mask, large_mask = some_cells(preview_grid(grid)), some_cells(grid)
    blocks.clear()
    again, returned = both.tokens(
        PROMPT,
        grid,
        seed=8,
        batch=2,
        preview=Forced(preview, preview_mask),
        large=Forced(tokens, large_mask),
    )
    assert torch.equal(again, tokens)
    assert torch.equal(returned, preview)
    free = int((~preview_mask).sum() + (~large_mask).sum())
    assert len(blocks) == free + (0 if not preview_mask[0, 0] else 1)


def test_each_sample_follows_its_own_layout():
    both, grid = pair("small"), (6, 9)
    previews = torch.randint(
        0, 64, (4, *preview_grid(grid)), generator=torch.Generator().manual_seed(0)
    )
    tokens, returned = both.tokens(PROMPT, grid, seed=20, batch=4, preview=wholly(previews))
    assert torch.equal(returned, previews)
    for i in range(4):
        alone, _ = both.tokens(PROMPT, grid, seed=20 + i, preview=wholly(previews[i : i + 1]))
        assert torch.equal(tokens[i : i + 1], alone)


def test_one_layout_locks_a_whole_batch():
    both, grid = pair("small"), (6, 9)
    preview = both.layout(PROMPT, grid, seed=3)
    shared, returned = both.tokens(PROMPT, grid, seed=3, batch=3, preview=wholly(preview))
    repeated, _ = both.tokens(
        PROMPT, grid, seed=3, batch=3, preview=wholly(preview.repeat(3, 1, 1))
    )
    assert torch.equal(returned, preview.repeat(3, 1, 1))
    assert torch.equal(shared, repeated)
    assert len({tuple(t.flatten().tolist()) for t in shared}) == 3


def test_a_region_is_redrawn_given_all_cells_before_it():
    both, grid, options = pair("small"), (8, 8), SamplingOptions(temperature=1.5, top_p=1.0)
    tokens, preview = both.tokens(PROMPT, grid, seed=1)
    redraw = torch.zeros(grid, dtype=torch.bool)
    redraw[3:6] = True

    def redraw_region(context):
        forced = {"preview": wholly(preview), "large": Forced(context, ~redraw)}
        return both.tokens(PROMPT, grid, seed=2, options=options, **forced)

    again, returned = redraw_region(tokens)
    assert torch.equal(again[:, ~redraw], tokens[:, ~redraw])
    assert torch.equal(returned, preview)
    changed = (again != tokens)[0]
    assert changed.sum() >= redraw.sum() // 2
    # Cells before the region are its context: if they change, so does the region.
    other = tokens.clone()
    other[:, :3] = (other[:, :3] + 7) % 64
    third, _ = redraw_region(other)
    assert not torch.equal(third[:, redraw], again[:, redraw])
    # Cells after it are no context.
    after = tokens.clone()
    after[:, 6:] = (after[:, 6:] + 7) % 64
    fourth, _ = redraw_region(after)
    assert torch.equal(fourth[:, redraw], again[:, redraw])


def test_forcing_no_cell_equals_a_free_run():
    both, grid = pair("small"), (4, 4)
    nothing = Forced(torch.zeros(1, 16, 16), torch.zeros(16, 16, dtype=torch.bool))
    for ours, free in zip(
        both.tokens(PROMPT, grid, preview=nothing), both.tokens(PROMPT, grid), strict=True
    ):
        assert torch.equal(ours, free)


def test_forced_cells_of_another_grid_are_refused():
    with pytest.raises(GLMImageError, match=r"grid of 19x13 .* this image has 16x16"):
        pair("small").tokens(PROMPT, (4, 4), preview=wholly(torch.zeros(1, 19, 13)))


def test_forced_cells_for_another_batch_are_refused():
    with pytest.raises(GLMImageError, match="cells for 2 samples, but 3 are drawn"):
        pair("small").tokens(PROMPT, (4, 4), batch=3, preview=wholly(torch.zeros(2, 16, 16)))
