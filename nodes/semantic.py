"""The first stage: semantic tokens from a prompt."""

from comfy_api.latest import io

from ..glm_core.ar_sampler import SamplingOptions
from ..glm_core.errors import GLMImageError
from ..glm_core.grids import token_grid
from .host.ar import HostAR
from .types import AR, CATEGORY, Layout, Tokens

MAX_SIDE = 8192


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
                AR.Input("ar", tooltip="From GLM-Image Load AR Model."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    tooltip="What to draw. Put text to be rendered in quotes. "
                    "Control tokens such as <sop> are read as plain text.",
                ),
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
            ],
            outputs=[Tokens.Output(display_name="tokens"), Layout.Output(display_name="layout")],
        )

    @classmethod
    def validate_inputs(
        cls, width: int | None = None, height: int | None = None, prompt: str | None = None
    ) -> bool | str:
        if prompt is not None and not prompt.strip():
            return "The prompt is empty: write what the image should show."
        if width is None or height is None:
            return True
        if max(width, height) > MAX_SIDE:
            return f"{width} x {height} pixels are too many: use at most {MAX_SIDE} a side."
        try:
            token_grid(height, width)
        except GLMImageError as error:
            return str(error)
        return True

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
    ) -> io.NodeOutput:
        options = SamplingOptions(temperature, top_p, top_k)
        return io.NodeOutput(*ar.sample(prompt, height, width, seed, batch_size, options))
