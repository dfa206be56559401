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
from .edits import EDITS, Edit
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
from .tokenizer import ANYWHERE, NOTES, SHAPE_AT, TEXT_AT

# After which layer phrases and wishes must be understood; a reference's cells know the wish, and
# whether it is about them; the layout, and where a cell lies, are clear; and a cell is copied.
PHRASE_LAYER, TOLD_LAYER, SUBJECT_LAYER, LAYOUT_LAYER, WHERE_LAYER, COPY_LAYER = 1, 2, 3, 3, 3, 4
PHRASE_WEIGHT, LAYOUT_WEIGHT, WHERE_WEIGHT, BELOW_WEIGHT = 0.1, 1.0, 0.1, 0.1
WISH_WEIGHT, TOLD_WEIGHT, SUBJECT_WEIGHT, BECOME_WEIGHT = 0.1, 2.0, 0.5, 0.3
SEEN_WEIGHT, COME_WEIGHT, WITHIN_WEIGHT, SQUARE_WEIGHT = 0.5, 0.5, 0.1, 0.3
BELOW = (2, 4)  # rows
MOST_TO_COME = 4
EIGHTHS = 8  # of a preview's cell
WIDEST_SQUARE = 2 * max(RADII.values())  # around a shape, in cells of the preview
LONGEST_SIDE = max(map(max, SIZES)) // 32  # of a grid, in cells
NOTHING, WRITING = len(NAMES), len(NAMES) + 1  # beside the colours of shapes, what a cell shows
OF_PAIRS = torch.tensor([[NAMES.index(name) for name in pair] for pair in PAIRS]).T
"""int64 [2, pairs]: the colours of an edge's shape, and of its background."""
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
"""What each of `tokenizer.NOTES` must say of its place, or of a shape whose place is open.

`row` and `column` are the preview cell at the top left of what is there. They are asked of square
pictures alone: the prompt goes on with the size after the notes, so that they cannot know it, and
what is a row of a square's sixteen is a share of any other's.

These tokens lie at the same distance from the cells, however long the prompt is, so that a cell can
find its place's by distance alone. With the colour of a shape, or the script of a text, a token
also says whether there is one.
"""
WISHED = {
    "edit": tuple(EDITS), "colour": tuple(COLOURS), "shape": SHAPES, "to": (*COLOURS, *SHAPES),
}  # fmt: skip
"""What the token behind a wish must say of it: what is done to which shape, and what it becomes.

It is the reference's start, which lies at one distance from all cells of the reference.
"""


def asked_by(thing: Item | Text | None, scene: Scene) -> Tensor:
    """int64 [len(ASKED)]: indices of the answers, -1 where the phrase says nothing of it."""
    if thing is None:
        answers = {"kind": None, "colour": scene.background}
    else:
        answers = {"kind": type(thing), "place": thing.place, **_answers(thing)}
    return _indices(answers, ASKED)


def wished_by(edit: Edit) -> Tensor:
    """int64 [len(WISHED)]: indices of the answers, -1 where the wish names none."""
    answers = {"edit": edit.kind}
    if edit.subject is not None:
        answers |= {"colour": edit.subject.colour, "shape": edit.subject.shape}
    if edit.to is not None:
        answers["to"] = edit.to
    return _indices(answers, WISHED)


def layout_of(scene: Scene) -> Tensor:
    """int64 [len(NOTES), len(ABOUT)]: indices of what is at each place, and of what is anywhere.

    -1 where nothing can be said, as of a place where a shape may be whose place is open.
    """
    anywhere = _anywhere(scene)
    shapes = {item.place: item for item in reversed(scene.items)}
    texts = {text.place: text for text in scene.texts}
    missing = [{"colour": NONE_AT_ALL}] * (len(ANYWHERE) - len(anywhere))
    answers = [*map(_answers, anywhere), *missing]
    for place in ANCHORS:
        unsure = anywhere and place in OPEN
        nothing = {} if unsure else {"colour": NONE_AT_ALL}
        answers.append(_drawn(shapes[place], scene) if place in shapes else nothing)
    for place in TEXT_PLACES:
        nothing = {"script": NONE_AT_ALL}
        answers.append(_drawn(texts[place], scene) if place in texts else nothing)
    return torch.stack([_indices(one, ABOUT) for one in answers])


