"""The first stage: semantic tokens from a prompt."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..glm_core.ar.requests import SampleRequest
from ..glm_core.ar.step import SamplingOptions
from ..glm_core.data.cells import cells_or_mask
from ..glm_core.data.grids import size_advice
from ..glm_core.data.layout import require_one_origin
from ..glm_core.data.references import References as ReferenceData
from ..glm_core.data.tokens import Layout as LayoutData
from ..glm_core.data.tokens import SemanticTokens
from ..glm_core.errors import InputError, shown
from .grid_ui import GIVEN, editable, grids, masked_cells
from .host.ar_interface import AnyAR
from .host.lists import entries_of, write_lists
from .host.requests import layout_of, requests_of, tokens_of
from .inputs import seed_input, size_inputs
from .messages import warning
from .node import Node
from .types import AR, CATEGORY, Layout, References, Tokens

NO_REGION = (
    "No cell of the tokens is named, so all stay as they are; drag over the picture on the node, "
    "write cells, or connect a mask."
)
NO_LAYOUT = "An image made from references has no layout, because it has no preview stage."
BATCH_OF_LAYOUTS = "A batch of layouts is used batch_size times: all layouts once, then all again."


class SampleTokens(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageSampleTokens",
            display_name="GLM-Image Sample Tokens",
            category=CATEGORY,
            description="Writes an image's semantic tokens: first a preview of about 256 tokens, "
            "which fixes the layout, then one for every 32 x 32 pixels. Image i of a batch equals "
            "a single image with seed + i.",
            inputs=[
                *_sampling_inputs(),
                Layout.Input(
                    "layout",
                    optional=True,
                    tooltip="From GLM-Image Lock Layout. Locked cells stay and cost no time; the "
                    "others are drawn. " + BATCH_OF_LAYOUTS,
                ),
                References.Input(
                    "references",
                    optional=True,
                    tooltip="From GLM-Image Encode Reference: images that the prompt refers to. "
                    "With them no preview is written, so the image has no layout.",
                ),
                Tokens.Input(
                    "tokens",
                    optional=True,
                    tooltip="Tokens of a finished image, to redraw what mask or cells name. "
                    "Connect its locked layout too, or the preview is also drawn anew. After a "
                    "run the node shows them: drag over what shall be redrawn.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The region of tokens to redraw. Of any size; a cell counts as masked "
                    "when at least half of it is.",
                ),
                _lookahead_input(),
                io.String.Input(
                    "cells",
                    default="",
                    optional=True,
                    tooltip="The region of tokens to redraw, in place of mask: rows:columns of 32 "
                    "pixels, numbers or ranges counted from 0, joined by ;: 0-7:0-3; 9:2. * is "
                    "all. Empty: the mask. Written by the picture on the node; you may also type "
                    "it.",
                ),
                _rows_input(),
            ],
            outputs=[
                Tokens.Output(display_name="tokens", is_output_list=True),
                Layout.Output(
                    display_name="layout", is_output_list=True, tooltip="The layout of the image."
                ),
            ],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, rows: list[int] | None = None, **inputs: list[Any] | None) -> io.NodeOutput:
        """Every input is a list, and so is every output."""
        entries = entries_of(inputs)
        requests = [token_requests(**entry) for entry in entries]
        written = write_lists([entry["ar"] for entry in entries], requests, _count(rows))
        tokens, layouts = [], []
        for entry, asked, done in zip(entries, requests, written, strict=True):
            known = entry["ar"].codebook, entry["ar"].palette.colours
            tokens.append(tokens_of(asked, done, *known, entry.get("tokens")))
            # A blocker stands for its own entry alone: nodes after it run for the others.
            layouts.append(
                ExecutionBlocker(NO_LAYOUT)
                if asked[0].references
                else layout_of(asked, done, *known)
            )
        said = warning(_advice(entries) + _without_region(requests))
        return io.NodeOutput(tokens, layouts, ui=said | grids(*tokens) | _given(entries, requests))


def _without_region(requests: list[list[SampleRequest]]) -> list[str]:
    whole = [one.large is not None and bool(one.large.mask.all()) for one, *_ in requests]
    return [NO_REGION] if any(whole) else []


def _given(
    entries: list[dict[str, Any]], requests: list[list[SampleRequest]]
) -> dict[str, list[dict[str, Any]]]:
    """The `ui` of the tokens to redraw a part of: those of the first entry that has some.

    They are the tokens that were given, because the next run redraws these again; what this run
    wrote stands beside them.
    """
    for entry, (asked, *_) in zip(entries, requests, strict=True):
        if asked.large is not None:
            tokens = replace(entry["tokens"], palette=entry["ar"].palette.colours)
            marked = ~asked.large.mask
            given = masked_cells(entry.get("mask"), tuple(marked.shape), otherwise=False)
            return {GIVEN: [editable(tokens, marked, given)]}
    return {GIVEN: []}


def token_requests(
    ar: AnyAR,
    prompt: str,
    width: int,
    height: int,
    seed: int,
    temperature: float,
    top_p: float,
    top_k: int,
    batch_size: int,
    layout: LayoutData | None = None,
    references: ReferenceData | None = None,
    tokens: SemanticTokens | None = None,
    mask: torch.Tensor | None = None,
    lookahead: int = 1,
    cells: str = "",
    kind: str = "tokens",
) -> list[SampleRequest]:
    """The samples of one entry of Sample Tokens' lists.

    Raises:
        GLMImageError: inputs do not belong together.
    """
    require_one_origin(layout, references)
    return requests_of(
        ar.codebook,
        prompt,
        height,
        width,
        seed,
        batch_size,
        SamplingOptions(temperature, top_p, top_k),
        kind=kind,
        layout=layout,
        references=references,
        tokens=tokens,
        mask=_region(cells, mask, tokens),
        lookahead=lookahead,
    )


class SampleLayout(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageSampleLayout",
            display_name="GLM-Image Sample Layout",
            category=f"{CATEGORY}/layout",
            description="Writes only the preview, which fixes an image's layout, in a fraction of "
            "the whole image's time. Sample several, choose one with Lock Layout and connect it "
            "to Sample Tokens. Layout i of a batch equals a single one with seed + i.",
            inputs=[
                *_sampling_inputs(),
                Layout.Input(
                    "layout",
                    optional=True,
                    tooltip="From GLM-Image Lock Layout. Locked cells stay; the others are drawn. "
                    + BATCH_OF_LAYOUTS,
                ),
                _lookahead_input(),
                _rows_input(),
            ],
            outputs=[Layout.Output(display_name="layout", is_output_list=True)],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, rows: list[int] | None = None, **inputs: list[Any] | None) -> io.NodeOutput:
        """Every input is a list, and so is the output."""
        entries = entries_of(inputs)
        requests = [layout_requests(**entry) for entry in entries]
        written = write_lists([entry["ar"] for entry in entries], requests, _count(rows))
        layouts = [
            layout_of(asked, done, entry["ar"].codebook, entry["ar"].palette.colours)
            for entry, asked, done in zip(entries, requests, written, strict=True)
        ]
        return io.NodeOutput(layouts, ui=warning(_advice(entries)) | grids(*layouts))


layout_requests = partial(token_requests, kind="layout")
"""The samples of one entry of Sample Layout's lists."""


