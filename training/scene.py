"""What a picture shows: a background, shapes and texts, placed on the grid of the preview.

Coordinates are (row, column) from the top left in preview cells, so that a scene has the same
composition at every size. Texts are set in cells of 32 pixels, two by two for each character.
"""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from glm_core.data.grids import preview_grid

COLOURS = {
    "red": (220, 40, 45),
    "orange": (245, 140, 35),
    "yellow": (250, 215, 60),
    "green": (45, 160, 75),
    "blue": (45, 95, 215),
    "purple": (135, 65, 175),
    "black": (28, 28, 32),
    "white": (245, 245, 242),
}
LIGHT = ("orange", "yellow", "white")  # backgrounds of black text; the others have white text
SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart")
RADII = {"small": 1, "medium": 2, "big": 3}
SIZES = ((512, 512), (768, 768), (1024, 1024), (512, 768), (768, 512), (768, 1152), (1152, 768))
ANCHORS = {
    "left": (0.5, 0.2), "right": (0.5, 0.8), "top": (0.2, 0.5), "bottom": (0.8, 0.5),
    "centre": (0.5, 0.5), "top left": (0.2, 0.2), "top right": (0.2, 0.8),
    "bottom left": (0.8, 0.2), "bottom right": (0.8, 0.8),
}  # fmt: skip
# A shape's offsets from its anchor in cells, nearest first; it takes the first that is free.
BESIDE = sorted(product(range(-2, 3), repeat=2), key=lambda step: (np.hypot(*step), step))
# How often a prompt leaves the places of all shapes open, and otherwise that of each shape.
ALL_ANYWHERE, ANYWHERE = 0.1, 0.1
OPEN = ("left", "centre", "right")  # where shapes with open places are drawn
TEXT_PLACES = ("top", "bottom", "centre")
MAX_LETTERS, MAX_OTHERS = 7, 4  # a text is one script: Latin capitals, or digits, or Chinese
TEXT_BAND = 4  # preview rows without shapes around a text at the top or bottom


@dataclass(frozen=True)
class Item:
    """One shape, or several of a kind in a row; `centres` are (row, column) in preview cells."""

    shape: str
    colour: str
    size: str
    place: str | None  # a key of ANCHORS, or None: anywhere
    centres: tuple[tuple[float, float], ...]

    @property
    def radius(self) -> float:
        return RADII[self.size]


@dataclass(frozen=True)
class Text:
    content: str
    place: str  # one of TEXT_PLACES

    @property
    def script(self) -> str:
        first = self.content[0]
        return "digit" if first.isdecimal() else "latin" if first.isascii() else "chinese"


