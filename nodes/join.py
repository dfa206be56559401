"""Batches joined and split, grid cells as a mask, a text as a list of prompts."""

import re

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..glm_core.data.cells import parse_cells, parse_indices
from ..glm_core.data.grids import Grid, token_grid
from ..glm_core.data.layout import grid_to_mask
from ..glm_core.data.tokens import Layout as LayoutData
from ..glm_core.data.tokens import SemanticTokens
from ..glm_core.errors import InputError, PromptError, SizeError
from .host.joining import count_of, join_layouts, join_tokens
from .inputs import MAX_SIDE, check_choices, require_choices
from .node import Node
from .types import CATEGORY, Layout, Tokens

PLACES = range(1, 9)
SPLITS = ("lines", "blocks")


class JoinTokens(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageJoinTokens",
            display_name="GLM-Image Join Tokens",
            category=CATEGORY,
            description="Joins batches of tokens, of layouts, or of both into one batch, and "
            "takes some of it. All must be of one size and one model.",
            inputs=[
                *(
                    Tokens.Input(f"tokens_{i}", optional=True, tooltip="Tokens to join, in order.")
                    for i in PLACES
                ),
                *(
                    Layout.Input(f"layout_{i}", optional=True, tooltip="Layouts to join, in order.")
                    for i in PLACES
                ),
                io.String.Input(
                    "indices",
                    default="",
                    tooltip="Which to take, counted from 0 over all inputs, in this order: 0,2,5-7 "
                    "takes five. Empty: all.",
                ),
            ],
            outputs=[Tokens.Output(display_name="tokens"), Layout.Output(display_name="layout")],
        )

    @classmethod
    def execute(cls, indices: str, **batches: SemanticTokens | LayoutData | None) -> io.NodeOutput:
        tokens = [batches[f"tokens_{i}"] for i in PLACES if batches.get(f"tokens_{i}") is not None]
        layouts = [batches[f"layout_{i}"] for i in PLACES if batches.get(f"layout_{i}") is not None]
        if not tokens and not layouts:
            raise InputError("Join Tokens has nothing to join; connect tokens, layouts or both.")
        return io.NodeOutput(
            join_tokens(tokens, parse_indices(indices, count_of(tokens)))
            if tokens
            else ExecutionBlocker("Join Tokens has no tokens to give; connect some to it."),
            join_layouts(layouts, parse_indices(indices, count_of(layouts)))
            if layouts
            else ExecutionBlocker("Join Tokens has no layout to give; connect one to it."),
        )


class CellsToMask(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageCellsToMask",
            display_name="GLM-Image Cells To Mask",
            category=f"{CATEGORY}/layout",
            description="Cells of a grid as a mask in pixels, such as for Set Latent Noise Mask. "
            "With a layout they are those of its preview, else those of 32 x 32 pixels.",
            inputs=[
                io.String.Input(
                    "cells",
                    default="",
                    tooltip="rows:columns, numbers or ranges counted from 0, joined by ;: 0-7:0-3; "
                    "9:2. * is all.",
                ),
                *(
                    io.Int.Input(
                        side,
                        default=0,
                        min=0,
                        max=MAX_SIDE,
                        step=32,
                        tooltip=f"{side.capitalize()} of the mask in pixels; 0 takes that of the "
                        "tokens' or the layout's images.",
                    )
                    for side in ("width", "height")
                ),
                Layout.Input("layout", optional=True, tooltip="The layout whose cells are meant."),
                Tokens.Input("tokens", optional=True, tooltip="The tokens whose cells are meant."),
            ],
            outputs=[io.Mask.Output(display_name="mask")],
        )

    @classmethod
    def execute(
        cls,
        cells: str,
        width: int,
        height: int,
        layout: LayoutData | None = None,
        tokens: SemanticTokens | None = None,
    ) -> io.NodeOutput:
        if layout is not None and tokens is not None:
            raise InputError(
                "Cells To Mask takes one grid and got two; connect a layout or tokens, not both."
            )
        shown = layout or tokens
        if shown is None and not (width and height):
            raise SizeError(
                f"The mask's size is {width}x{height}; set width and height, or connect a layout "
                "or tokens."
            )
        height, width = height or shown.height, width or shown.width
        grid = token_grid(height, width) if shown is None else _grid(shown)
        return io.NodeOutput(grid_to_mask(parse_cells(cells, grid), (height, width))[None])


def _grid(shown: SemanticTokens | LayoutData) -> Grid:
    return tuple(shown.ids.shape[1:])


class PromptLines(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImagePromptLines",
            display_name="GLM-Image Prompt Lines",
            category=CATEGORY,
            description="Makes a list of prompts of a text. Most nodes after it run once for each; "
            "Sample Tokens takes the whole list and writes `rows` of it together.",
            inputs=[
                io.String.Input(
                    "text", multiline=True, tooltip="The prompts; empty ones are left out."
                ),
                io.Combo.Input(
                    "split",
                    options=list(SPLITS),
                    default=SPLITS[0],
                    tooltip="lines: one prompt a line. blocks: prompts of several lines, parted by "
                    "empty lines.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="prompts", is_output_list=True, tooltip="A list, in order."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, split: str | None = None) -> bool | str:
        return check_choices(("split", split, SPLITS))

    @classmethod
    def execute(cls, text: str, split: str) -> io.NodeOutput:
        require_choices(("split", split, SPLITS))
        parts = text.splitlines() if split == SPLITS[0] else re.split(r"\n[^\S\n]*\n", text)
        prompts = [part.strip() for part in parts if part.strip()]
        if not prompts:
            raise PromptError("The text holds no prompt; write one a line.")
        return io.NodeOutput(prompts)
