"""Tokens and layouts made visible."""

from comfy_api.latest import io

from ..glm_core.data.token_image import draw_sheet, hash_palette
from ..glm_core.data.tokens import Layout as LayoutData
from ..glm_core.data.tokens import SemanticTokens
from ..glm_core.errors import GLMImageError
from .host.ar import HostAR
from .types import AR, CATEGORY, Layout, Tokens


class ShowTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageShowTokens",
            display_name="GLM-Image Show Tokens",
            category=CATEGORY,
            description="Draws semantic tokens or a layout, a square for each token, a batch as a "
            "sheet. Locked cells are outlined.",
            inputs=[
                Tokens.Input("tokens", optional=True, tooltip="What to draw; or connect a layout."),
                Layout.Input("layout", optional=True, tooltip="What to draw; or connect tokens."),
                AR.Input(
                    "ar",
                    optional=True,
                    tooltip="With it, tokens of like meaning have like colours, from the model's "
                    "codebook; without it, a colour says only which token it is.",
                ),
                io.Int.Input(
                    "cell_size", default=16, min=4, max=128, tooltip="Side of a square in pixels."
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(
        cls,
        cell_size: int,
        tokens: SemanticTokens | None = None,
        layout: LayoutData | None = None,
        ar: HostAR | None = None,
    ) -> io.NodeOutput:
        if (tokens is None) == (layout is None):
            raise GLMImageError(
                "Show Tokens draws one thing: connect either tokens or a layout to it."
            )
        grids, locked = (tokens.tokens, None) if layout is None else (layout.preview, layout.locked)
        codebook = (tokens or layout).codebook
        if ar is None:
            palette = hash_palette(codebook)
        elif ar.config.codebook == codebook:
            palette = ar.palette.colours
        else:
            raise GLMImageError(
                f"What is to be shown has a codebook of {codebook} and the AR model one of "
                f"{ar.config.codebook}: connect the AR model that made it, or none."
            )
        return io.NodeOutput(draw_sheet(grids, palette, cell_size, locked)[None])
