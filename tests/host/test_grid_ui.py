"""What the page is told of grids: colours, locks and hashes, small enough for a history."""

import base64

import numpy as np
import pytest
import torch
from glm_image.glm_core.data.layout import lock, to_tokens
from glm_image.glm_core.data.token_image import hash_palette
from glm_image.glm_core.data.tokens import Layout, SemanticTokens
from glm_image.nodes import grid_ui


@pytest.fixture
def layouts():
    """Two layouts of 16 x 16 cells, all ids different."""
    ids = torch.arange(512, dtype=torch.int32).view(2, 16, 16)
    return Layout(ids, torch.zeros(16, 16, dtype=torch.bool), 512, 1024, 1024)


def colours(grid):
    raw = np.frombuffer(base64.b64decode(grid["colours"]), dtype=np.uint8)
    return raw.reshape(grid["count"], grid["rows"], grid["columns"], 3)


def test_it_has_each_cells_colour_the_locks_and_a_hash_of_each_grid(layouts):
    locked = lock(layouts, "left", batch_index=-1)
    (grid,) = grid_ui.grids(locked)["glm_grids"]
    assert (grid["kind"], grid["count"], grid["total"]) == ("layout", 2, 2)
    assert grid["locked"] == "0-15:0-7"
    expected = (255 * hash_palette(512)).round().numpy().astype(np.uint8)
    assert (colours(grid).reshape(-1, 3) == expected).all()
    assert len(set(grid["hashes"])) == 2
    assert grid_ui.grid(lock(layouts, "none", 1))["hashes"] == grid["hashes"][1:]


def test_a_models_own_palette_stays_with_its_layouts(layouts):
    grey = torch.linspace(0, 1, 512)[:, None].expand(512, 3)
    coloured = Layout(layouts.preview, layouts.locked, 512, 1024, 1024, grey)
    expected = (255 * grey[256:]).round().numpy().astype(np.uint8)
    for shown in (lock(coloured, "whole", 1), to_tokens(lock(coloured, "whole", 1))):
        assert (colours(grid_ui.grid(shown)).reshape(-1, 3) == expected).all()
        assert shown.palette is grey


def test_a_batch_of_large_grids_is_shown_in_part():
    tokens = SemanticTokens(torch.zeros(64, 64, 64, dtype=torch.int32), 4, 2048, 2048)
    grid = grid_ui.grid(tokens)
    assert (grid["kind"], grid["count"], grid["total"]) == ("tokens", 32, 64)
    assert len(grid["colours"]) < 2**20


def test_a_mask_that_cannot_be_used_marks_what_no_mask_does():
    """A run that takes cells in its place goes on."""
    for mask in (torch.zeros(2, 8, 8), torch.full((1, 8, 8), torch.nan), None):
        for otherwise in (False, True):
            marked = grid_ui.masked_cells(mask, (4, 6), otherwise)
            assert torch.equal(marked, torch.full((4, 6), otherwise))
