"""Cells and indices as text: `0-7:0-3; 9:2` is rows 0 to 7 of columns 0 to 3, and one cell more.

Entries `rows:columns`, joined by `;`, are numbers or ranges counted from 0; `*` is every cell.
"""

import re

import torch
from torch import Tensor

from ..errors import InputError, shown
from .grids import Grid

ALL = "*"
_RANGE = r"(\d{1,6})(?:\s*-\s*(\d{1,6}))?"
_ENTRY = re.compile(rf"\s*{_RANGE}\s*:\s*{_RANGE}\s*", re.ASCII)
MAX_LENGTH = 2**16  # of a text; every second cell of a grid of 64 x 64 takes 14,000


def parse_cells(text: str, grid: Grid) -> Tensor:
    """The cells that a text names: bool [rows, columns]; an empty text names none.

    Raises:
        GLMImageError: an entry cannot be read, or leaves the grid; or the text is too long.
    """
    if len(text) > MAX_LENGTH:
        raise InputError(
            f"cells has {len(text)} characters and may have {MAX_LENGTH}: use ranges such as "
            "0-7:0-3, or a mask."
        )
    if text.strip() == ALL:
        return torch.ones(grid, dtype=torch.bool)
    cells = torch.zeros(grid, dtype=torch.bool)
    for entry in filter(str.strip, text.split(";")):
        cells[_slices(entry, grid)] = True
    return cells


def cells_or_mask(text: str, mask: Tensor | None, grid: Grid) -> Tensor | None:
    """A region as a mask: the cells of a text, float [rows, columns]; of an empty one, `mask`.

    Raises:
        GLMImageError: as `parse_cells`.
    """
    return parse_cells(text, grid).float() if text.strip() else mask


def format_cells(cells: Tensor) -> str:
    """The one canonical text for bool [rows, columns].

    Rows with the same columns that follow each other share an entry for each range of columns.
    """
    if cells.all():
        return ALL
    entries: list[str] = []
    for rows, columns in _equal_rows(cells):
        entries += [f"{_span(rows)}:{_span(one)}" for one in columns]
    return "; ".join(entries)


def parse_indices(text: str, count: int) -> list[int]:
    """The indices that a text such as `0,2,5-7` names, in its order; all of `count` if it is empty.

    Raises:
        GLMImageError: an entry cannot be read, or is beyond the batch.
    """
    if len(text) > MAX_LENGTH:
        raise InputError(f"indices has {len(text)} characters and may have {MAX_LENGTH}.")
    indices: list[int] = []
    for entry in filter(str.strip, text.split(",")):
        match = re.fullmatch(rf"\s*{_RANGE}\s*", entry, re.ASCII)
        if match is None:
            raise InputError(
                f"indices has the entry '{shown(entry.strip())}': write numbers and ranges, such "
                "as 0,2,5-7."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"indices has {first}-{last}: write {last}-{first}.")
        if last >= count:
            raise InputError(f"indices names {last}, and there are {count}, from 0.")
        indices += range(first, last + 1)
    return indices or list(range(count))


def ranges_of(marked: list[bool]) -> list[range]:
    """Each unbroken range of True."""
    ranges: list[range] = []
    for i, one in enumerate(marked):
        if one and ranges and ranges[-1].stop == i:
            ranges[-1] = range(ranges[-1].start, i + 1)
        elif one:
            ranges.append(range(i, i + 1))
    return ranges


def _slices(entry: str, grid: Grid) -> tuple[slice, slice]:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise InputError(
            f"cells has the entry '{shown(entry.strip())}': write rows:columns, such as 0-7:0-3 or "
            f"9:2, joined by ;, or {ALL} for all."
        )
    numbers = [int(number) if number else None for number in match.groups()]
    first_row, last_row, first_column, last_column = numbers
    return (
        _slice("row", first_row, last_row, grid[0]),
        _slice("column", first_column, last_column, grid[1]),
    )


def _slice(side: str, first: int, last: int | None, length: int) -> slice:
    last = first if last is None else last
    if last < first:
        raise InputError(f"cells has the {side}s {first}-{last}: write {last}-{first}.")
    if last >= length:
        raise InputError(
            f"cells names {side} {last}, but the grid has the {side}s 0 to {length - 1}."
        )
    return slice(first, last + 1)


def _equal_rows(cells: Tensor) -> list[tuple[range, list[range]]]:
    """Rows with cells, those that follow each other and are equal together, with their columns."""
    groups: list[tuple[range, list[range]]] = []
    for row, marked in enumerate(cells.tolist()):
        columns = ranges_of(marked)
        if groups and groups[-1][0].stop == row and groups[-1][1] == columns:
            groups[-1] = range(groups[-1][0].start, row + 1), columns
        elif columns:
            groups.append((range(row, row + 1), columns))
    return groups


def _span(numbers: range) -> str:
    return str(numbers.start) if len(numbers) == 1 else f"{numbers.start}-{numbers.stop - 1}"