def noted_at(scene: Scene, grid: tuple[int, int]) -> Tensor:
    """int64 [H, W]: which of NOTES is on what fills the square around a shape, or a text.

    -1 for the background.
    """
    notes = torch.full(grid, -1)
    for thing, note in notes_of(scene):
        if isinstance(thing, Text):
            down, right = map(torch.from_numpy, into_text(scene, thing, grid))
            down, right = (down >= 0) & (down < 1), (right >= 0) & (right < len(thing.content))
            notes[down[:, None] & right] = NOTES.index(note)
            continue
        for centre in thing.centres:
            notes[_square(scene, grid, centre, thing.radius)] = NOTES.index(note)
    return notes


def notes_of(scene: Scene) -> list[tuple[Item | Text, str]]:
    """All that a picture shows, each with the one of NOTES that is on it."""
    anywhere = _anywhere(scene)
    shapes = [
        (item, SHAPE_AT[item.place] if item.place else ANYWHERE[anywhere.index(item)])
        for item in scene.items
    ]
    return [*shapes, *((text, TEXT_AT[text.place]) for text in scene.texts)]


def _anywhere(scene: Scene) -> list[Item]:
    """The shapes whose places are open."""
    return [item for item in scene.items if item.place is None]


def to_come(scene: Scene, codes: Tensor) -> Tensor:
    """int64 [H * W, colours]: how many shapes of a colour begin at each cell or later, of codes."""
    counts, shown = torch.zeros(codes.numel(), len(NAMES), dtype=torch.int64), shown_by(codes)
    for item in scene.items:
        colour = NAMES.index(item.colour)
        for centre in item.centres:
            square = _square(scene, codes.shape, centre, item.radius)
            begins = int((square & (shown == colour)).flatten().nonzero()[0])
            counts[: begins + 1, colour] += 1
    return counts.clamp(max=MOST_TO_COME)


def squares_at(scene: Scene, grid: tuple[int, int]) -> Tensor:
    """int64 [H, W, 2]: the row and the column, in the square around a shape, of each cell's centre.

    They are the preview's; -1 for cells in no such square.
    """
    squares = torch.full((*grid, 2), -1)
    for item in scene.items:
        for centre in item.centres:
            down, right = (
                (item.radius + away).floor().long() for away in _away(scene, grid, centre)
            )
            inside = _square(scene, grid, centre, item.radius)
            squares[inside] = torch.cartesian_prod(down, right).unflatten(0, grid)[inside]
    return squares


def _square(scene: Scene, grid: tuple[int, int], centre: tuple, radius: float) -> Tensor:
    """bool [H, W]: the cells of a grid whose centres lie in the square around a shape."""
    down, right = (away.abs() < radius for away in _away(scene, grid, centre))
    return down[:, None] & right


def _away(scene: Scene, grid: tuple[int, int], point: tuple) -> list[Tensor]:
    """How far a grid's rows and columns are below and right of a point: preview cells, [H], [W]."""
    return [
        ((torch.arange(many) + 0.5) / many) * few - at
        for many, few, at in zip(grid, scene.preview, point, strict=True)
    ]


def _answers(thing: Item | Text) -> dict:
    if isinstance(thing, Text):
        return {"script": thing.script, "length": len(thing.content)}
    return {
        "colour": thing.colour, "shape": thing.shape, "size": thing.size,
        "count": len(thing.centres),
    }  # fmt: skip


def _drawn(thing: Item | Text, scene: Scene) -> dict:
    """`_answers`, and where the thing begins, if the preview is a square."""
    if scene.height != scene.width:
        return _answers(thing)
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
    of_edges = _of_edges(codes, OF_PAIRS[0])
    colours = torch.where(codes < EDGE, codes - INSIDE, of_edges)
    colours = torch.where(codes < INSIDE, NOTHING, colours)
    return torch.where((codes >= TEXT) & (codes < USED), WRITING, colours)


def ground_of(codes: Tensor) -> Tensor:
    """The colour of the background that a cell shows at least a part of, -1 where it shows none."""
    colours = torch.where(codes < TEXT, _of_edges(codes, OF_PAIRS[1]), -1)
    return torch.where(codes < EDGE, torch.where(codes < INSIDE, codes, -1), colours)


