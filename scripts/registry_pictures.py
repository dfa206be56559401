"""Draws the pack's icon and banner for the registry: a picture that grows out of its tokens.

`python -m scripts.registry_pictures` writes both into docs/images. The left of each is a layout's
coarse cells, the middle the cells of the large grid, the right the finished picture.
"""

import numpy as np
from PIL import Image

from .environment import ROOT

FOLDER = ROOT / "docs" / "images"
ICON = (400, 400)
BANNER = (840, 360)  # 21:9
SMOOTHING = 4  # drawn this many times larger, then scaled down
COLOURS = 128

SKY, HORIZON = (38, 48, 110), (245, 150, 110)
SUN, GLOW = (255, 226, 150), (255, 190, 120)
HILLS = ((92, 84, 140), (52, 74, 108), (22, 46, 66))
LINE = (20, 24, 48)


def main() -> None:
    for name, size in (("icon", ICON), ("banner", BANNER)):
        draw(size).quantize(COLOURS).save(FOLDER / f"{name}.png", optimize=True)


def draw(size: tuple[int, int]) -> Image.Image:
    width, height = size
    picture = scene(width * SMOOTHING, height * SMOOTHING).resize(size, Image.LANCZOS)
    coarse, fine = height // 10, height // 20
    whole = picture.copy()
    whole.paste(cells(picture, fine), (0, 0), _left_of(size, fine, 0.68))
    whole.paste(cells(picture, coarse), (0, 0), _left_of(size, coarse, 0.4))
    return whole


def scene(width: int, height: int) -> Image.Image:
    """A sun over three rows of hills."""
    y, x = np.mgrid[0:height, 0:width] / height
    x = x - (width / height - 1) / 2  # the middle square is 0 to 1
    blend = np.clip(y / 0.7, 0, 1)[..., None]
    colour = np.asarray(SKY) * (1 - blend) + np.asarray(HORIZON) * blend
    distance = np.hypot(x - 0.62, y - 0.42)
    glow = np.clip(1 - distance / 0.5, 0, 1)[..., None] ** 2
    colour = colour * (1 - 0.7 * glow) + np.asarray(GLOW) * 0.7 * glow
    colour = np.where((distance < 0.17)[..., None], np.asarray(SUN), colour)
    for i, hill in enumerate(HILLS):
        edge = 0.6 + 0.12 * i + 0.07 * np.sin(5 * x * (1 + 0.3 * i) + 2.2 * i)
        colour = np.where((y > edge)[..., None], np.asarray(hill), colour)
    return Image.fromarray(colour.astype(np.uint8))


def cells(picture: Image.Image, side: int) -> Image.Image:
    """The picture in squares of one colour each, with lines between."""
    columns, rows = -(-picture.width // side), -(-picture.height // side)
    small = picture.crop((0, 0, columns * side, rows * side)).resize((columns, rows), Image.BOX)
    pixels = np.asarray(small).repeat(side, 0).repeat(side, 1).copy()
    pixels[::side] = pixels[:, ::side] = LINE
    return Image.fromarray(pixels).crop((0, 0, *picture.size))


def _left_of(size: tuple[int, int], side: int, share: float) -> Image.Image:
    """A mask of the cells left of a slanting line at a share of the width."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] // side * side
    left = x < share * size[0] + 0.18 * (size[1] / 2 - y)
    return Image.fromarray((left * 255).astype(np.uint8))


if __name__ == "__main__":
    main()
