"""Finds by image analysis what a picture shows: its shapes, its background and a text.

Pictures are uint8 [H, W, 3]; a box is (top, left, height, width) in pixels.
"""

import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import cv2
import numpy as np
from rapidocr import RapidOCR

from training.render import SLOT, signed_distance
from training.scene import ANCHORS, COLOURS, SHAPES, Item, Scene, Text, free_band

Box = tuple[int, int, int, int]

TOKEN = 32  # pixels of a semantic token each way
SMALLEST = 1 / 700  # share of the picture; the smallest shape, a small star, covers 1 / 210
SAME_KIND = 0.75  # the least overlap (intersection over union) of a shape with its ideal outline
FIRST_HALF, LAST_HALF, MIDDLE = 0.45, 0.55, (0.25, 0.75)  # shares of the picture
CHANGED = 24  # levels of 255
SMOOTHING = 5  # pixels a side of the median filter
TEXT_MARGIN = 24  # pixels read around a text; shapes keep 32 away from it
# Pixels. The OCR model reads letters that stand a slot apart as capitals, or not at all.
LETTER_GAP, READING_BORDER = 6, 8


@dataclass(frozen=True)
class Found:
    """A shape in a picture; (row, column) is the centre of its bounding box, in pixels."""

    colour: str
    row: float
    column: float
    kind: str | None  # one of SHAPES; None if it resembles none of them


def find_shapes(image: np.ndarray, text_boxes: Collection[Box] = ()) -> list[Found]:
    """The shapes of a picture; whatever lies in a text's box is ignored."""
    names = _nearest_colours(image)
    background = _background(names)
    for top, left, height, width in text_boxes:
        names[max(0, top - 8) : top + height + 8, max(0, left - 8) : left + width + 8] = background
    mask = _opened((names != background).astype(np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    return [
        _measure(names, labels == label, stats[label])
        for label in range(1, count)
        if stats[label, cv2.CC_STAT_AREA] >= SMALLEST * mask.size
    ]


def background_of(image: np.ndarray) -> str:
    """The most common colour of the picture's border."""
    return list(COLOURS)[_background(_nearest_colours(image))]


def shapes_of(image: np.ndarray, scene: Scene) -> list[Found]:
    """The shapes of a picture that should show `scene`; the boxes of its texts are ignored."""
    return find_shapes(image, [text_box(scene, text) for text in scene.texts])


def matches_scene(image: np.ndarray, scene: Scene) -> bool:
    """Whether the shapes match the scene's in number, colour and place, on its background.

    A place is as wide as its word: "left" is the left half. A row of shapes is judged by its mean.
    """
    return _matches(image, scene, lambda group, item: True)


def matches_kinds(image: np.ndarray, scene: Scene) -> bool:
    """Whether `matches_scene` holds and every shape is of the scene's kind."""
    return _matches(image, scene, lambda group, item: {one.kind for one in group} == {item.shape})


def furthest_move(before: list[Found], after: list[Found]) -> float:
    """The longest move of a shape, in pixels along an axis; shapes are paired by colour.

    inf if the two do not show shapes of the same colours, or show none.
    """
    if not before or sorted(one.colour for one in before) != sorted(one.colour for one in after):
        return np.inf
    unpaired, furthest = list(after), 0.0
    for shape in before:
        nearest = min(
            (other for other in unpaired if other.colour == shape.colour),
            key=lambda other: _distance(shape, other.row, other.column),
        )
        unpaired.remove(nearest)
        furthest = max(furthest, _distance(shape, nearest.row, nearest.column))
    return furthest


def shows_item(found: list[Found], scene: Scene, item: Item) -> bool:
    """Whether each shape of an item was found: of its kind and colour, a token or less away."""
    height, width = scene.cell
    return all(
        any(
            (one.colour, one.kind) == (item.colour, item.shape)
            and _distance(one, row * height, column * width) <= TOKEN
            for one in found
        )
        for row, column in item.centres
    )


def text_box(scene: Scene, text: Text) -> Box:
    """The box of a text of the scene."""
    row, column = scene.text_origin(text)
    return TOKEN * row, TOKEN * column, SLOT, SLOT * len(text.content)


def read_text(image: np.ndarray, box: Box) -> str:
    """The text that an OCR model reads in and just around a box, without spaces."""
    ink = _close_up(_ink(image, box))
    picture = np.uint8(255 * (1 - ink))
    line = np.repeat(picture[..., None], 3, axis=-1)
    (words,) = _reader()(line, use_det=False, use_cls=False, use_rec=True).txts or ("",)
    return "".join(unicodedata.normalize("NFKC", words).split())


def changed_outside(a: np.ndarray, b: np.ndarray, box: Box) -> float:
    """The share of the pixels outside a box that differ visibly between two pictures."""
    changed = (np.abs(a.astype(int) - b.astype(int)) > CHANGED).any(-1)
    outside = np.ones(changed.shape, bool)
    top, left, height, width = box
    outside[max(0, top) : top + height, max(0, left) : left + width] = False
    return float(changed[outside].mean())


def _nearest_colours(image: np.ndarray) -> np.ndarray:
    """int64 [H, W]: the index of the nearest of COLOURS for every pixel."""
    red, green, blue = np.moveaxis(
        cv2.medianBlur(np.ascontiguousarray(image), SMOOTHING) >> 3, -1, 0
    )
    return _colour_table()[red, green, blue]


@lru_cache
def _colour_table() -> np.ndarray:
    """int64 [32, 32, 32]: the nearest of COLOURS to the middle of every cube of 8 levels."""
    middles = 8 * np.stack(np.mgrid[:32, :32, :32], axis=-1) + 3.5
    palette = np.array(list(COLOURS.values()))
    return ((middles[..., None, :] - palette) ** 2).sum(-1).argmin(-1)


def _background(names: np.ndarray) -> int:
    border = np.concatenate([names[0], names[-1], names[:, 0], names[:, -1]])
    return int(np.bincount(border).argmax())


def _measure(names: np.ndarray, mask: np.ndarray, stats: np.ndarray) -> Found:
    left, top, width, height, _ = map(int, stats)
    colour = np.bincount(names[mask]).argmax()
    kind = _kind(mask[top : top + height, left : left + width])
    return Found(list(COLOURS)[colour], top + height / 2, left + width / 2, kind)


def _kind(mask: np.ndarray) -> str | None:
    """The shape that overlaps the mask best when both are stretched to one bounding box."""
    stretched = _stretched(mask)
    overlaps = {
        shape: (stretched & outline).sum() / (stretched | outline).sum()
        for shape, outline in _outlines(max(mask.shape)).items()
    }
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] >= SAME_KIND else None


@lru_cache
def _outlines(size: int) -> dict[str, np.ndarray]:
    """bool [64, 64] by shape: its inside as `find_shapes` would find it, stretched to fill.

    The shape is `size` pixels high or wide; a small one loses its thin points to the smoothing.
    """
    steps = np.linspace(-1.25, 1.25, round(1.25 * size))
    outlines = {}
    for shape in SHAPES:
        inside = (signed_distance(shape, steps[:, None], steps[None, :]) < 0).astype(np.uint8)
        found = _opened(cv2.medianBlur(inside, SMOOTHING)) > 0
        rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
        outlines[shape] = _stretched(found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return outlines


def _opened(mask: np.ndarray) -> np.ndarray:
    return cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))


