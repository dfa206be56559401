"""The AR model's auxiliary losses ask for what the prompt says and what the picture shows."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glm_core.data.grids import grid_positions
from training.autoregressive import HIDDEN, LAYERS, AutoregressiveStage
from training.codes import CODEBOOK, EDGE, INSIDE, NAMES, cells
from training.edits import EDITS, Edit, draw_edit
from training.reading import (
    BELOW,
    COPY_LAYER,
    EIGHTHS,
    LONGEST_SIDE,
    MOST_TO_COME,
    NONE_AT_ALL,
    NOTE_LAYER,
    NOTE_QUESTIONS,
    NOTHING,
    PHRASE_LAYER,
    PHRASE_QUESTIONS,
    POSITION_LAYER,
    REFERENCE_LAYER,
    SUBJECT_LAYER,
    WIDEST_SQUARE,
    WISH_QUESTIONS,
    WRITING,
    Reading,
    ground_of,
    note_answers,
    notes_of,
    phrase_answers,
    shapes_to_come,
    shown_by,
    squares_at,
    wish_answers,
)
from training.samples import OPEN_SCENES, collate, collate_phrases
from training.scene import SIZES, Item, Scene, Text, draw_scene, place_item
from training.stage import Run
from training.tokenizer import IMAGE_START, NOTES
from training.wording import phrased


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> AutoregressiveStage:
    folder: Path = tmp_path_factory.mktemp("reading")
    return AutoregressiveStage(Run(folder, batch=4))


def test_a_phrases_range_holds_its_words() -> None:
    for i in range(60):
        rng = np.random.default_rng([2, i])
        scene = draw_scene(rng, 512, 512)
        prompt, phrases = phrased(rng, scene)
        assert [thing for thing, *_ in phrases] == [*scene.items, None, *scene.texts]
        for thing, start, end in phrases:
            if isinstance(thing, Text):
                assert thing.content in prompt[start:end]
            assert start == 0 or not prompt[start - 1].isascii() or not prompt[start - 1].isalnum()
            assert end == len(prompt) or not prompt[end].isascii() or not prompt[end].isalnum()


def test_phrases_end_at_their_tokens_in_a_batch(stage) -> None:
    batch = [stage.samples.prompt(np.random.default_rng([3, i]), 512, 512) for i in range(12)]
    ids = collate(batch)[0]
    ends, asked = collate_phrases(batch)
    assert asked.shape == (len(ends), len(PHRASE_QUESTIONS))
    scenes = [stage.samples.scene(np.random.default_rng([3, i]), 512, 512)[0] for i in range(12)]
    things = [(i, thing) for i, s in enumerate(scenes) for thing in (*s.items, None, *s.texts)]
    for (sample, token), (i, thing), wanted in zip(ends.tolist(), things, asked, strict=True):
        assert sample == i
        assert torch.equal(wanted, phrase_answers(thing, scenes[i]))
        said = stage.samples.offsets.decode(ids[sample, : token + 1].tolist())
        before = stage.samples.offsets.decode(ids[sample, :token].tolist())
        if isinstance(thing, Text):
            assert thing.content in said
        assert said != before


def test_a_notes_tokens_are_those_of_its_phrase(stage) -> None:
    """For an open place the token after the phrase is included, where the next phrase begins."""
    for i in range(60):
        scene, sample = stage.samples.scene(np.random.default_rng([10, i]), 512, 512)
        rng = np.random.default_rng([10, i])
        draw_scene(rng, 512, 512, all_anywhere=OPEN_SCENES)
        prompt, phrases = phrased(rng, scene)
        words = {thing: prompt[start:end].lower() for thing, start, end in phrases}
        subjects = dict.fromkeys(NOTES)
        for thing, note in reversed(notes_of(scene)):
            subjects[note] = thing
        for note, (first, last) in zip(NOTES, sample.spoken.tolist(), strict=True):
            thing = subjects[note]
            if thing is None:
                assert (first, last) == (-1, -1)
                continue
            is_open = isinstance(thing, Item) and thing.place is None
            tokens = sample.prompt.ids[first : last + 1 - is_open].tolist()
            said = stage.samples.offsets.decode(tokens).lower()
            assert said.strip() == words[thing]
            if is_open:
                behind = stage.samples.offsets.id_to_token(int(sample.prompt.ids[last]))
                follows = stage.samples.offsets.decode([int(sample.prompt.ids[last])])
                assert behind == "<|assistant|>" or follows in {",", ".", " and", "，", "。"}


def test_a_phrases_answers_are_the_scenes() -> None:
    heart = Item("heart", "red", "big", "top left", ((4.0, 4.0),))
    scene = Scene(512, 512, "blue", (heart,), (Text("春天", "bottom"),))
    names = list(PHRASE_QUESTIONS)

    def answers(thing: Item | Text | None) -> dict:
        found = phrase_answers(thing, scene).tolist()
        return {n: PHRASE_QUESTIONS[n][i] for n, i in zip(names, found, strict=True) if i >= 0}

    assert answers(None) == {"kind": None, "colour": "blue"}
    assert answers(scene.texts[0]) == {
        "kind": Text, "place": "bottom", "script": "chinese", "length": 2,
    }  # fmt: skip
    assert answers(heart) == {
        "kind": Item, "place": "top left", "colour": "red", "shape": "heart", "size": "big",
        "count": 1,
    }  # fmt: skip


def test_every_note_says_what_is_at_its_place() -> None:
    heart = Item("heart", "red", "big", "top left", ((4.0, 4.0),))
    star = replace(heart, shape="star", place=None, centres=((9.0, 9.0),))
    scene = Scene(512, 512, "blue", (heart,), (Text("春天", "bottom"),))

    def said(place: str, scene: Scene) -> dict:
        found = zip(
            NOTE_QUESTIONS.items(), note_answers(scene)[NOTES.index(place)].tolist(), strict=True
        )
        return {name: [*options, NONE_AT_ALL][i] for (name, options), i in found if i >= 0}

    assert said("<|at top left|>", scene) == {
        "colour": "red", "shape": "heart", "size": "big", "count": 1, "row": 1, "column": 1,
    }  # fmt: skip
    assert said("<|at left|>", scene) == {"colour": NONE_AT_ALL}
    assert said("<|text bottom|>", scene) == {
        "script": "chinese", "length": 2, "row": 13, "column": 6,
    }  # fmt: skip
    assert said("<|text top|>", scene) == {"script": NONE_AT_ALL}
    unsure = replace(scene, items=(heart, star))
    assert said("<|at left|>", unsure) == {}
    assert said("<|at top|>", unsure) == {"colour": NONE_AT_ALL}
    assert said("<|at top left|>", unsure)["shape"] == "heart"
    assert said("<|anywhere 0|>", unsure) == {
        "colour": "red", "shape": "star", "size": "big", "count": 1,
    }  # fmt: skip
    assert said("<|anywhere 1|>", unsure) == {"colour": NONE_AT_ALL}
    assert said("<|anywhere 0|>", scene) == {"colour": NONE_AT_ALL}


def test_notes_of_a_picture_that_is_not_square_give_no_row_or_column() -> None:
    for i in range(30):
        layout = note_answers(draw_scene(np.random.default_rng([7, i]), 512, 768))
        assert (
            layout[:, [list(NOTE_QUESTIONS).index(name) for name in ("row", "column")]] < 0
        ).all()


@pytest.mark.parametrize("size", [s for s in SIZES if s[0] == s[1]], ids=str)
def test_every_note_gives_the_first_cell_of_its_shape_or_text(size) -> None:
    for i in range(30):
        scene = draw_scene(np.random.default_rng([7, i]), *size)
        places = dict(zip(NOTES, note_answers(scene).tolist(), strict=True))
        for thing in (*scene.items, *scene.texts):
            if thing.place is None:
                continue
            is_text = isinstance(thing, Text)
            alone = replace(scene, items=() if is_text else (thing,), texts=(thing,) * is_text)
            drawn = np.argwhere(cells(alone, scene.preview) >= INSIDE)
            said = places[f"<|{'text' if is_text else 'at'} {thing.place}|>"]
            row, column = (said[list(NOTE_QUESTIONS).index(name)] for name in ("row", "column"))
            assert (row, column) == tuple(drawn.min(0))


def test_the_notes_are_equally_far_from_the_cells(stage) -> None:
    """For every prompt and size, so that cells can find them by distance."""
    for i, size in enumerate(SIZES):
        prompt = stage.samples.prompt(np.random.default_rng([5, i]), *size).prompt
        ids = [stage.samples.offsets.token_to_id(place) for place in NOTES]
        first = prompt.ids.tolist().index(ids[0])
        assert prompt.ids[first : first + len(ids)].tolist() == ids
        assert prompt.end - int(prompt.positions[1, first]) == 30


def test_codes_show_the_shapes_and_texts_of_their_scene() -> None:
    for i, (height, width) in enumerate(SIZES):
        scene = draw_scene(np.random.default_rng([4, i]), height, width, texts=1)
        shown = set(shown_by(torch.from_numpy(cells(scene))).flatten().tolist())
        colours = {NAMES.index(item.colour) for item in scene.items}
        assert shown == colours | {NOTHING, WRITING}


def test_a_state_that_says_the_rows_below_has_no_loss() -> None:
    """The heads only pass on what a state says of these rows."""
    scene = draw_scene(np.random.default_rng(6), 512, 512, texts=1)
    codes = torch.from_numpy(cells(scene))[None]
    shown = shown_by(codes)
    reading = Reading([torch.nn.Identity()] * LAYERS, HIDDEN)
    said = torch.zeros(*codes.shape, HIDDEN)
    for i, rows in enumerate(BELOW):
        one_hot = torch.nn.functional.one_hot(shown[:, rows:], WRITING + 1).float()
        said[:, :-rows, :, i * (WRITING + 1) : (i + 1) * (WRITING + 1)] = one_hot
    with torch.no_grad():
        reading.below.weight.copy_(100 * torch.eye(*reading.below.weight.shape))
        reading.below.bias.zero_()
        assert reading.rows_below(said.flatten(1, 2), codes) < 1e-6
        assert reading.rows_below(said.flip(1).flatten(1, 2), codes) > 0.1


def test_codes_show_the_background_unless_a_shape_or_text_fills_the_cell() -> None:
    for i, (height, width) in enumerate(SIZES):
        scene = draw_scene(np.random.default_rng([4, i]), height, width, texts=1)
        codes = torch.from_numpy(cells(scene))
        ground, shown = ground_of(codes), shown_by(codes)
        hidden = ((codes >= INSIDE) & (codes < EDGE)) | (shown == WRITING)
        assert ground[~hidden].unique().tolist() == [NAMES.index(scene.background)]
        assert ground[hidden].unique().tolist() in ([-1], [])


def test_shapes_to_come_are_all_at_first_and_none_at_the_end() -> None:
    red, blue = NAMES.index("red"), NAMES.index("blue")
    hearts = Item("heart", "red", "small", "top", ((3.0, 4.0), (3.0, 7.0), (3.0, 10.0)))
    star = Item("star", "blue", "medium", None, ((10.0, 8.0),))
    scene = Scene(512, 512, "white", (star, hearts), ())
    codes = torch.from_numpy(cells(scene))
    counts = shapes_to_come(scene, codes).unflatten(0, codes.shape)
    assert counts[0, 0, [red, blue]].tolist() == [3, 1]
    assert counts[7, 0, [red, blue]].tolist() == [0, 1]
    assert counts[-1, -1].sum() == counts[..., NAMES.index("green")].sum() == 0
    begins = int((shown_by(codes) == blue).flatten().nonzero()[0])
    assert counts[..., blue].flatten()[begins : begins + 2].tolist() == [1, 0]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_shape_is_counted_at_every_size(size) -> None:
    for i in range(20):
        scene = draw_scene(np.random.default_rng([9, i]), *size)
        codes = torch.from_numpy(cells(scene, scene.preview))
        counted = Counter()
        for item in scene.items:
            counted[item.colour] += len(item.centres)
        expected = sum(min(MOST_TO_COME, count) for count in counted.values())
        assert shapes_to_come(scene, codes)[0].sum() == expected


@pytest.mark.parametrize("large", [0, 40])
def test_cells_must_say_which_shapes_began_before_them(large) -> None:
    """Of a preview, with or without a large grid after it, and of the colours in it only."""
    ground, red, blue = NAMES.index("white"), NAMES.index("red"), NAMES.index("blue")
    codes = torch.tensor([[ground, INSIDE + red, ground, INSIDE + blue, ground, INSIDE + red]])
    begun = {red: [0, 0, 1, 1, 1, 1], blue: [0, 0, 0, 0, 1, 1]}
    layers = [torch.nn.Identity() for _ in range(LAYERS)]
    reading = Reading(layers, HIDDEN)
    torch.nn.init.eye_(reading.seen.weight).data.mul_(20)
    torch.nn.init.zeros_(reading.seen.bias)

    def loss(shift: int) -> float:
        states = torch.zeros(1, 5 + 6 + large, HIDDEN)
        for colour, seen in begun.items():
            states[0, 5:11, colour] = 2.0 * torch.tensor(seen).roll(shift) - 1
        layers[POSITION_LAYER](states)
        return float(reading.begun(codes, 6 + large))

    assert loss(0) < 1e-3 < loss(-1)


def test_cells_must_say_where_they_are_in_the_previews_cell() -> None:
    asked = torch.tensor([[[-1, -1], [0, 3], [7, 2]]])
    layers = [torch.nn.Identity() for _ in range(LAYERS)]
    reading = Reading(layers, HIDDEN)
    torch.nn.init.eye_(reading.within.weight).data.mul_(20)
    torch.nn.init.zeros_(reading.within.bias)

    def loss(shift: int) -> float:
        states = torch.zeros(1, 8, HIDDEN)
        states[0, [6, 6, 7, 7], [0, EIGHTHS + 3, 7, EIGHTHS + 2]] = 1
        layers[POSITION_LAYER](states.roll(shift, 1))
        return float(reading.phases(asked))

    assert loss(0) < 1e-3 < loss(1)


@pytest.mark.parametrize("size", SIZES)
def test_a_shape_is_inside_its_square_at_every_size(size) -> None:
    """The square's rows and columns are preview cells, counted from the shape's first."""
    scene = Scene(*size, "white", (), ())
    left = place_item(scene, "square", "red", "big", "left")
    scene = replace(scene, items=(left,))
    right = place_item(scene, "circle", "blue", "small", "right")
    scene = replace(scene, items=(left, right))
    for grid in (scene.preview, scene.grid):
        squares, shown = squares_at(scene, grid), torch.from_numpy(cells(scene, grid)) >= INSIDE
        assert (squares[shown] >= 0).all(1).float().mean() > 0.85  # soft edges may be outside
        assert torch.equal(squares[..., 0] < 0, squares[..., 1] < 0)
        columns = torch.arange(grid[1])
        for half, item in ((columns < grid[1] // 2, left), (columns >= grid[1] // 2, right)):
            for axis, (many, few) in enumerate(zip(grid, scene.preview, strict=True)):
                inside = (squares[..., axis] >= 0) & half
                first = int(inside.any(1 - axis).nonzero()[0, 0])
                steps = squares[..., axis].where(half, -1).amax(1 - axis)
                steps = steps[steps >= 0]
                assert steps.unique().tolist() == list(range(2 * int(item.radius)))
                assert (steps.diff() >= 0).all()
                top = item.centres[0][axis] - item.radius
                assert (first - 0.5) * few / many <= top <= (first + 0.5) * few / many


def test_cells_and_their_copies_must_say_where_they_are_in_a_shape() -> None:
    layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(LAYERS))
    reading = Reading(layers, HIDDEN)
    for head in (reading.square, reading.copied_square):
        torch.nn.init.zeros_(head.bias)
        head.weight.data = 20 * torch.eye(HIDDEN)[: 2 * WIDEST_SQUARE]
    copied = torch.tensor([[-1, 2, 3]])  # the last three of eight tokens
    asked = torch.tensor([[[-1, -1], [0, 4], [5, 1]]])

    def loss(preview: int = 0, large: int = 0) -> float:
        for layer, tokens, shift in (
            (POSITION_LAYER, (2, 3), preview),
            (COPY_LAYER, (6, 7), large),
        ):
            states = torch.zeros(1, 8, HIDDEN)
            for token, (row, column) in zip(tokens, asked[0, 1:].tolist(), strict=True):
                states[0, token, [row, WIDEST_SQUARE + column]] = 1
            layers[layer](states.roll(shift, 1))
        return float(reading.squares(copied, asked).detach())

    assert loss() < 1e-3 < min(loss(preview=1), loss(large=1))


def wishes(edit: Edit) -> dict:
    found = zip(WISH_QUESTIONS.items(), wish_answers(edit).tolist(), strict=True)
    return {name: options[i] for (name, options), i in found if i >= 0}


def test_a_wishs_answers_are_in_its_words() -> None:
    kinds = set()
    for i in range(60):
        edit = draw_edit(np.random.default_rng([6, i]), 512, 512)
        wished = wishes(edit)
        kinds.add(wished.pop("edit"))
        if edit.wish.isascii():
            assert all(word in edit.wish for word in wished.values())
        assert ("shape" in wished) == (edit.kind != "background")
        assert ("to" in wished) == (edit.kind != "remove")
    assert kinds == set(EDITS)


def test_a_wish_alone_ends_where_the_reference_starts(stage) -> None:
    """Its last token then sees what it would see in an edit."""
    for i, size in enumerate(SIZES):
        alone = stage.samples.wish(np.random.default_rng([6, i]), *size)
        edit = stage.samples.edit(np.random.default_rng([6, i]), *size, 0.0)
        count = len(alone.prompt)
        assert alone.prompt.ids[-1] == IMAGE_START
        assert (edit.prompt.ids[count:][: edit.grid[0] * edit.grid[1]] < CODEBOOK).all()
        assert torch.equal(alone.prompt.ids, edit.prompt.ids[:count])
        assert torch.equal(alone.prompt.positions, edit.prompt.positions[:, :count])
        assert torch.equal(alone.wished, edit.wished)


def test_changed_cells_have_the_token_after_the_wish_as_their_note(stage) -> None:
    rng = np.random.default_rng([6, 1])
    edit = draw_edit(np.random.default_rng([6, 1]), 512, 768)
    sample = stage.samples.edit(rng, 512, 768, 0.0)
    before, after = (
        torch.from_numpy(cells(scene)).flatten() for scene in (edit.before, edit.after)
    )
    assert torch.equal(sample.noted >= 0, before != after)
    assert (sample.prompt.ids[sample.noted[sample.noted >= 0]] == IMAGE_START).all()
    assert torch.equal(sample.prompt.ids[sample.copied], before)


def test_the_subjects_cells_are_marked(stage) -> None:
    for i in range(40):
        edit = draw_edit(np.random.default_rng([6, i]), 512, 512)
        sample = stage.samples.edit(np.random.default_rng([6, i]), 512, 512, 0.0)
        before, after = (torch.from_numpy(cells(s)).flatten() for s in (edit.before, edit.after))
        about = sample.subject == 1
        assert torch.equal(sample.subject >= 0, before >= INSIDE)
        if edit.kind in ("recolour", "remove"):
            assert torch.equal(about, before != after)
        elif edit.kind == "isolate":
            assert torch.equal(about, after >= INSIDE)
        elif edit.kind == "background":
            assert not about.any()


def test_every_cell_of_a_reference_must_repeat_the_wish() -> None:
    asked = wish_answers(draw_edit(np.random.default_rng([6, 1]), 512, 768))
    layers = [torch.nn.Identity() for _ in range(LAYERS)]
    reading = Reading(layers, HIDDEN)
    torch.nn.init.eye_(reading.told.weight).data.mul_(20)
    torch.nn.init.zeros_(reading.told.bias)
    answers = torch.tensor([0, *map(len, WISH_QUESTIONS.values())]).cumsum(0)[:-1] + asked
    cells_of_one = torch.arange(5, 9)[None]

    def loss(first: int) -> float:
        states = torch.zeros(1, 12, HIDDEN)
        states[0, first : first + 4, answers[asked >= 0, None]] = 1
        layers[REFERENCE_LAYER](states)
        return float(reading.reference_wishes(cells_of_one, asked[None]))

    assert loss(5) < 1e-3 < loss(6)


def test_cells_must_say_whether_the_wish_is_about_them() -> None:
    layers = [torch.nn.Identity() for _ in range(LAYERS)]
    reading = Reading(layers, HIDDEN)
    torch.nn.init.eye_(reading.subject.weight).data.mul_(20)
    torch.nn.init.zeros_(reading.subject.bias)
    asked = torch.tensor([[1, 0, -1, 0, 1, -1]])
    states = torch.nn.functional.one_hot(asked.clamp(min=0), HIDDEN).float()
    layers[SUBJECT_LAYER](torch.nn.functional.pad(states, (0, 0, 5, 0)))
    tokens = torch.arange(5, 11)[None]
    assert reading.subjects(tokens, asked) < 1e-3
    assert reading.subjects(tokens, torch.where(asked < 0, -1, 1 - asked)) > 1


def test_a_reference_must_say_what_it_becomes() -> None:
    """The head passes on what states say: the edited codes cost nothing, those before it much."""
    edit = draw_edit(np.random.default_rng([6, 1]), 512, 768)
    before, after = (
        torch.from_numpy(cells(scene)).flatten()[None] for scene in (edit.before, edit.after)
    )
    count, layers = before.shape[1], [torch.nn.Identity() for _ in range(LAYERS)]
    reading = Reading(layers, HIDDEN)
    torch.nn.init.eye_(reading.become.weight).data.mul_(20)
    torch.nn.init.zeros_(reading.become.bias)

    def loss(said: torch.Tensor) -> float:
        states = torch.zeros(1, 5 + count, HIDDEN)
        states[0, 5 + torch.arange(count), shown_by(said)[0]] = 1
        states[0, 5 + torch.arange(count), WRITING + 1 + ground_of(said)[0].clamp(min=0)] = 1
        layers[NOTE_LAYER](states)
        return float(reading.becomes(5 + torch.arange(count)[None], before, after))

    assert loss(after) < 1e-3 < loss(before)


def test_the_start_of_the_reference_must_say_the_wish() -> None:
    edit = draw_edit(np.random.default_rng([6, 1]), 512, 768)
    layers = [torch.nn.Identity() for _ in range(LAYERS)]
    reading = Reading(layers, HIDDEN)
    torch.nn.init.eye_(reading.wish.weight).data.mul_(20)
    torch.nn.init.zeros_(reading.wish.bias)
    asked = wish_answers(edit)
    sizes = torch.tensor([0, *map(len, WISH_QUESTIONS.values())]).cumsum(0)[:-1]
    states = torch.zeros(2, 9, HIDDEN)
    states[0, 3, (sizes + asked)[asked >= 0]] = 1
    states[1, 6, (sizes + asked)[asked >= 0]] = 1
    layers[PHRASE_LAYER](states)
    both = torch.stack([asked, asked])
    assert reading.wishes(torch.tensor([3, 6]), both) < 1e-3
    assert reading.wishes(torch.tensor([6, 3]), both) > 0.1


def test_every_state_must_say_the_position_of_the_cell_it_names(stage) -> None:
    """The right position costs nothing; one column beside costs much."""
    scene, sample = stage.samples.scene(np.random.default_rng([7, 0]), 512, 768)
    rows, columns = scene.preview
    positions = grid_positions(scene.preview, sample.prompt.end).unsqueeze(1)
    width = 2 * LONGEST_SIDE
    layers = [torch.nn.Identity() for _ in range(LAYERS)]
    reading = Reading(layers, width)
    torch.nn.init.eye_(reading.where.weight)
    reading.where.weight.data.mul_(20)

    def loss(step: int) -> float:
        row, column = positions[1, 0] - positions[0, 0], positions[2, 0] - positions[0, 0] + step
        states = torch.zeros(1, rows * columns, width)
        states[0, torch.arange(rows * columns), row] = 1
        states[0, torch.arange(rows * columns), LONGEST_SIDE + column] = 1
        layers[POSITION_LAYER](torch.cat([torch.zeros(1, 30, width), states], 1))
        return float(reading.cell_positions(positions))

    assert loss(0) < 1e-3 < loss(1)
