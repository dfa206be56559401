"""The file that the page's mask editor writes: a picture whose alpha is 1 - mask.

The editor puts the file's name into a node's widget `image`, as `folder/name.png [input]`.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...glm_core.data.grids import Size
from ...glm_core.errors import FileError, SizeError, shown
from ...glm_core.foreign import wall
from .named_files import find_file

PAINT_AGAIN = "empty the input image and paint the mask again"


def find_painting(name: str) -> Path:
    """The path of a file in ComfyUI's input, output or temp folder.

    Raises:
        GLMImageError: it lies outside that folder or does not exist.
    """
    path = find_file("image", name, PAINT_AGAIN)
    if path is None:
        raise FileError(f"There is no painted mask '{shown(name)}'; {PAINT_AGAIN}.")
    return path


def content_of(name: str) -> str:
    """A hash of a painted file's content.

    Raises:
        GLMImageError: as `find_painting`.
    """
    digest = hashlib.sha256()
    with find_painting(name).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def painted_mask(name: str, size: Size) -> Tensor:
    """The mask painted on a picture: float32 [1, height, width], 0 to 1.

    Args:
        name: what the page wrote; empty for a mask of zeros.
        size: (height, width) of the picture.

    Raises:
        GLMImageError: the file is missing, no picture, or of another size.
    """
    if not name:
        return torch.zeros(1, *size)
    path = find_painting(name)
    with wall(f"'{name}' cannot be read as a picture", PAINT_AGAIN), Image.open(path) as picture:
        width, height = picture.size  # of the header; no pixel is read before it is checked
        if (height, width) != size:
            raise SizeError(
                f"The mask in '{shown(name)}' was painted on a picture of {width}x{height} "
                f"pixels, and this one has {size[1]}x{size[0]}; {PAINT_AGAIN}."
            )
        alpha = np.array(picture.convert("RGBA").getchannel("A"), dtype=np.float32)
    return 1 - torch.from_numpy(alpha)[None] / 255