def _of_edges(codes: Tensor, colours: Tensor) -> Tensor:
    """The colour that is given for an edge's pair, int64 [pairs]; of other codes, any."""
    return colours.to(codes.device)[((codes - EDGE) // PATTERNS).clamp(0, len(PAIRS) - 1)]


class Reading(nn.Module):
    """The heads."""

    def __init__(self, layers: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.states = {}  # [B, S, width] after each of these layers, of the model's last pass
        asked = {PHRASE_LAYER, TOLD_LAYER, SUBJECT_LAYER, LAYOUT_LAYER, WHERE_LAYER, COPY_LAYER}
        for layer in asked:
            layers[layer].register_forward_hook(partial(self._keep, layer))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.phrase = nn.Linear(width, sum(map(len, ASKED.values())))
        self.layout = nn.Linear(width, sum(len(options) + 1 for options in ABOUT.values()))
        self.where = nn.Linear(width, 2 * LONGEST_SIDE)
        self.within = nn.Linear(width, 2 * EIGHTHS)
        self.seen = nn.Linear(width, len(NAMES))
        self.below = nn.Linear(width, len(BELOW) * (WRITING + 1))
        self.wish = nn.Linear(width, sum(map(len, WISHED.values())))
        self.become = nn.Linear(width, WRITING + 1 + len(NAMES))
        self.come = nn.Linear(width, len(NAMES) * (MOST_TO_COME + 1))
        self.subject = nn.Linear(width, 2)
        self.told = nn.Linear(width, sum(map(len, WISHED.values())))
        self.square = nn.Linear(width, 2 * WIDEST_SQUARE)
        self.copied_square = nn.Linear(width, 2 * WIDEST_SQUARE)

    def phrases(self, ends: Tensor, asked: Tensor) -> Tensor:
        """Weighted loss of phrases that end at (sample, token) ends [K, 2]; asked: [K, ASKED]."""
        states = self.norm(self.states[PHRASE_LAYER][ends[:, 0], ends[:, 1]])
        return PHRASE_WEIGHT * _mean_loss(_answers_to(ASKED, self.phrase(states)), asked)

    def layouts(self, first: int, asked: Tensor) -> Tensor:
        """Weighted loss of the layout, said by the NOTES, of which the first is token `first`.

        asked: int64 [B, NOTES, ABOUT].
        """
        states = self.norm(self.states[LAYOUT_LAYER][:, first : first + asked.shape[1]])
        sizes = [len(options) + 1 for options in ABOUT.values()]
        return LAYOUT_WEIGHT * _mean_loss(self.layout(states).split(sizes, -1), asked)

    def wishes(self, starts: Tensor, asked: Tensor) -> Tensor:
        """Weighted loss of what is wished, said by tokens starts [B]; asked: int64 [B, WISHED]."""
        states = self._at(PHRASE_LAYER, starts[:, None])[:, 0]
        return WISH_WEIGHT * _mean_loss(_answers_to(WISHED, self.wish(states)), asked)

    def told_of(self, cells: Tensor, asked: Tensor) -> Tensor:
        """Weighted loss of what is wished, said by the reference.

        Args:
            cells: int64 [B, N], the tokens of the reference; asked: int64 [B, WISHED].
        """
        said = self.told(self._at(TOLD_LAYER, cells))
        asked = asked[:, None].expand(-1, cells.shape[1], -1)
        return TOLD_WEIGHT * _mean_loss(_answers_to(WISHED, said), asked)

    def subjects(self, cells: Tensor, asked: Tensor) -> Tensor:
        """Weighted loss of whether the wish is about the shape that a reference's cell shows.

        Args:
            cells: int64 [B, N], the tokens of the reference; asked: int64 [B, N], 1, 0, or -1.
        """
        said = self.subject(self._at(SUBJECT_LAYER, cells))
        return SUBJECT_WEIGHT * F.cross_entropy(said.mT, asked, ignore_index=-1)

    def becomes(self, cells: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Weighted loss of what a reference's cells become, said by themselves.

        The shape's colour is asked of cells that show a shape or will; of the others it is plain.

        Args:
            cells: int64 [B, N], the tokens of the reference.
            before, after: int64 [B, N], codes of the reference and of the edited picture.
        """
        states = self._at(LAYOUT_LAYER, cells)
        drawn = (before >= INSIDE) | (after >= INSIDE)
        asked = torch.stack([torch.where(drawn, shown_by(after), -1), ground_of(after)], -1)
        answers = self.become(states).split([WRITING + 1, len(NAMES)], -1)
        return BECOME_WEIGHT * _mean_loss(answers, asked)

    def whereabouts(self, positions: Tensor) -> Tensor:
        """Weighted loss of the row and the column of the cells that the last states are to name.

        Args:
            positions: int64 [3, B, N], the cells' own, on the axes (t, h, w).
        """
        states = self.norm(self.states[WHERE_LAYER][:, -positions.shape[-1] :])
        row_and_column = (positions[1:] - positions[0]).permute(1, 2, 0)
        return WHERE_WEIGHT * _mean_loss(self.where(states).split(LONGEST_SIDE, -1), row_and_column)

    def phases(self, asked: Tensor) -> Tensor:
        """Weighted loss of where in a preview's cell the centres lie of cells of the large grid.

        Args:
            asked: int64 [B, N, 2], eighths down and to the right, for each of the last states; -1
                for those that are to name no such cell.
        """
        states = self.norm(self.states[WHERE_LAYER][:, -asked.shape[1] :])
        return WITHIN_WEIGHT * _mean_loss(self.within(states).split(EIGHTHS, -1), asked)

    def squares(self, copied: Tensor, asked: Tensor) -> Tensor:
        """Weighted loss of where in a shape the cells of the large grid lie.

        The preview's cells that they copy must say it, and they themselves when they have.

        Args:
            copied: int64 [B, N], tokens, for each of the last states; -1 where none is.
            asked: int64 [B, N, 2], `squares_at`; -1 for what lies in none.
        """
        states = self._at(WHERE_LAYER, copied.clamp(min=0))
        there = self.norm(self.states[COPY_LAYER][:, -asked.shape[1] :])
        said = (self.square(states), self.copied_square(there))
        losses = [_mean_loss(one.split(WIDEST_SQUARE, -1), asked) for one in said]
        return SQUARE_WEIGHT * torch.stack(losses).mean()

    def begun(self, codes: Tensor, written: int) -> Tensor:
        """Weighted loss of which of a preview's shapes have begun before each cell, by colour.

        Args:
            codes: int64 [B, N].
            written: how many states are to name a cell, of which the first N are asked.
        """
        shown = F.one_hot(shown_by(codes), WRITING + 1)[..., :NOTHING].cumsum(1) > 0
        before = F.pad(shown[:, :-1], (0, 0, 1, 0))
        said = self.seen(self.norm(self.states[WHERE_LAYER][:, -written:][:, : codes.shape[1]]))
        asked = shown[:, -1:].expand_as(said)
        lost = F.binary_cross_entropy_with_logits(said[asked], before[asked].to(said.dtype))
        return SEEN_WEIGHT * lost

    def coming(self, states: Tensor, asked: Tensor) -> Tensor:
        """Weighted loss of how many shapes of each colour are still to begin.

        Args:
            states: [B, N, width], the model's last, each of which is to name a cell.
            asked: int64 [B, N, colours], `to_come`.
        """
        return COME_WEIGHT * _mean_loss(self.come(states).chunk(len(NAMES), -1), asked)

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

    def _at(self, layer: int, tokens: Tensor) -> Tensor:
        """[B, N, width], normed: states after a layer, of tokens int64 [B, N]."""
        states = self.states[layer]
        return self.norm(states.gather(1, tokens[..., None].expand(-1, -1, states.shape[-1])))

    def _keep(self, layer: int, module: nn.Module, given: tuple, states: Tensor) -> None:
        self.states[layer] = states


def _answers_to(questions: dict[str, tuple], said: Tensor) -> Sequence[Tensor]:
    """Logits of a head's answers [..., all], a tensor for each question."""
    return said.split([len(options) for options in questions.values()], -1)


def _mean_loss(logits: Sequence[Tensor], wanted: Tensor) -> Tensor:
    """Mean cross-entropy over the questions, logits [..., answers] each and wanted [..., Q]."""
    return torch.stack(
        [
            F.cross_entropy(part[known], answers[known])
            for part, answers in zip(logits, wanted.unbind(-1), strict=True)
            if (known := answers >= 0).any()
        ]
    ).mean()
