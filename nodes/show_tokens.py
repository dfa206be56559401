"""Draws tokens and layouts as pictures, and takes the mask that is painted on them."""

from comfy_api.latest import io, ui
from torch import Tensor

from ..glm_core.data.token_image import draw_sheet, hash_palette, sheet_grid
from ..glm_core.data.tokens import Layout as LayoutData
from ..glm_core.data.tokens import SemanticTokens
from ..glm_core.errors import InputError, TokensError
from ..glm_core.placement import memory
from .host.ar_interface import AnyAR
from .host.out_of_memory import require_room
from .host.painted_mask import content_of, find_painting, painted_mask
from .inputs import fingerprint, validate
from .node import Node
from .types import AR, CATEGORY, Layout, Tokens

COPIES = 4  # of a sheet: its pictures, the sheet, the sheet in order, and what the page shows


class ShowTokens(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageShowTokens",
            display_name="GLM-Image Show Tokens",
            category=CATEGORY,
            description="Draws semantic tokens or a layout, one square for each token and a batch "
            "on one sheet, numbered as batch_index counts. Locked cells are outlined. "
            "Open the picture in the page's mask editor to paint a mask on it.",
            inputs=[
                Tokens.Input(
                    "tokens", optional=True, tooltip="Tokens to draw, if no layout is connected."
                ),
                Layout.Input(
                    "layout", optional=True, tooltip="Layout to draw, if no tokens are connected."
                ),
                AR.Input(
                    "ar",
                    optional=True,
                    tooltip="With it, tokens of similar meaning have similar colours. Unconnected: "
                    "every token has an arbitrary colour of its own.",
                ),
                io.Int.Input(
                    "cell_size",
                    default=16,
                    min=4,
                    max=128,
                    tooltip="Side of each square in pixels.",
                ),
                io.String.Input(
                    "image",
                    default="",
                    optional=True,
                    tooltip="Written by the page: right-click the picture, Open in Mask Editor, "
                    "paint, save, run again. What you painted is the output mask. Empty: no mask.",
                ),
            ],
            outputs=[
                io.Image.Output(),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="What was painted on the picture, for Lock Layout, Compose Layouts and "
                    "Sample Tokens. Show a single one to paint on it.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, image: str | None = None) -> bool | str:
        return not image or validate(find_painting, image)

    @classmethod
    def fingerprint_inputs(cls, image: str | None = None, **_: object) -> str:
        return fingerprint(content_of, image)

    @classmethod
    def execute(
        cls,
        cell_size: int,
        tokens: SemanticTokens | None = None,
        layout: LayoutData | None = None,
        ar: AnyAR | None = None,
        image: str = "",
    ) -> io.NodeOutput:
        if (tokens is None) == (layout is None):
            raise InputError(
                "Show Tokens draws one thing: connect either tokens or a layout to it."
            )
        grids, locked = (tokens.tokens, None) if layout is None else (layout.preview, layout.locked)
        _require_room(grids, cell_size)
        palette = _palette((tokens or layout).codebook, ar)
        sheet = draw_sheet(grids, palette, cell_size, locked, numbered=True)[None]
        mask = painted_mask(image, tuple(sheet.shape[1:3]))
        return io.NodeOutput(sheet, mask, ui=ui.PreviewImage(sheet, cls=cls))


def _require_room(grids: Tensor, cell_size: int) -> None:
    """
    Raises:
        GLMImageError: a sheet of grids [B, rows, columns] does not fit into memory.
    """
    batch, rows, columns = grids.shape
    down, across = sheet_grid(batch, rows, columns)
    needed = COPIES * memory.pixels(1, down * rows * cell_size, across * columns * cell_size)
    require_room("Show Tokens", {grids.device: needed}, "use a smaller cell_size or fewer images")


def _palette(codebook: int, ar: AnyAR | None) -> Tensor:
    """Colours of the tokens: float32 [codebook, 3], 0 to 1.

    Raises:
        GLMImageError: the AR model has another codebook.
    """
    if ar is None:
        return hash_palette(codebook)
    if ar.codebook != codebook:
        raise TokensError(
            f"The tokens have a codebook of {codebook} and the AR model one of "
            f"{ar.codebook}; connect the AR model that made them, or none."
        )
    return ar.palette.colours
