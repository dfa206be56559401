"""Nodes on layouts: choose and lock one, join two, paint one as a small image."""

import torch
from comfy_api.latest import io

from ..glm_core.data.cells import cells_or_mask
from ..glm_core.data.layout import LOCKS, compose, to_tokens
from ..glm_core.data.layout import lock as lock_cells
from ..glm_core.data.tokens import Layout as LayoutData
from .inputs import check_choices, require_choices
from .node import Node
from .types import CATEGORY, Layout, Tokens

SUBCATEGORY = f"{CATEGORY}/layout"
REACH = 256
"""Cells by which a layout can be moved; no preview is longer."""


class LockLayout(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageLockLayout",
            display_name="GLM-Image Lock Layout",
            category=SUBCATEGORY,
            description="Takes one layout of a batch and locks it, or a part of it. A sampler "
            "keeps the locked cells under any prompt, seed and temperature and draws the others "
            "anew. New locks are added to those the layout has; none removes all.",
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
            ],
            outputs=[Layout.Output(display_name="layout")],
        )

    @classmethod
    def validate_inputs(cls, lock: str | None = None) -> bool | str:
        return check_choices(("lock", lock, LOCKS))

    @classmethod
    def execute(
        cls, layout: LayoutData, lock: str, batch_index: int, mask: torch.Tensor | None = None
    ) -> io.NodeOutput:
        require_choices(("lock", lock, LOCKS))
        return io.NodeOutput(lock_cells(layout, lock, batch_index, mask))


class ComposeLayouts(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageComposeLayouts",
            display_name="GLM-Image Compose Layouts",
            category=SUBCATEGORY,
            description="Pastes one layout, or the part of it that cells or a mask name, into "
            "another. Both keep their locks; connect Lock Layout after it to lock the result.",
            inputs=[
                Layout.Input("base", tooltip="The layout to paste into. The result has its size."),
                Layout.Input("source", tooltip="The layout to take cells from."),
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
                    tooltip="The part of the source to paste, in place of mask: rows:columns of "
                    "its preview, numbers or ranges counted from 0, joined by ;: 0-7:0-3; 9:2. * "
                    "is all. Empty: the mask.",
                ),
            ],
            outputs=[Layout.Output(display_name="layout")],
        )

    @classmethod
    def execute(
        cls,
        base: LayoutData,
        source: LayoutData,
        row: int,
        column: int,
        mask: torch.Tensor | None = None,
        cells: str = "",
    ) -> io.NodeOutput:
        chosen = cells_or_mask(cells, mask, tuple(source.locked.shape))
        return io.NodeOutput(compose(base, source, row, column, chosen))


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
                Layout.Input(
                    "layout", tooltip="The layout to paint. A batch makes a batch of tokens."
                )
            ],
            outputs=[Tokens.Output(display_name="tokens")],
        )

    @classmethod
    def execute(cls, layout: LayoutData) -> io.NodeOutput:
        return io.NodeOutput(to_tokens(layout))
