"""Grids as small data for the page: `ui` values that `web/grids.js` draws on the nodes.

A grid is a batch of layouts or tokens. `colours` are the RGB bytes of every cell in base64, and
`locked` and `given` are cells as text: those that are locked, and those that came locked into the
node. `count` grids are shown of `total`.
"""

import base64
from typing import Any

from torch import Tensor

from ..glm_core.data.cells import format_cells
from ..glm_core.data.token_image import cell_colours, hash_palette
from ..glm_core.data.tokens import Layout, SemanticTokens, content_hashes

KEY = "glm_grids"
MAX_CELLS = 2**17  # of all grids together: half a megabyte in the page and in the history


def grids(*shown: SemanticTokens | Layout) -> dict[str, list[dict[str, Any]]]:
    """The `ui` of a node that shows grids."""
    return {KEY: [grid(one) for one in shown]}


def grid(shown: SemanticTokens | Layout, given: Tensor | None = None) -> dict[str, Any]:
    """One entry of the list that the page gets.

    Args:
        given: bool [rows, columns], cells that a layout had locked before the node ran.
    """
    is_layout = isinstance(shown, Layout)
    ids = shown.preview if is_layout else shown.tokens
    total, rows, columns = ids.shape
    ids = ids[: max(1, MAX_CELLS // (rows * columns))]
    palette = hash_palette(shown.codebook) if shown.palette is None else shown.palette
    return {
        "kind": "layout" if is_layout else "tokens",
        "rows": rows,
        "columns": columns,
        "count": len(ids),
        "total": total,
        "colours": base64.b64encode(cell_colours(ids, palette).numpy().tobytes()).decode(),
        "locked": format_cells(shown.locked) if is_layout else "",
        "given": "" if given is None else format_cells(given),
        "hashes": content_hashes(ids, shown.codebook),
    }