def _count(rows: list[int] | None) -> int:
    return rows[0] if rows else 1


def _advice(entries: list[dict[str, Any]]) -> list[str]:
    """Sentences about the entries' sizes, each once."""
    said = [size_advice(entry["height"], entry["width"]) for entry in entries]
    return list(dict.fromkeys(sentence for some in said for sentence in some))


def _region(
    cells: str, mask: torch.Tensor | None, tokens: SemanticTokens | None
) -> torch.Tensor | None:
    """The region of tokens to redraw, as a mask.

    Raises:
        GLMImageError: there are cells and no tokens, or the cells do not fit the tokens' grid.
    """
    if tokens is None:
        if cells.strip():
            raise InputError(
                f"cells is '{shown(cells.strip())}' and no tokens are connected: connect the "
                "tokens to redraw a part of, or empty cells."
            )
        return mask
    return cells_or_mask(cells, mask, tuple(tokens.tokens.shape[1:]))


def _sampling_inputs() -> list[io.Input]:
    """The inputs that Sample Tokens and Sample Layout share."""
    return [
        AR.Input("ar", tooltip="From GLM-Image Load AR Model."),
        io.String.Input(
            "prompt",
            multiline=True,
            tooltip="What to draw; put text to render in quotes. Control tokens such as <sop> are "
            "read as plain text.",
        ),
        *size_inputs(),
        seed_input(
            "The same seed, inputs and weights give the same tokens. Image i of a batch uses "
            "seed + i."
        ),
        io.Float.Input(
            "temperature",
            default=0.9,
            min=0.0,
            max=5.0,
            step=0.01,
            tooltip="Randomness; the checkpoint recommends 0.9. 0 always takes the likeliest "
            "token, which is for tests and gives flat pictures.",
        ),
        io.Float.Input(
            "top_p",
            default=0.75,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Draw from the likeliest tokens that together have this probability; 1 is off.",
        ),
        io.Int.Input(
            "top_k",
            default=0,
            min=0,
            max=2**20,
            tooltip="Draw from this many of the likeliest tokens; 0 is off.",
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=64,
            tooltip="Images to write together. Each step reads the weights once for all of them.",
        ),
    ]


def _lookahead_input() -> io.Int.Input:
    return io.Int.Input(
        "lookahead",
        default=1,
        min=1,
        max=64,
        optional=True,
        tooltip="Up to this many tokens a pass: tokens are guessed from the row above or the "
        "preview and checked together. The result is the same; the speed depends on the picture. "
        "1 is off.",
    )


def _rows_input() -> io.Int.Input:
    return io.Int.Input(
        "rows",
        default=1,
        min=1,
        max=64,
        optional=True,
        tooltip="For lists of inputs, such as of Prompt Lines: up to this many samples of the list "
        "are written together, for nearly the time of one. They need equal sizes and options. "
        "1 writes one entry after the other.",
    )
