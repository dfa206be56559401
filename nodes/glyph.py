"""The texts to be rendered, byte by byte."""

from typing import Any

from comfy_api.latest import io

from ..glm_core.errors import GLMImageError
from .host import glyph
from .types import CATEGORY


class GlyphEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageGlyphEncode",
            display_name="GLM-Image Glyph Encode",
            category=CATEGORY,
            description="Encodes the texts that the image should show: those in quotes in the "
            "prompt ('...', “...”, \"...\", 「...」), or the lines of texts. An apostrophe counts "
            "as a quote; look at the second output, and list the texts yourself where it errs.",
            inputs=[
                io.Clip.Input("clip", tooltip="From GLM-Image Load Glyph Encoder."),
                io.String.Input(
                    "prompt", multiline=True, tooltip="The prompt of GLM-Image Sample Tokens."
                ),
                io.String.Input(
                    "texts",
                    multiline=True,
                    optional=True,
                    default="",
                    tooltip="One text a line, instead of what the prompt has in quotes. "
                    "Leave empty to take the prompt's.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(),
                io.String.Output(display_name="texts", tooltip="The texts found, one a line."),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, prompt: str, texts: str = "") -> io.NodeOutput:
        if not glyph.is_glyph_encoder(clip):
            raise GLMImageError(
                "This CLIP is not GLM-Image's glyph encoder; connect GLM-Image Load Glyph Encoder."
            )
        listed = [line.strip() for line in texts.splitlines() if line.strip()]
        tokens = clip.tokenize(prompt, texts=listed or None)
        conditioning = clip.encode_from_tokens_scheduled(tokens)
        return io.NodeOutput(conditioning, "\n".join(tokens[glyph.TOKENS]))
