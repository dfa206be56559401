"""Cells of a grid as text, there and back."""

import pytest
import torch
from glm_image.glm_core.data.cells import cells_or_mask, format_cells, parse_cells
from glm_image.glm_core.data.layout import mask_to_grid
from glm_image.glm_core.errors import GLMImageError

GRID = (10, 12)


@pytest.mark.parametrize(
    ("text", "rows", "columns"),
    [
        ("0-7:0-3", slice(0, 8), slice(0, 4)),
        ("9:2", slice(9, 10), slice(2, 3)),
        (" 3 - 3 : 11 ; ", slice(3, 4), slice(11, 12)),
        ("*", slice(None), slice(None)),
        ("0-9:0-11", slice(None), slice(None)),
    ],
)
def test_an_entry_names_rows_and_columns(text, rows, columns) -> None:
    wanted = torch.zeros(GRID, dtype=torch.bool)
    wanted[rows, columns] = True
    assert torch.equal(parse_cells(text, GRID), wanted)


def test_entries_add_up_and_an_empty_text_names_none() -> None:
    both = parse_cells("0-1:0-1; 1-2:1-2", GRID)
    assert torch.equal(both, parse_cells("0-1:0-1", GRID) | parse_cells("1-2:1-2", GRID))
    assert both.sum() == 7
    assert not parse_cells(" ", GRID).any()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("7-0:0", "cells has the rows 7-0: write 0-7"),
        ("0:12", "names column 12, but the grid has the columns 0 to 11"),
        ("10:0", "names row 10, but the grid has the rows 0 to 9"),
        ("1,2", "the entry '1,2': write rows:columns"),
        ("-1:0", "the entry '-1:0'"),
        ("٣:0", "the entry"),
        ("1:2:3", "the entry"),
        ("9999999:0", "the entry"),
        ("0:0;" * 20_000, "80000 characters"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(text, sentence) -> None:
    with pytest.raises(GLMImageError, match=sentence):
        parse_cells(text, GRID)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        ("0-9:0-11", "*"),
        ("2:1;2:0;1:0-1;0:0-1", "0-2:0-1"),
        ("1:1; 1:3; 2:1; 2:3", "1-2:1; 1-2:3"),
    ],
)
def test_equal_cells_have_one_text(text, canonical) -> None:
    assert format_cells(parse_cells(text, GRID)) == canonical


def test_any_cells_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    for share in (0.05, 0.5, 0.95):
        cells = torch.rand(GRID, generator=generator) < share
        assert torch.equal(parse_cells(format_cells(cells), GRID), cells)


def test_cells_replace_a_mask_and_an_empty_text_leaves_it() -> None:
    mask = torch.rand(1, 7, 5)
    assert cells_or_mask(" ", mask, GRID) is mask
    assert cells_or_mask("", None, GRID) is None
    region = cells_or_mask("9:2; 0-3:0-11", mask, GRID)
    assert torch.equal(mask_to_grid(region, GRID), parse_cells("9:2; 0-3:0-11", GRID))
