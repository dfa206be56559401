"""Grids as small data for the page: `ui` values that `web/grids.js` draws on the nodes.

A grid is a batch of layouts or tokens. `colours` are the RGB bytes of every cell in base64,
`locked` are a layout's locked cells as text, and `count` grids are shown of `total`. A grid that
hands mark cells of, in an editor on the node, has these cells too: those that were `marked` in
this run, by whatever input, and those that are `given` as marked, where no input names others.
"""

import base64
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..glm_core.data.cells import format_cells
from ..glm_core.data.grids import Grid
from ..glm_core.data.layout import mask_to_grid
from ..glm_core.data.token_image import cell_colours, hash_palette
from ..glm_core.data.tokens import Layout, SemanticTokens, content_hashes
from ..glm_core.errors import GLMImageError

KEY = "glm_grids"
GIVEN = "glm_given"  # a grid that the node was given, where `KEY` has those that it wrote
MAX_CELLS = 2**17  # of all grids together: half a megabyte in the page and in the history


def grids(*shown: SemanticTokens | Layout) -> dict[str, list[dict[str, Any]]]:
    """The `ui` of a node that shows grids: the first of a list, as many as there is room for."""
    entries, room = [], MAX_CELLS
    for one in shown:
        if room <= 0:
            break
        entries.append(grid(one, room=room))
        room -= entries[-1]["count"] * entries[-1]["rows"] * entries[-1]["columns"]
    return {KEY: entries}


def editable(
    shown: SemanticTokens | Layout, marked: Tensor, given: Tensor, room: int = MAX_CELLS
) -> dict[str, Any]:
    """An entry of which hands mark cells.

    Args:
        marked, given: bool [rows, columns].
        room: as in `grid`.
    """
    cells = {"marked": format_cells(marked), "given": format_cells(given)}
    return grid(shown, room) | cells


def masked_cells(mask: Tensor | None, grid: Grid, otherwise: bool) -> Tensor:
    """The cells of a mask: bool [rows, columns]; all or none without one that can be used.

    Several masks, say, are an error only of a run that uses them, and this is for the page.
    """
    if mask is not None:
        with suppress(GLMImageError):
            return mask_to_grid(mask, grid)
    return torch.full(grid, otherwise)


def grid(shown: SemanticTokens | Layout, room: int = MAX_CELLS) -> dict[str, Any]:
    """One entry of the list that the page gets.

    Args:
        room: cells at most, but one grid is always there.
    """
    is_layout = isinstance(shown, Layout)
    total, rows, columns = shown.ids.shape
    ids = shown.ids[: max(1, room // (rows * columns))]
    palette = hash_palette(shown.codebook) if shown.palette is None else shown.palette
    return {
        "kind": "layout" if is_layout else "tokens",
        "rows": rows,
        "columns": columns,
        "count": len(ids),
        "total": total,
        "colours": base64.b64encode(cell_colours(ids, palette).numpy().tobytes()).decode(),
        "locked": format_cells(shown.locked) if is_layout else "",
        "hashes": content_hashes(ids, shown.codebook),
    }
