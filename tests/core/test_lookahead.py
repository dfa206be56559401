"""Lookahead: the same tokens in fewer passes."""

import pytest
import reference
import torch
from ar_pair import pair
from glm_image.glm_core.ar.lookahead import count_final, guess_row
from glm_image.glm_core.ar.sampler import SamplingRun
from glm_image.glm_core.ar.step import SamplingOptions
from glm_image.glm_core.data.grids import preview_grid
from glm_image.glm_core.data.tokens import Forced
from glm_image.glm_core.errors import GLMImageError

PROMPT = "a cat at the mat"
GRID = (6, 9)


@pytest.mark.parametrize("shape", reference.SHAPES)
@pytest.mark.parametrize("window", [2, 5, 64])
@pytest.mark.parametrize(
    "options", [SamplingOptions(), SamplingOptions(0), SamplingOptions(0.2, 0.3)], ids=str
)
def test_the_tokens_equal_those_written_one_by_one(shape, window, options):
    both = pair(shape)
    for ours, expected in zip(
        both.tokens(PROMPT, GRID, seed=5, batch=2, options=options, lookahead=window),
        both.tokens(PROMPT, GRID, seed=5, batch=2, options=options),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_the_tokens_are_equal_with_forced_cells():
    both, generator = pair("wide"), torch.Generator().manual_seed(2)
    forced = {}
    for name, grid in (("preview", preview_grid(GRID)), ("large", GRID)):
        values = torch.randint(96, (1, *grid), generator=generator)
        forced[name] = Forced(values, torch.rand(grid, generator=generator) < 0.4)
    for ours, expected in zip(
        both.tokens(PROMPT, GRID, seed=5, lookahead=4, **forced),
        both.tokens(PROMPT, GRID, seed=5, **forced),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_a_model_that_repeats_itself_needs_fewer_passes(blocks):
    """Greedy sampling on random weights repeats itself."""
    both, reports = pair("small"), []
    greedy = SamplingOptions(0)
    tokens, preview = both.tokens(PROMPT, GRID, options=greedy)
    alone = len(blocks)
    assert alone == tokens.numel() + preview.numel()
    blocks.clear()
    both.tokens(
        PROMPT, GRID, options=greedy, lookahead=8, progress=lambda *done: reports.append(done)
    )
    assert len(blocks) < 0.9 * alone
    assert max(blocks[1:]) <= 8
    assert reports[-1] == (alone, alone)


def test_draws_are_final_up_to_the_first_wrong_guess_of_any_sample():
    draws = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    right = draws.clone()
    assert count_final(draws, right) == 4
    right[1, 1] = 0
    assert count_final(draws, right) == 2
    right[0, 0] = 0
    assert count_final(draws, right) == 1
    assert count_final(draws[:, :1], right[:, :1]) == 1


def test_a_row_is_guessed_from_above_and_from_the_preview():
    preview = torch.tensor([[[1, 2], [1, 3]]])
    above = torch.tensor([[10, 11, 12, 13]])
    assert guess_row(None, None, (4, 4), 0) is None
    assert guess_row(above, None, (4, 4), 1) is above
    assert guess_row(None, preview, (4, 4), 0).tolist() == [[1, 1, 2, 2]]
    assert guess_row(above, preview, (4, 4), 1).tolist() == [[10, 11, 12, 13]]
    assert guess_row(above, preview, (4, 4), 2).tolist() == [[10, 11, 3, 3]]


def test_a_window_of_no_cell_is_refused():
    with pytest.raises(GLMImageError, match="lookahead is 0"):
        SamplingRun((0,), SamplingOptions(), torch.device("cpu"), torch.float32, lookahead=0)
