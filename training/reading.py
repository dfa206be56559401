"""Auxiliary losses that teach the AR model to read its prompt and to plan its picture.

In a picture's codes only the first cells of a shape depend on the prompt; the others follow from
the cells above. From the codes alone a small model left shapes out or misplaced them, even after
sixty thousand pictures. So additional heads must read off its states what the prompt asks for and
what the picture will show. They are trained with the model and then discarded.
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

# The layers after which states must know something.
PHRASE_LAYER = 1  # what a phrase or a wish asks for
REFERENCE_LAYER, SUBJECT_LAYER = 2, 3  # the wish, in the reference; whether it is about the cell
NOTE_LAYER, POSITION_LAYER = 3, 3  # what a note is about; where the cell to name is
COPY_LAYER = 4  # which cell to copy
READ_LAYERS = {
    PHRASE_LAYER, REFERENCE_LAYER, SUBJECT_LAYER, NOTE_LAYER, POSITION_LAYER, COPY_LAYER,
}  # fmt: skip
PHRASE_WEIGHT, NOTE_WEIGHT, POSITION_WEIGHT, BELOW_WEIGHT = 0.1, 1.0, 0.1, 0.1
WISH_WEIGHT, REFERENCE_WEIGHT, SUBJECT_WEIGHT, BECOME_WEIGHT = 0.1, 2.0, 0.5, 0.3
SEEN_WEIGHT, COME_WEIGHT, WITHIN_WEIGHT, SQUARE_WEIGHT = 0.5, 0.5, 0.1, 0.3
BELOW = (2, 4)  # distances in rows
MOST_TO_COME = 4  # shapes of a colour; more are counted as this many
EIGHTHS = 8  # parts of a preview's cell on each axis
WIDEST_SQUARE = 2 * max(RADII.values())  # around a shape, in cells of the preview
LONGEST_SIDE = max(map(max, SIZES)) // 32  # of a grid, in cells
NOTHING, WRITING = len(NAMES), len(NAMES) + 1  # what a cell shows, if it is no colour of a shape
OF_PAIRS = torch.tensor([[NAMES.index(name) for name in pair] for pair in PAIRS]).T
"""int64 [2, pairs]: the colours of an edge's shape and of its background."""
PHRASE_QUESTIONS = {
    "kind": (Item, Text, None),  # None is the background
    "place": (*ANCHORS, None),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(RADII),
    "count": (1, 2, 3, 4),
    "script": tuple(LONGEST),
    "length": tuple(range(1, MAX_LETTERS + 1)),
}
"""What a phrase can ask for, with the possible answers."""
NONE_AT_ALL = "none at all"
NOTE_QUESTIONS = {
    **{name: PHRASE_QUESTIONS[name] for name in PHRASE_QUESTIONS if name not in ("kind", "place")},
    "row": tuple(range(20)),
    "column": tuple(range(20)),
}
"""What each of `tokenizer.NOTES` must say of its place, or of a shape whose place is open.

`row` and `column` are the preview cell at the top left of the shape or text. They are asked in
square pictures only: the size follows the notes in the prompt, so a note cannot know it, and only
squares all have a preview of sixteen rows.

The notes are at the same distance from the cells however long the prompt is, so a cell can find the
note of its place by distance alone. The answer to colour or script also says whether there is a
shape or text at all.
"""
WISH_QUESTIONS = {
    "edit": tuple(EDITS), "colour": tuple(COLOURS), "shape": SHAPES, "to": (*COLOURS, *SHAPES),
}  # fmt: skip
"""What the token after a wish must say of it: the kind of edit, its subject, and what it becomes.

This token is the start of the reference, at the same distance from its cells in every prompt.
"""


def phrase_answers(thing: Item | Text | None, scene: Scene) -> Tensor:
    """int64 [len(PHRASE_QUESTIONS)]: indices of the answers, -1 where the phrase gives none."""
    if thing is None:
        answers = {"kind": None, "colour": scene.background}
    else:
        answers = {"kind": type(thing), "place": thing.place, **_answers(thing)}
    return _indices(answers, PHRASE_QUESTIONS)


def wish_answers(edit: Edit) -> Tensor:
    """int64 [len(WISH_QUESTIONS)]: indices of the answers, -1 where the wish gives none."""
    answers = {"edit": edit.kind}
    if edit.subject is not None:
        answers |= {"colour": edit.subject.colour, "shape": edit.subject.shape}
    if edit.to is not None:
        answers["to"] = edit.to
    return _indices(answers, WISH_QUESTIONS)


