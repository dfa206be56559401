"""Texts in pictures, read by RapidOCR, whose package holds its models."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...glm_core.errors import FileError

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements-ocr.txt"
OUTLINE = (220, 30, 60)


@dataclass(frozen=True)
class TextInPicture:
    """A text and its corners (column, row), in pixels."""

    text: str
    corners: list[tuple[float, float]]


def read_texts(picture: Tensor) -> list[TextInPicture]:
    """The texts of float32 [height, width, 3], in reading order.

    Raises:
        GLMImageError: RapidOCR is not installed.
    """
    found = _reader()(_levels(picture)[..., ::-1])
    if found.txts is None:
        return []
    return [
        TextInPicture(text, [tuple(map(float, corner)) for corner in box])
        for text, box in zip(found.txts, found.boxes, strict=True)
    ]


def outlined(picture: Tensor, texts: list[TextInPicture]) -> Tensor:
    """The picture with an outline around each text: float32 [height, width, 3]."""
    image = Image.fromarray(_levels(picture))
    draw = ImageDraw.Draw(image)
    width = max(2, min(image.size) // 200)
    for text in texts:
        draw.line([*text.corners, text.corners[0]], OUTLINE, width, joint="curve")
    return torch.from_numpy(np.array(image)).float() / 255


def _levels(picture: Tensor) -> np.ndarray:
    """uint8 [height, width, 3]"""
    return (255 * picture[..., :3].clamp(0, 1)).round().to("cpu", torch.uint8).numpy()


@lru_cache(maxsize=1)
def _reader() -> Any:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise FileError(
            f"Read Text needs RapidOCR, which is not installed ({error}); run pip install -r "
            f'"{REQUIREMENTS}" with ComfyUI\'s own Python and start ComfyUI again.'
        ) from error
    return RapidOCR(params={"Global.log_level": "critical"})
