"""What helps the AR model to learn to read: what a phrase asks for, and what will stand below.

In a picture's codes only the first cells of a shape say whether the prompt was understood; the rest
follows from the cells above. From them alone a small model left shapes out, or drew them in the
wrong places, after sixty thousand pictures. So its states must say what they know, through heads
that are trained with it and thrown away.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codes import EDGE, INSIDE, LONGEST, NAMES, PAIRS, PATTERNS, TEXT, USED, into_text
from .scene import (
    ANCHORS,
    COLOURS,
    MAX_LETTERS,
    OPEN,
    RADII,
    SHAPES,
    SIZES,
    TEXT_PLACES,
    Item,
    Scene,
    Text,
)

# After which layer phrases, the layout, and where a cell lies, must be understood.
PHRASE_LAYER, LAYOUT_LAYER, WHERE_LAYER = 1, 3, 3
PHRASE_WEIGHT, LAYOUT_WEIGHT, WHERE_WEIGHT, BELOW_WEIGHT = 0.1, 0.2, 0.1, 0.1
BELOW = (2, 4)  # rows
LONGEST_SIDE = max(map(max, SIZES)) // 32  # of a grid, in cells
NOTHING, WRITING = len(NAMES), len(NAMES) + 1  # beside the colours of shapes, what a cell shows
ASKED = {
    "kind": (Item, Text, None),  # None is the background
    "place": (*ANCHORS, None),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(RADII),
    "count": (1, 2, 3, 4),
    "script": tuple(LONGEST),
    "length": tuple(range(1, MAX_LETTERS + 1)),
}
"""What a phrase can ask for, and the answers."""
NONE_AT_ALL = "none at all"
ABOUT = {key: ASKED[key] for key in ("colour", "shape", "size", "count", "script", "length")} | {
    "row": tuple(range(20)),
    "column": tuple(range(20)),
}
"""What each of `tokenizer.PLACES` must say of its place; `row` and `column` are the preview cell at
the top left of what is there.

These tokens lie at the same distance from the cells, however long the prompt is, so that a cell can
find its place's by distance alone. With the colour of a shape, or the script of a text, a token
also says whether there is one.
"""


def asked_by(thing: Item | Text | None, scene: Scene) -> Tensor:
    """int64 [len(ASKED)]: indices of the answers, -1 where the phrase says nothing of it."""
    if thing is None:
        answers = {"kind": None, "colour": scene.background}
    else:
        answers = {"kind": type(thing), "place": thing.place, **_answers(thing)}
    return _indices(answers, ASKED)


def layout_of(scene: Scene) -> Tensor:
    """int64 [len(PLACES), len(ABOUT)]: indices of what is at each place.

    -1 where nothing can be said, as of a place where a shape may be whose place is open.
    """
    is_open = any(item.place is None for item in scene.items)
    shapes = {item.place: item for item in reversed(scene.items)}
    texts = {text.place: text for text in scene.texts}
    answers = []
    for place in ANCHORS:
        unsure = is_open and place in OPEN
        nothing = {} if unsure else {"colour": NONE_AT_ALL}
        answers.append(_drawn(shapes[place], scene) if place in shapes else nothing)
    for place in TEXT_PLACES:
        nothing = {"script": NONE_AT_ALL}
        answers.append(_drawn(texts[place], scene) if place in texts else nothing)
    return torch.stack([_indices(one, ABOUT) for one in answers])


def noted_at(scene: Scene, grid: tuple[int, int]) -> Tensor:
    """int64 [H, W]: which of PLACES has a note on what fills the square around a shape, or a text.

    -1 for the background, and for shapes whose place is open.
    """
    y, x = ((torch.arange(many) + 0.5) / many for many in grid)
    places = torch.full(grid, -1)
    rows, columns = scene.preview
    for item in scene.items:
        for row, column in item.centres if item.place else ():
            down, right = (
                (y * rows - row).abs() < item.radius,
                (x * columns - column).abs() < item.radius,
            )
            places[down[:, None] & right] = list(ANCHORS).index(item.place)
    for text in scene.texts:
        down, right = map(torch.from_numpy, into_text(scene, text, grid))
        down, right = (down >= 0) & (down < 1), (right >= 0) & (right < len(text.content))
        places[down[:, None] & right] = len(ANCHORS) + TEXT_PLACES.index(text.place)
    return places


def _answers(thing: Item | Text) -> dict:
    if isinstance(thing, Text):
        return {"script": thing.script, "length": len(thing.content)}
    return {
        "colour": thing.colour, "shape": thing.shape, "size": thing.size,
        "count": len(thing.centres),
    }  # fmt: skip


def _drawn(thing: Item | Text, scene: Scene) -> dict:
    """`_answers`, and where the thing begins."""
    if isinstance(thing, Text):
        cells = zip(scene.text_origin(thing), scene.preview, scene.grid, strict=True)
        # the first preview cell whose centre is no further up or left
        row, column = (math.ceil(at * few / many - 0.5) for at, few, many in cells)
    else:
        row, column = (int(centre - thing.radius) for centre in thing.centres[0])
    return {**_answers(thing), "row": row, "column": column}


def _indices(answers: dict, questions: dict[str, tuple]) -> Tensor:
    """The answers' indices among those there are and NONE_AT_ALL, -1 where none is given."""
    return torch.tensor(
        [
            (*options, NONE_AT_ALL).index(answers[name]) if name in answers else -1
            for name, options in questions.items()
        ]
    )


