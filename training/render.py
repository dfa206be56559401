"""Draws scenes as pixels: shapes by their signed distance, characters from two open fonts."""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scene import COLOURS, Item, Scene, Text

SLOT = 64  # pixels a side of a character, two cells of 32
LATIN_FONT = ("font_roboto", "files/Roboto-Bold.ttf")  # Apache 2.0
CHINESE_FONT = ("zhplot", "fonts/NotoSansSC-Regular.ttf")  # SIL Open Font License


def render(scene: Scene, window: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """uint8 [H, W, 3]: the scene, or a window (top, left, height, width) of it in pixels."""
    top, left, height, width = window or (0, 0, scene.height, scene.width)
    image = np.empty((height, width, 3), np.float32)
    image[:] = COLOURS[scene.background]
    for item in scene.items:
        for shape_window in _windows(scene, item):
            _paint_shape(image, scene, item, shape_window, (top, left))
    for text in scene.texts:
        _paint_text(image, scene, text, (top, left))
    return np.rint(image).astype(np.uint8)


def coverage(
    scene: Scene, item: Item, rows: np.ndarray, columns: np.ndarray, softness: float
) -> np.ndarray:
    """[rows, columns], 0 to 1: how much the item covers the points at these pixel coordinates."""
    cell = scene.cell
    radius = item.radius * min(cell)
    reach = radius + softness
    covered = np.zeros((len(rows), len(columns)), np.float32)
    for row, column in item.centres:
        y, x = rows - row * cell[0], columns - column * cell[1]
        near = (
            slice(*np.searchsorted(y, (-reach, reach))),
            slice(*np.searchsorted(x, (-reach, reach))),
        )
        y, x = y[near[0], None] / radius, x[None, near[1]] / radius
        alpha = np.clip(0.5 - signed_distance(item.shape, y, x) * radius / softness, 0, 1)
        covered[near] = np.maximum(covered[near], alpha)
    return covered


def signed_distance(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape of radius 1 around (0, 0), negative inside."""
    if shape == "circle":
        return np.hypot(y, x) - 0.96
    return _polygon_distance(_outline(shape), *np.broadcast_arrays(y, x))


@lru_cache
def _outline(shape: str) -> np.ndarray:
    """Corners (y, x) of a polygon in the unit circle, y downwards."""
    if shape == "square":
        corners = [(-0.88, -0.88), (-0.88, 0.88), (0.88, 0.88), (0.88, -0.88)]
    elif shape == "diamond":
        corners = [(-0.98, 0), (0, 0.75), (0.98, 0), (0, -0.75)]
    elif shape == "triangle":
        corners = [(-0.92, 0), (0.88, 0.96), (0.88, -0.96)]
    elif shape == "star":
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2, 0.42, 1.0)
        corners = np.stack([-radii * np.cos(angles) + 0.05, radii * np.sin(angles)], 1)
    else:
        t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        corners = np.stack([-(y + 2.5) / 16, np.sin(t) ** 3 * 0.97], 1)
    return np.asarray(corners, np.float32)


def _polygon_distance(corners: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon (Inigo Quilez, "distance to polygon")."""
    nearest = np.full(y.shape, np.inf, np.float32)
    inside = np.zeros(y.shape, bool)
    for (y0, x0), (y1, x1) in zip(corners, np.roll(corners, -1, 0), strict=True):
        ey, ex = y1 - y0, x1 - x0
        t = np.clip(((y - y0) * ey + (x - x0) * ex) / (ey * ey + ex * ex), 0, 1)
        nearest = np.minimum(nearest, (y - y0 - ey * t) ** 2 + (x - x0 - ex * t) ** 2)
        if y0 != y1:
            crosses = (y0 > y) != (y1 > y)
            inside ^= crosses & (x < ex * (y - y0) / ey + x0)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def _windows(scene: Scene, item: Item) -> list[tuple[int, int, int, int]]:
    """The (top, bottom, left, right) in pixels of a box around each of an item's shapes."""
    height, width = scene.cell
    reach = item.radius * min(scene.cell) + 2
    return [
        (int(r * height - reach), int(r * height + reach) + 1,
         int(c * width - reach), int(c * width + reach) + 1)
        for r, c in item.centres
    ]  # fmt: skip


def _overlap(
    image: np.ndarray, origin: tuple[int, int], window: tuple[int, int, int, int]
) -> tuple[slice, slice]:
    """The rows and columns of the scene that lie both in the image and in the window."""
    (top, bottom, left, right), (first, start) = window, origin
    rows = slice(max(top, first), max(top, first, min(bottom, first + image.shape[0])))
    columns = slice(max(left, start), max(left, start, min(right, start + image.shape[1])))
    return rows, columns


def _shifted(rows: slice, columns: slice, top: int, left: int) -> tuple[slice, slice]:
    return slice(rows.start - top, rows.stop - top), slice(
        columns.start - left, columns.stop - left
    )


def _blend(image: np.ndarray, where: tuple[slice, slice], alpha: np.ndarray, colour: str) -> None:
    part = image[where]
    part += alpha[..., None] * (np.array(COLOURS[colour], np.float32) - part)


def _paint_shape(
    image: np.ndarray, scene: Scene, item: Item, window: tuple[int, int, int, int],
    origin: tuple[int, int],
) -> None:  # fmt: skip
    rows, columns = _overlap(image, origin, window)
    y = np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5
    x = np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5
    if len(y) and len(x):
        alpha = coverage(scene, item, y, x, 1.0)
        _blend(image, _shifted(rows, columns, *origin), alpha, item.colour)


def _paint_text(image: np.ndarray, scene: Scene, text: Text, origin: tuple[int, int]) -> None:
    row, column = scene.text_origin(text)
    for i, character in enumerate(text.content):
        top, left = 32 * row, 32 * column + SLOT * i
        rows, columns = _overlap(image, origin, (top, top + SLOT, left, left + SLOT))
        glyph = glyph_bitmap(character)[_shifted(rows, columns, top, left)]
        if glyph.size:
            alpha = glyph.astype(np.float32) / 255
            _blend(image, _shifted(rows, columns, *origin), alpha, scene.ink)


@lru_cache(maxsize=2048)
def glyph_bitmap(character: str) -> np.ndarray:
    """uint8 [64, 64]: how much ink each pixel of a character's slot has."""
    font = _font(character)
    large = Image.new("L", (2 * SLOT, SLOT), 0)
    ImageDraw.Draw(large).text((SLOT, SLOT // 2), character, fill=255, font=font, anchor="mm")
    left, _, right, _ = large.getbbox()
    glyph = large.crop((left, 0, right, SLOT))
    if glyph.width > SLOT - 4:  # W and M are made narrower
        glyph = glyph.resize((SLOT - 4, SLOT), Image.BICUBIC)
    slot = Image.new("L", (SLOT, SLOT), 0)
    slot.paste(glyph, ((SLOT - glyph.width) // 2, 0))
    return np.asarray(slot)


@lru_cache
def _font(character: str) -> ImageFont.FreeTypeFont:
    package, file = LATIN_FONT if character.isascii() else CHINESE_FONT
    return _load_font(package, file, 68 if character.isascii() else 58)


@lru_cache
def _load_font(package: str, file: str, size: int) -> ImageFont.FreeTypeFont:
    spec = find_spec(package)
    if spec is None:
        raise RuntimeError(
            f"The fonts of {package} are missing: install training/requirements.txt."
        )
    return ImageFont.truetype(str(Path(spec.origin).parent / file), size)