def note_answers(scene: Scene) -> Tensor:
    """int64 [len(NOTES), len(NOTE_QUESTIONS)]: indices of each note's answers.

    -1 where there is no answer, as for a place that a shape with an open place may take.
    """
    anywhere = _anywhere(scene)
    shapes = {item.place: item for item in reversed(scene.items)}
    texts = {text.place: text for text in scene.texts}
    unused = [{"colour": NONE_AT_ALL}] * (len(ANYWHERE) - len(anywhere))
    answers = [*map(_answers, anywhere), *unused]
    for place in ANCHORS:
        unsure = anywhere and place in OPEN
        nothing = {} if unsure else {"colour": NONE_AT_ALL}
        answers.append(_with_cell(shapes[place], scene) if place in shapes else nothing)
    for place in TEXT_PLACES:
        nothing = {"script": NONE_AT_ALL}
        answers.append(_with_cell(texts[place], scene) if place in texts else nothing)
    return torch.stack([_indices(answer, NOTE_QUESTIONS) for answer in answers])


def notes_on_cells(scene: Scene, grid: tuple[int, int]) -> Tensor:
    """int64 [H, W]: the index in NOTES of the note on each cell's shape or text.

    A shape's cells are those of the square around it. -1 for the background.
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
    """Every shape and text of a scene with its note, one of NOTES."""
    anywhere = _anywhere(scene)
    shapes = [
        (item, SHAPE_AT[item.place] if item.place else ANYWHERE[anywhere.index(item)])
        for item in scene.items
    ]
    return [*shapes, *((text, TEXT_AT[text.place]) for text in scene.texts)]


def _anywhere(scene: Scene) -> list[Item]:
    """The items whose places are open."""
    return [item for item in scene.items if item.place is None]


def shapes_to_come(scene: Scene, codes: Tensor) -> Tensor:
    """int64 [H * W, colours]: how many shapes of a colour begin at each cell of codes or later."""
    counts, shown = torch.zeros(codes.numel(), len(NAMES), dtype=torch.int64), shown_by(codes)
    for item in scene.items:
        colour = NAMES.index(item.colour)
        for centre in item.centres:
            square = _square(scene, codes.shape, centre, item.radius)
            begins = int((square & (shown == colour)).flatten().nonzero()[0])
            counts[: begins + 1, colour] += 1
    return counts.clamp(max=MOST_TO_COME)


def squares_at(scene: Scene, grid: tuple[int, int]) -> Tensor:
    """int64 [H, W, 2]: the row and column of each cell's centre in the square around a shape.

    They are counted in preview cells; -1 for cells outside all squares.
    """
    squares = torch.full((*grid, 2), -1)
    for item in scene.items:
        for centre in item.centres:
            down, right = (
                (item.radius + offset).floor().long() for offset in _offsets(scene, grid, centre)
            )
            inside = _square(scene, grid, centre, item.radius)
            squares[inside] = torch.cartesian_prod(down, right).unflatten(0, grid)[inside]
    return squares


def _square(scene: Scene, grid: tuple[int, int], centre: tuple, radius: float) -> Tensor:
    """bool [H, W]: the cells of a grid whose centres lie in the square around a shape."""
    down, right = (offset.abs() < radius for offset in _offsets(scene, grid, centre))
    return down[:, None] & right


def _offsets(scene: Scene, grid: tuple[int, int], point: tuple) -> list[Tensor]:
    """[H] and [W]: a grid's rows and columns relative to a point, in preview cells."""
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


def _with_cell(thing: Item | Text, scene: Scene) -> dict:
    """`_answers`, and in a square picture the preview cell where the shape or text begins."""
    if scene.height != scene.width:
        return _answers(thing)
    if isinstance(thing, Text):
        cells = zip(scene.text_origin(thing), scene.preview, scene.grid, strict=True)
        # the first preview cell whose centre is not above or left of the text
        row, column = (math.ceil(at * few / many - 0.5) for at, few, many in cells)
    else:
        row, column = (int(centre - thing.radius) for centre in thing.centres[0])
    return {**_answers(thing), "row": row, "column": column}


def _indices(answers: dict, questions: dict[str, tuple]) -> Tensor:
    """Indices of answers among each question's options and NONE_AT_ALL, -1 where none is given."""
    return torch.tensor(
        [
            (*options, NONE_AT_ALL).index(answers[name]) if name in answers else -1
            for name, options in questions.items()
        ]
    )


def shown_by(codes: Tensor) -> Tensor:
    """The colour of the shape that a cell shows, even in part, or NOTHING, or WRITING."""
    of_edges = _of_edges(codes, OF_PAIRS[0])
    colours = torch.where(codes < EDGE, codes - INSIDE, of_edges)
    colours = torch.where(codes < INSIDE, NOTHING, colours)
    return torch.where((codes >= TEXT) & (codes < USED), WRITING, colours)