def _stretched(mask: np.ndarray) -> np.ndarray:
    return cv2.resize(mask.astype(np.float32), (64, 64), interpolation=cv2.INTER_AREA) > 0.5


def _matches(
    image: np.ndarray, scene: Scene, alike: Callable[[tuple[Found, ...], Item], bool]
) -> bool:
    found = shapes_of(image, scene)
    if background_of(image) != scene.background:
        return False
    if len(found) != sum(len(item.centres) for item in scene.items):
        return False

    def fits(group: tuple[Found, ...], item: Item) -> bool:
        same_colour = all(one.colour == item.colour for one in group)
        return same_colour and _in_place(group, item, scene) and alike(group, item)

    return _can_assign(found, scene.items, fits)


def _can_assign(found: list[Found], items: tuple[Item, ...], fits: Callable) -> bool:
    """Whether every item can be given shapes that fit it, each shape to one item."""
    if not items:
        return True
    first, *rest = items
    return any(
        fits(group, first) and _can_assign([f for f in found if f not in group], tuple(rest), fits)
        for group in combinations(found, len(first.centres))
    )


def _in_place(group: tuple[Found, ...], item: Item, scene: Scene) -> bool:
    """Whether the shapes are at the item's place; texts move only the places at top and bottom."""
    if item.place is None:
        return True
    first, last = (0, scene.preview[0]) if ANCHORS[item.place][0] == 0.5 else free_band(scene)
    row = (np.mean([one.row for one in group]) / scene.cell[0] - first) / (last - first)
    column = np.mean([one.column for one in group]) / scene.width
    for value, anchor in zip((row, column), ANCHORS[item.place], strict=True):
        if anchor < 0.5 and value > FIRST_HALF:
            return False
        if anchor > 0.5 and value < LAST_HALF:
            return False
        if item.place == "centre" and not MIDDLE[0] <= value <= MIDDLE[1]:
            return False
    return True


def _distance(shape: Found, row: float, column: float) -> float:
    return max(abs(shape.row - row), abs(shape.column - column))


def _ink(image: np.ndarray, box: Box) -> np.ndarray:
    """How much every pixel in and around a box differs from the background there, 0 to 1."""
    top, left, height, width = box
    rows = slice(max(0, top - TEXT_MARGIN), top + height + TEXT_MARGIN)
    columns = slice(max(0, left - TEXT_MARGIN), left + width + TEXT_MARGIN)
    part = image[rows, columns].astype(np.float32)
    border = np.concatenate([part[0], part[-1], part[:, 0], part[:, -1]])
    ink = np.abs(part - np.median(border, axis=0)).max(-1)
    return ink / max(ink.max(), 1)


def _close_up(ink: np.ndarray) -> np.ndarray:
    """The inked rows, with gaps between letters cut to LETTER_GAP as in a printed line."""
    inked = ink > 0.4
    rows = np.flatnonzero(inked.any(1))
    if len(rows):
        ink = ink[max(0, rows[0] - 2) : rows[-1] + 3]
    blank, columns = 0, []
    for column, is_inked in enumerate(inked.any(0)):
        blank = 0 if is_inked else blank + 1
        if blank <= LETTER_GAP:
            columns.append(column)
    return np.pad(ink[:, columns], READING_BORDER)


@lru_cache
def _reader() -> RapidOCR:
    one_thread = ("intra_op_num_threads", "inter_op_num_threads")
    settings = {f"EngineConfig.onnxruntime.{name}": 1 for name in one_thread}
    return RapidOCR(params={"Global.log_level": "critical", **settings})