def shown_by(codes: Tensor) -> Tensor:
    """The colour of the shape that a cell shows at least a part of, or NOTHING, or WRITING."""
    names = torch.tensor([NAMES.index(name) for name, _ in PAIRS], device=codes.device)
    of_edges = names[((codes - EDGE) // PATTERNS).clamp(0, len(PAIRS) - 1)]
    colours = torch.where(codes < EDGE, codes - INSIDE, of_edges)
    colours = torch.where(codes < INSIDE, NOTHING, colours)
    return torch.where((codes >= TEXT) & (codes < USED), WRITING, colours)


class Reading(nn.Module):
    """The heads."""

    def __init__(self, layers: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.states = {}  # [B, S, width] after each of these layers, of the model's last pass
        for layer in {PHRASE_LAYER, LAYOUT_LAYER, WHERE_LAYER}:
            layers[layer].register_forward_hook(partial(self._keep, layer))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.phrase = nn.Linear(width, sum(map(len, ASKED.values())))
        self.layout = nn.Linear(width, sum(len(options) + 1 for options in ABOUT.values()))
        self.where = nn.Linear(width, 2 * LONGEST_SIDE)
        self.below = nn.Linear(width, len(BELOW) * (WRITING + 1))

    def phrases(self, ends: Tensor, asked: Tensor) -> Tensor:
        """Weighted loss of phrases that end at (sample, token) ends [K, 2]; asked: [K, ASKED]."""
        states = self.norm(self.states[PHRASE_LAYER][ends[:, 0], ends[:, 1]])
        sizes = [len(options) for options in ASKED.values()]
        return PHRASE_WEIGHT * _mean_loss(self.phrase(states).split(sizes, -1), asked)

    def layouts(self, first: int, asked: Tensor) -> Tensor:
        """Weighted loss of the layout, said by the tokens of the PLACES, of which the first is
        token `first`; asked: int64 [B, PLACES, ABOUT]."""
        states = self.norm(self.states[LAYOUT_LAYER][:, first : first + asked.shape[1]])
        sizes = [len(options) + 1 for options in ABOUT.values()]
        return LAYOUT_WEIGHT * _mean_loss(self.layout(states).split(sizes, -1), asked)

    def whereabouts(self, positions: Tensor) -> Tensor:
        """Weighted loss of the row and the column of the cells that the last states are to name.

        Args:
            positions: int64 [3, B, N], the cells' own, on the axes (t, h, w).
        """
        states = self.norm(self.states[WHERE_LAYER][:, -positions.shape[-1] :])
        row_and_column = (positions[1:] - positions[0]).permute(1, 2, 0)
        return WHERE_WEIGHT * _mean_loss(self.where(states).split(LONGEST_SIDE, -1), row_and_column)

    def rows_below(self, states: Tensor, codes: Tensor) -> Tensor:
        """Weighted loss of what stands some rows below the cell that each state is to name.

        Args:
            states: [B, H * W, width], the model's last.
            codes: int64 [B, H, W].
        """
        shown = shown_by(codes)
        parts = self.below(states).unflatten(1, codes.shape[1:]).chunk(len(BELOW), -1)
        losses = [
            F.cross_entropy(part[:, :-rows].flatten(0, 2), shown[:, rows:].flatten())
            for part, rows in zip(parts, BELOW, strict=True)
        ]
        return BELOW_WEIGHT * torch.stack(losses).mean()

    def _keep(self, layer: int, module: nn.Module, given: tuple, states: Tensor) -> None:
        self.states[layer] = states


def _mean_loss(logits: Sequence[Tensor], wanted: Tensor) -> Tensor:
    """Mean cross-entropy over the questions, logits [..., answers] each and wanted [..., Q]."""
    return torch.stack(
        [
            F.cross_entropy(part[known], answers[known])
            for part, answers in zip(logits, wanted.unbind(-1), strict=True)
            if (known := answers >= 0).any()
        ]
    ).mean()