def ground_of(codes: Tensor) -> Tensor:
    """The colour of the background that a cell shows, even in part; -1 if it shows none."""
    colours = torch.where(codes < TEXT, _of_edges(codes, OF_PAIRS[1]), -1)
    return torch.where(codes < EDGE, torch.where(codes < INSIDE, codes, -1), colours)


def _of_edges(codes: Tensor, colours: Tensor) -> Tensor:
    """The entry of colours [pairs] for the pair of an edge's code; any entry for other codes."""
    return colours.to(codes.device)[((codes - EDGE) // PATTERNS).clamp(0, len(PAIRS) - 1)]


class Reading(nn.Module):
    """The auxiliary heads and their losses."""

    def __init__(self, layers: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.states = {}  # by layer: [B, S, width] after it in the model's last pass
        for layer in READ_LAYERS:
            layers[layer].register_forward_hook(partial(self._keep, layer))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.phrase = nn.Linear(width, sum(map(len, PHRASE_QUESTIONS.values())))
        self.layout = nn.Linear(width, sum(len(options) + 1 for options in NOTE_QUESTIONS.values()))
        self.where = nn.Linear(width, 2 * LONGEST_SIDE)
        self.within = nn.Linear(width, 2 * EIGHTHS)
        self.seen = nn.Linear(width, len(NAMES))
        self.below = nn.Linear(width, len(BELOW) * (WRITING + 1))
        self.wish = nn.Linear(width, sum(map(len, WISH_QUESTIONS.values())))
        self.become = nn.Linear(width, WRITING + 1 + len(NAMES))
        self.come = nn.Linear(width, len(NAMES) * (MOST_TO_COME + 1))
        self.subject = nn.Linear(width, 2)
        self.told = nn.Linear(width, sum(map(len, WISH_QUESTIONS.values())))
        self.square = nn.Linear(width, 2 * WIDEST_SQUARE)
        self.copied_square = nn.Linear(width, 2 * WIDEST_SQUARE)

    def phrases(self, ends: Tensor, asked: Tensor) -> Tensor:
        """Weighted loss of what phrases ask for, read at their (sample, token) ends [K, 2].

        asked: int64 [K, PHRASE_QUESTIONS].
        """
        states = self.norm(self.states[PHRASE_LAYER][ends[:, 0], ends[:, 1]])
        return PHRASE_WEIGHT * _mean_loss(_answers_to(PHRASE_QUESTIONS, self.phrase(states)), asked)

    def notes(self, first: int, asked: Tensor) -> Tensor:
        """Weighted loss of what the notes say; the first note is token `first`.

        asked: int64 [B, NOTES, NOTE_QUESTIONS].
        """
        states = self.norm(self.states[NOTE_LAYER][:, first : first + asked.shape[1]])
        sizes = [len(options) + 1 for options in NOTE_QUESTIONS.values()]
        return NOTE_WEIGHT * _mean_loss(self.layout(states).split(sizes, -1), asked)

    def wishes(self, starts: Tensor, asked: Tensor) -> Tensor:
        """Weighted loss of what a wish says, read at tokens starts [B].

        asked: int64 [B, WISH_QUESTIONS].
        """
        states = self._at(PHRASE_LAYER, starts[:, None])[:, 0]
        return WISH_WEIGHT * _mean_loss(_answers_to(WISH_QUESTIONS, self.wish(states)), asked)

    def reference_wishes(self, cells: Tensor, asked: Tensor) -> Tensor:
        """Weighted loss of what a wish says, read at each cell of the reference.

        Args:
            cells: int64 [B, N], the reference's tokens; asked: int64 [B, WISH_QUESTIONS].
        """
        said = self.told(self._at(REFERENCE_LAYER, cells))
        asked = asked[:, None].expand(-1, cells.shape[1], -1)
        return REFERENCE_WEIGHT * _mean_loss(_answers_to(WISH_QUESTIONS, said), asked)

    def subjects(self, cells: Tensor, asked: Tensor) -> Tensor:
        """Weighted loss of whether the wish is about the shape that a reference's cell shows.

        Args:
            cells: int64 [B, N], the reference's tokens; asked: int64 [B, N], 1, 0, or -1.
        """
        said = self.subject(self._at(SUBJECT_LAYER, cells))
        return SUBJECT_WEIGHT * F.cross_entropy(said.mT, asked, ignore_index=-1)

    def becomes(self, cells: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Weighted loss of what a reference's cells become, read at these cells.

        The shape's colour is asked of cells that show a shape before or after the edit.

        Args:
            cells: int64 [B, N], the reference's tokens.
            before, after: int64 [B, N], codes of the reference and of the edited picture.
        """
        states = self._at(NOTE_LAYER, cells)
        drawn = (before >= INSIDE) | (after >= INSIDE)
        asked = torch.stack([torch.where(drawn, shown_by(after), -1), ground_of(after)], -1)
        answers = self.become(states).split([WRITING + 1, len(NAMES)], -1)
        return BECOME_WEIGHT * _mean_loss(answers, asked)

    def cell_positions(self, positions: Tensor) -> Tensor:
        """Weighted loss of the row and column of the cells that the last N states name.

        Args:
            positions: int64 [3, B, N], of the cells, on the axes (t, h, w).
        """
        states = self.norm(self.states[POSITION_LAYER][:, -positions.shape[-1] :])
        row_and_column = (positions[1:] - positions[0]).permute(1, 2, 0)
        return POSITION_WEIGHT * _mean_loss(
            self.where(states).split(LONGEST_SIDE, -1), row_and_column
        )

    def phases(self, asked: Tensor) -> Tensor:
        """Weighted loss of where in a preview's cell the centres of the large grid's cells lie.

        Args:
            asked: int64 [B, N, 2], eighths down and to the right, for the last N states; -1 for
                states that name no cell of the large grid.
        """
        states = self.norm(self.states[POSITION_LAYER][:, -asked.shape[1] :])
        return WITHIN_WEIGHT * _mean_loss(self.within(states).split(EIGHTHS, -1), asked)

    def squares(self, copied: Tensor, asked: Tensor) -> Tensor:
        """Weighted loss of where in a shape the cells of the large grid lie.

        It is read at the preview's cells that they copy, and at the states after the copy.

        Args:
            copied: int64 [B, N], the copied tokens of the last N states; -1 for none.
            asked: int64 [B, N, 2], `squares_at`; -1 for cells outside all squares.
        """
        preview = self._at(POSITION_LAYER, copied.clamp(min=0))
        large = self.norm(self.states[COPY_LAYER][:, -asked.shape[1] :])
        logits = (self.square(preview), self.copied_square(large))
        losses = [_mean_loss(part.split(WIDEST_SQUARE, -1), asked) for part in logits]
        return SQUARE_WEIGHT * torch.stack(losses).mean()

    def begun(self, codes: Tensor, written: int) -> Tensor:
        """Weighted loss of which of a preview's shapes have begun before each cell, by colour.

        Args:
            codes: int64 [B, N].
            written: how many of the last states name a cell; the loss is over the first N of them.
        """
        shown = F.one_hot(shown_by(codes), WRITING + 1)[..., :NOTHING].cumsum(1) > 0
        before = F.pad(shown[:, :-1], (0, 0, 1, 0))
        said = self.seen(self.norm(self.states[POSITION_LAYER][:, -written:][:, : codes.shape[1]]))
        asked = shown[:, -1:].expand_as(said)
        lost = F.binary_cross_entropy_with_logits(said[asked], before[asked].to(said.dtype))
        return SEEN_WEIGHT * lost

    def coming(self, states: Tensor, asked: Tensor) -> Tensor:
        """Weighted loss of how many shapes of each colour are still to begin.

        Args:
            states: [B, N, width], the model's last, one for each cell to name.
            asked: int64 [B, N, colours], `shapes_to_come`.
        """
        return COME_WEIGHT * _mean_loss(self.come(states).chunk(len(NAMES), -1), asked)

    def rows_below(self, states: Tensor, codes: Tensor) -> Tensor:
        """Weighted loss of what the cells BELOW rows under each named cell show.

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
        """[B, N, width]: the normed states of tokens int64 [B, N] after a layer."""
        states = self.states[layer]
        return self.norm(states.gather(1, tokens[..., None].expand(-1, -1, states.shape[-1])))

    def _keep(self, layer: int, module: nn.Module, given: tuple, states: Tensor) -> None:
        self.states[layer] = states


def _answers_to(questions: dict[str, tuple], said: Tensor) -> Sequence[Tensor]:
    """A head's logits [..., answers of all questions], split by question."""
    return said.split([len(options) for options in questions.values()], -1)


def _mean_loss(logits: Sequence[Tensor], wanted: Tensor) -> Tensor:
    """Mean cross-entropy over Q questions, each with logits [..., answers]; wanted [..., Q]."""
    return torch.stack(
        [
            F.cross_entropy(part[known], answers[known])
            for part, answers in zip(logits, wanted.unbind(-1), strict=True)
            if (known := answers >= 0).any()
        ]
    ).mean()
