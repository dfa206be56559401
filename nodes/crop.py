"""Crops a picture to a size that has no grid of tokens."""

from comfy_api.latest import io
from torch import Tensor

from ..glm_core.errors import SizeError
from .inputs import MAX_SIDE
from .node import Node
from .types import CATEGORY


class CropToSize(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageCropToSize",
            display_name="GLM-Image Crop To Size",
            category=CATEGORY,
            description="Crops a picture about its centre to a size whose sides are no multiples "
            "of 32. Make the picture at the next multiples: for 500x333 sample tokens at 512x352. "
            "At most 31 pixels of a side are lost, half of them at each edge.",
            inputs=[
                io.Image.Input("image", tooltip="The finished picture, from VAE Decode."),
                *(
                    io.Int.Input(
                        side,
                        default=1024,
                        min=1,
                        max=MAX_SIDE,
                        tooltip=f"{side.capitalize()} that is wanted, in pixels; at most the "
                        "picture's.",
                    )
                    for side in ("width", "height")
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: Tensor, width: int, height: int) -> io.NodeOutput:
        return io.NodeOutput(_crop_about_centre(image, height, width))


def _crop_about_centre(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of [B, H, W, C]. Of an odd rest, the larger part is cut at the bottom and right.

    Raises:
        GLMImageError: the image is smaller.
    """
    rows, columns = image.shape[1:3]
    if height > rows or width > columns:
        raise SizeError(
            f"A picture of {columns}x{rows} pixels cannot be cropped to {width}x{height}; "
            "make it at the next multiples of 32, or scale it up first."
        )
    top, left = (rows - height) // 2, (columns - width) // 2
    return image[:, top : top + height, left : left + width]
