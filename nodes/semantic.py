"""The first stage: semantic tokens from a prompt."""

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..glm_core.ar.step import SamplingOptions
from ..glm_core.data.references import References as ReferenceData
from ..glm_core.data.tokens import Layout as LayoutData
from ..glm_core.data.tokens import SemanticTokens
from ..glm_core.errors import GLMImageError
from .host.ar import HostAR
from .types import AR, CATEGORY, Layout, References, Tokens

MAX_SIDE = 16384  # as ComfyUI's own nodes
NO_LAYOUT = "An image made from references has no layout: there is no preview stage with them."
BATCH_OF_LAYOUTS = (
    "A batch of layouts is written batch_size times: all layouts once, then all again."
)


class SampleTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageSampleTokens",
            display_name="GLM-Image Sample Tokens",
            category=CATEGORY,
            description="Writes an image's semantic tokens: first a preview of about 256, which "
            "fixes the layout, then one for every 32 x 32 pixels. Every position has its own "
            "random draw, so image i of a batch is the single image of seed + i.",
            inputs=[
                *_sampling_inputs(),
                Layout.Input(
                    "layout",
                    optional=True,
                    tooltip="Its locked cells are kept and cost no time, the others are drawn: "
                    "lock it with GLM-Image Lock Layout. " + BATCH_OF_LAYOUTS,
                ),
                References.Input(
                    "references",
                    optional=True,
                    tooltip="From GLM-Image Encode Reference: images for the prompt to speak of. "
                    "With them there is no preview stage, so no layout.",
                ),
                Tokens.Input(
                    "tokens",
                    optional=True,
                    tooltip="A finished image's tokens, of which only what lies under the mask is "
                    "drawn anew. Connect its layout too, locked, or the preview is drawn anew.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="With tokens: the region to draw anew. Of any size; a cell belongs to "
                    "it from half its area on.",
                ),
                lookahead_input(),
            ],
            outputs=[
                Tokens.Output(display_name="tokens"),
                Layout.Output(display_name="layout", tooltip="The layout that the image has."),
            ],
        )

    @classmethod
    def execute(
        cls,
        ar: HostAR,
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
    ) -> io.NodeOutput:
        request = (
            prompt,
            height,
            width,
            seed,
            batch_size,
            SamplingOptions(temperature, top_p, top_k),
        )
        extra = {"tokens": tokens, "mask": mask, "lookahead": lookahead}
        if references is None:
            return io.NodeOutput(*ar.sample(*request, layout=layout, **extra))
        if layout is not None:
            raise GLMImageError(
                "A layout and references cannot be used together, since with references there is "
                "no preview stage; disconnect one of them."
            )
        edited = ar.sample_from_references(*request, references, **extra)
        return io.NodeOutput(edited, ExecutionBlocker(NO_LAYOUT))


class SampleLayout(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageSampleLayout",
            display_name="GLM-Image Sample Layout",
            category=f"{CATEGORY}/layout",
            description="Writes only the preview, which fixes an image's layout, in a fraction of "
            "the whole image's time. Sample several, choose one with Lock Layout and give it to "
            "Sample Tokens. Layout i of a batch is the single one of seed + i.",
            inputs=[
                *_sampling_inputs(),
                Layout.Input(
                    "layout",
                    optional=True,
                    tooltip="Its locked cells are kept, the others are drawn anew. "
                    + BATCH_OF_LAYOUTS,
                ),
                lookahead_input(),
            ],
            outputs=[Layout.Output(display_name="layout")],
        )

    @classmethod
    def execute(
        cls,
        ar: HostAR,
        prompt: str,
        width: int,
        height: int,
        seed: int,
        temperature: float,
        top_p: float,
        top_k: int,
        batch_size: int,
        layout: LayoutData | None = None,
        lookahead: int = 1,
    ) -> io.NodeOutput:
        options = SamplingOptions(temperature, top_p, top_k)
        sampled = ar.sample_layout(
            prompt, height, width, seed, batch_size, options, layout=layout, lookahead=lookahead
        )
        return io.NodeOutput(sampled)


def _sampling_inputs() -> list[io.Input]:
    """What a prompt, a size and a way to draw are for either node."""
    return [
        AR.Input("ar", tooltip="From GLM-Image Load AR Model."),
        io.String.Input(
            "prompt",
            multiline=True,
            tooltip="What to draw. Put text to be rendered in quotes. "
            "Control tokens such as <sop> are read as plain text.",
        ),
        *size_inputs(),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=True,
            tooltip="Same seed, inputs and weights: same tokens. Image i uses seed + i.",
        ),
        io.Float.Input(
            "temperature",
            default=0.9,
            min=0.0,
            max=5.0,
            step=0.01,
            tooltip="Randomness. 0.9 is the checkpoint's; 0 always takes the likeliest "
            "token, which gives flat pictures and is for tests.",
        ),
        io.Float.Input(
            "top_p",
            default=0.75,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Draw among the likeliest tokens that make up this share; 1 is off.",
        ),
        io.Int.Input(
            "top_k",
            default=0,
            min=0,
            max=2**20,
            tooltip="Draw among this many likeliest tokens; 0 is off.",
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=64,
            tooltip="Images written together; the weights are read once for all of them.",
        ),
    ]


def lookahead_input() -> io.Int.Input:
    return io.Int.Input(
        "lookahead",
        default=1,
        min=1,
        max=64,
        optional=True,
        tooltip="Write up to this many tokens in one pass, those that were guessed right from the "
        "row above or the preview. The tokens are the same; whether it is faster depends on the "
        "picture. 1 is off.",
    )


def size_inputs() -> list[io.Input]:
    """Width and height of the picture to be made."""
    return [
        io.Int.Input(
            "width",
            default=1024,
            min=32,
            max=MAX_SIDE,
            step=32,
            tooltip="Pixels, a multiple of 32; the model was trained for 1024 to 2048.",
        ),
        io.Int.Input(
            "height",
            default=1024,
            min=32,
            max=MAX_SIDE,
            step=32,
            tooltip="Pixels, a multiple of 32; the model was trained for 1024 to 2048.",
        ),
    ]
