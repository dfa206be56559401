"""Encodes the texts that the image should show."""

from typing import Any

from comfy_api.latest import io

from ..glm_core.glyph.advice import advice, summary
from .host import glyph
from .messages import message
from .node import Node
from .types import CATEGORY


class GlyphEncode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageGlyphEncode",
            display_name="GLM-Image Glyph Encode",
            category=CATEGORY,
            description="Encodes the texts that the image should show: those that the prompt has "
            "in quotes ('...', “...”, \"...\", 「...」), or the lines of texts. An apostrophe "
            "counts as a quote: if the node shows a wrong text, list the texts yourself.",
            inputs=[
                io.Clip.Input("clip", tooltip="From GLM-Image Load Glyph Encoder."),
                io.String.Input(
                    "prompt", multiline=True, tooltip="The same as in GLM-Image Sample Tokens."
                ),
                io.String.Input(
                    "texts",
                    multiline=True,
                    optional=True,
                    default="",
                    tooltip="Texts to render, one a line. Empty: those in quotes in the prompt.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(),
                io.String.Output(display_name="texts", tooltip="The texts found, one a line."),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, prompt: str, texts: str = "") -> io.NodeOutput:
        listed = [line.strip() for line in texts.splitlines() if line.strip()] or None
        tokens = clip.tokenize(prompt, texts=listed)  # logs the advice
        conditioning = clip.encode_from_tokens_scheduled(tokens)
        found = tokens[glyph.TOKENS]
        said = message([*summary(found), *advice(prompt, listed)])
        return io.NodeOutput(conditioning, "\n".join(found), ui=said)
