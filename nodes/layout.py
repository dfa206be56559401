"""Nodes on layouts: choose and lock one, paste one into another, paint one as a small image."""

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..glm_core.data.cells import cells_or_mask
from ..glm_core.data.layout import LOCKS, compose, to_tokens
from ..glm_core.data.layout import lock as lock_cells
from ..glm_core.data.tokens import Layout as LayoutData
from ..glm_core.data.tokens import SemanticTokens
from ..glm_core.errors import BatchError
from .grid_ui import KEY, MAX_CELLS, editable, grid, masked_cells
from .inputs import check_choices, require_choices
from .node import Node
from .types import CATEGORY, Layout, Tokens

SUBCATEGORY = f"{CATEGORY}/layout"
REACH = 256
"""Cells by which a layout can be moved; no preview is longer."""
GRID_TYPES = [Layout, Tokens]
"""Of inputs that take either. What comes out is of the kind that went in, on a layout's link."""


class LockLayout(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageLockLayout",
            display_name="GLM-Image Lock Layout",
            category=SUBCATEGORY,
            description="Takes one layout of a batch and locks it, or a part of it. A sampler "
            "keeps the locked cells under any prompt, seed and temperature and draws the others "
            "anew. After a run it shows the layouts: click one to take it, drag over it to lock "
            "cells. New locks are added to those the layout has; none removes all.",
            inputs=[
                Layout.Input("layout", tooltip="From a sampler, Load Tokens or Encode Tokens."),
                io.Combo.Input(
                    "lock",
                    options=list(LOCKS),
                    default=LOCKS[0],
                    tooltip="whole: every cell. masked: what the mask covers. outside mask: "
                    "everything else. none: unlock all. left, right, top, bottom: that half. The "
                    "middle one of an odd number of rows is in the top half; of columns, in the "
                    "left one.",
                ),
                io.Int.Input(
                    "batch_index",
                    default=0,
                    min=-1,
                    max=4095,
                    tooltip="Which layout of the batch to take, counted from 0, row by row in Show "
                    "Tokens. -1 takes all.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="For masked and outside mask. Of any size: it is stretched over the "
                    "layout. A cell counts as masked when at least half of it is.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The layouts as pictures, to choose by: Layout To Tokens, Apply "
                    "Tokens, Decode in a few steps, VAE Decode. As many as there are layouts.",
                ),
                io.String.Input(
                    "cells",
                    default="",
                    optional=True,
                    tooltip="The cells to lock, such as 0-7:0-3; 9:2 (rows:columns from 0; * is "
                    "all). Written by the picture on the node; you may also type it. If it is not "
                    "empty, exactly these cells are locked, in place of lock and mask.",
                ),
            ],
            outputs=[Layout.Output(display_name="layout")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, lock: str | None = None) -> bool | str:
        return check_choices(("lock", lock, LOCKS))

    @classmethod
    def execute(
        cls,
        layout: LayoutData,
        lock: str,
        batch_index: int,
        mask: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        cells: str = "",
    ) -> io.NodeOutput:
        require_choices(("lock", lock, LOCKS))
        locked = lock_cells(layout, lock, batch_index, mask, cells)
        shown = replace(layout, locked=locked.locked)
        entry = editable(shown, locked.locked, layout.locked) | {"taken": batch_index}
        return io.NodeOutput(locked, ui={KEY: [entry], **_pictures(cls, images, entry)})


def _pictures(
    cls: type[io.ComfyNode], images: torch.Tensor | None, entry: dict[str, Any]
) -> dict[str, list[dict[str, str]]]:
    """The `ui` of the pictures [B, height, width, 3] of the layouts in an entry of `grid`.

    Raises:
        GLMImageError: there are not as many pictures as layouts.
    """
    if images is None:
        return {}
    if len(images) != entry["total"]:
        raise BatchError(
            f"There are {len(images)} images and {entry['total']} layouts: give a picture of each "
            "layout, or disconnect images."
        )
    saved = ui.PreviewImage(images[: entry["count"]], cls=cls).as_dict()["images"]
    return {"glm_images": saved}


class ComposeLayouts(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageComposeLayouts",
            display_name="GLM-Image Compose Layouts",
            category=SUBCATEGORY,
            description="Pastes one layout, or the part of it that cells or a mask name, into "
            "another. Both keep their locks; connect Lock Layout after it to lock the result. "
            "After a run it shows both: drag over the source for what to take, and drag this "
            "where it should go. It pastes tokens into tokens, too: connect Layout To Tokens "
            "after it.",
            inputs=[
                io.MultiType.Input(
                    "base",
                    GRID_TYPES,
                    tooltip="The layout to paste into, or tokens. The result has its size.",
                ),
                io.MultiType.Input(
                    "source",
                    GRID_TYPES,
                    tooltip="The layout to take cells from, or tokens where the base is tokens.",
                ),
                io.Int.Input(
                    "row",
                    default=0,
                    min=-REACH,
                    max=REACH,
                    tooltip="How many cells the source is moved down. A preview has about 16 rows; "
                    "cells outside the base are cut off.",
                ),
                io.Int.Input(
                    "column",
                    default=0,
                    min=-REACH,
                    max=REACH,
                    tooltip="How many cells the source is moved to the right.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The part of the source to paste. Unconnected: all of it.",
                ),
                io.String.Input(
                    "cells",
                    default="",
                    optional=True,
                    tooltip="The part of the source to paste, in place of mask: rows:columns, "
                    "numbers or ranges counted from 0, joined by ;: 0-7:0-3; 9:2. * is all. Empty: "
                    "the mask. Written by the picture on the node; you may also type it.",
                ),
            ],
            outputs=[
                Layout.Output(
                    display_name="layout",
                    tooltip="The layout. Of tokens: tokens, for GLM-Image Layout To Tokens.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        base: LayoutData | SemanticTokens,
        source: LayoutData | SemanticTokens,
        row: int,
        column: int,
        mask: torch.Tensor | None = None,
        cells: str = "",
    ) -> io.NodeOutput:
        shape = tuple(source.ids.shape[1:])
        chosen = cells_or_mask(cells, mask, shape)
        composed = compose(base, source, row, column, chosen)
        taken, given = (masked_cells(one, shape, otherwise=True) for one in (chosen, mask))
        room = MAX_CELLS // 2
        entry = editable(source, taken, given, room) | {"row": row, "column": column}
        return io.NodeOutput(composed, ui={KEY: [entry, grid(base, room)]})


class LayoutToTokens(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageLayoutToTokens",
            display_name="GLM-Image Layout To Tokens",
            category=SUBCATEGORY,
            description="Turns a layout into the tokens of a small image, 32 pixels a cell. Decode "
            "them in a few steps to see the layout as an image before the large one is written.",
            inputs=[
                io.MultiType.Input(
                    "layout",
                    GRID_TYPES,
                    tooltip="The layout to paint. A batch makes a batch of tokens. Tokens, such as "
                    "Compose Layouts makes of tokens, come out as they are.",
                )
            ],
            outputs=[Tokens.Output(display_name="tokens")],
        )

    @classmethod
    def execute(cls, layout: LayoutData | SemanticTokens) -> io.NodeOutput:
        return io.NodeOutput(to_tokens(layout))