@dataclass(frozen=True)
class Scene:
    height: int
    width: int
    background: str
    items: tuple[Item, ...]
    texts: tuple[Text, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the large grid."""
        return self.height // 32, self.width // 32

    @property
    def preview(self) -> tuple[int, int]:
        """Rows and columns of the preview."""
        return preview_grid(self.grid)

    @property
    def cell(self) -> tuple[float, float]:
        """Height and width of a preview cell in pixels."""
        return self.height / self.preview[0], self.width / self.preview[1]

    @property
    def ink(self) -> str:
        """The colour of texts."""
        return "black" if self.background in LIGHT else "white"

    def text_origin(self, text: Text) -> tuple[int, int]:
        """The top left of a text, in cells of 32 pixels."""
        rows, columns = self.grid
        margin = round(rows / self.preview[0])
        top = {"top": margin, "bottom": rows - 2 - margin, "centre": rows // 2 - 1}[text.place]
        return top, (columns - 2 * len(text.content)) // 2


def draw_size(rng: np.random.Generator, smallest: float) -> tuple[int, int]:
    """(height, width): the first of SIZES with probability `smallest`, else any other."""
    others = len(SIZES) - 1
    index = rng.choice(len(SIZES), p=(smallest, *((1 - smallest) / others,) * others))
    return SIZES[index]


def draw_scene(
    rng: np.random.Generator,
    height: int,
    width: int,
    texts: int | None = None,
    all_anywhere: float = ALL_ANYWHERE,
) -> Scene:
    """A random scene with `texts` texts (0 to 2; None: any) and at most three items.

    With probability `all_anywhere`, all single shapes have open places.
    """
    count = int(rng.choice(3, p=(0.3, 0.5, 0.2))) if texts is None else texts
    drawn = _draw_texts(rng, count)
    background = str(rng.choice(list(COLOURS)))
    anywhere = 1.0 if rng.random() < all_anywhere else ANYWHERE
    scene = Scene(height, width, background, (), drawn)
    for _ in range(int(rng.choice((1, 2, 3), p=(0.35, 0.45, 0.2)))):
        if (item := _draw_item(rng, scene, anywhere)) is not None:
            scene = replace(scene, items=(*scene.items, item))
    return scene


def free_band(scene: Scene) -> tuple[int, int]:
    """The preview rows [first, last) that texts leave to shapes."""
    first, last = 0, scene.preview[0]
    for text in scene.texts:
        if text.place == "top":
            first += TEXT_BAND
        elif text.place == "bottom":
            last -= TEXT_BAND
    return first, last


def place_item(
    scene: Scene, shape: str, colour: str, size: str, place: str, count: int = 1
) -> Item | None:
    """An item at its place, or as near to it as others leave room; None if it does not fit.

    Texts do not change the place; they only push away a shape that would touch them.
    """
    first, last = free_band(scene)
    rows, columns = scene.preview
    radius = RADII[size]
    pitch = 2 * radius + 1
    half = radius + pitch * (count - 1) / 2
    row, column = ANCHORS[place]
    row, column = round(row * rows), round(column * columns)
    for down, right in BESIDE:
        y = np.clip(row + down, first + radius, last - radius)
        x = np.clip(column + right, np.ceil(half), np.floor(columns - half))
        start = x - pitch * (count - 1) // 2
        centres = tuple((float(y), float(start + pitch * i)) for i in range(count))
        item = Item(shape, colour, size, place, centres)
        if _is_clear(scene, item):
            return item
    return None


def _is_clear(scene: Scene, item: Item) -> bool:
    rows, columns = scene.preview
    for row, column in item.centres:
        if not (item.radius <= row <= rows - item.radius):
            return False
        if not (item.radius <= column <= columns - item.radius):
            return False
        for text in scene.texts:
            if text.place == "centre" and abs(row - rows / 2) < item.radius + 2:
                return False
        for other in scene.items:
            gap = item.radius + other.radius + 1
            if any(max(abs(row - r), abs(column - c)) < gap for r, c in other.centres):
                return False
    return True


def _draw_item(rng: np.random.Generator, scene: Scene, anywhere: float) -> Item | None:
    """An item that the scene does not have; its place is open with probability `anywhere`."""
    shape = str(rng.choice(SHAPES))
    colour = str(rng.choice([c for c in COLOURS if c != scene.background]))
    if any((item.shape, item.colour) == (shape, colour) for item in scene.items):
        return None
    if rng.random() < 0.15:
        place = str(rng.choice(("top", "centre", "bottom")))
        return place_item(scene, shape, colour, "small", place, int(rng.integers(2, 5)))
    size = str(rng.choice(list(RADII), p=(0.2, 0.55, 0.25)))
    if rng.random() < anywhere:
        items = (place_item(scene, shape, colour, size, str(at)) for at in rng.permutation(OPEN))
        item = next(filter(None, items), None)
        return item and replace(item, place=None)
    taken = {item.place for item in scene.items}
    places = [place for place in ANCHORS if place not in taken]
    # People mostly write left, right and centre.
    weights = np.array([3.0 if place in ("left", "right", "centre") else 1.0 for place in places])
    place = str(rng.choice(places, p=weights / weights.sum()))
    return place_item(scene, shape, colour, size, place)


def _draw_texts(rng: np.random.Generator, count: int) -> tuple[Text, ...]:
    if count == 0:
        return ()
    scripts = rng.choice(("latin", "digit", "chinese"), count, False, p=(0.5, 0.1, 0.4))
    places = rng.choice(TEXT_PLACES, count, False, p=(0.3, 0.5, 0.2))
    if count == 2:
        places = rng.permutation(("top", "bottom"))
    return tuple(
        Text(draw_content(rng, str(script)), str(place))
        for script, place in zip(scripts, places, strict=True)
    )


def draw_content(rng: np.random.Generator, script: str, length: int | None = None) -> str:
    """A text of one script: half of the Latin ones are words, all others random characters."""
    if script == "latin":
        words = WORDS if length is None else [word for word in WORDS if len(word) == length]
        if words and rng.random() < 0.5:
            return words[rng.integers(len(words))]
        count = length or rng.integers(2, MAX_LETTERS + 1)
        letters = "".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), count))
        return letters if letters not in HELD_OUT_WORDS else letters[::-1]
    if script == "digit":
        return "".join(rng.choice(list("0123456789"), length or rng.integers(1, MAX_OTHERS + 1)))
    count = length or rng.choice((1, 2, 3, 4), p=(0.15, 0.45, 0.2, 0.2))
    return "".join(rng.choice(list(CHINESE), count))


_ALL_WORDS = (Path(__file__).parent / "words.txt").read_text().split()
HELD_OUT_WORDS = tuple(_ALL_WORDS[::5])  # drawn by the evaluation only
WORDS = tuple(word for word in _ALL_WORDS if word not in HELD_OUT_WORDS)

CHINESE = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种"
    "面而方后多定行学法所民得经十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本"
    "去把性好应开它合还因由其些然前外天政四日那社义事平形相全表间样与关各重新线内数正心反你明看原又么利比"
    "或但质气第向道命此变条只没结解问意建月公无系军很情者最立代想已通并提直题党程展五果料象员革位入常文总"
    "次品式活设及管特件长求老头基资边流路级少图山统接知较将组见计别她手角期根论运农指几九区强放决西被干做"
    "必战先回则任取据处理世车春夏秋冬花草木火土金石红黄蓝绿白黑猫狗鸟鱼马牛羊龙茶酒米面包书画诗歌爱福喜乐"
)
CHINESE = "".join(dict.fromkeys(CHINESE))
