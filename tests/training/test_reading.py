"""What the AR model is asked besides is what the prompt says and what the picture shows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glm_core.grids import grid_positions
from training.autoregressive import HIDDEN, AutoregressiveStage, collate, collate_phrases
from training.codes import INSIDE, NAMES, cells
from training.edits import draw_edit
from training.reading import (
    ABOUT,
    ASKED,
    BELOW,
    LONGEST_SIDE,
    NONE_AT_ALL,
    NOTHING,
    WHERE_LAYER,
    WRITING,
    Reading,
    asked_by,
    layout_of,
    shown_by,
)
from training.scene import SIZES, Item, Scene, Text, draw_scene
from training.stage import Run
from training.tokenizer import PLACES
from training.wording import phrased


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> AutoregressiveStage:
    folder: Path = tmp_path_factory.mktemp("reading")
    return AutoregressiveStage(Run(folder, batch=4))


def test_a_phrase_ends_where_it_has_been_said() -> None:
    for i in range(60):
        rng = np.random.default_rng([2, i])
        scene = draw_scene(rng, 512, 512)
        prompt, phrases = phrased(rng, scene)
        assert [thing for thing, _ in phrases] == [*scene.items, None, *scene.texts]
        for thing, end in phrases:
            if isinstance(thing, Text):
                assert thing.content in prompt[:end]
            assert end == len(prompt) or not prompt[end].isascii() or not prompt[end].isalnum()


def test_a_phrase_ends_with_a_token_of_the_batch(stage) -> None:
    batch = [stage._prompt(np.random.default_rng([3, i]), 512, 512) for i in range(12)]
    ids = collate(batch)[0]
    ends, asked = collate_phrases(batch)
    assert asked.shape == (len(ends), len(ASKED))
    scenes = [draw_scene(np.random.default_rng([3, i]), 512, 512) for i in range(12)]
    things = [(i, thing) for i, s in enumerate(scenes) for thing in (*s.items, None, *s.texts)]
    for (sample, token), (i, thing), wanted in zip(ends.tolist(), things, asked, strict=True):
        assert sample == i
        assert torch.equal(wanted, asked_by(thing, scenes[i]))
        said = stage.offsets.decode(ids[sample, : token + 1].tolist())
        before = stage.offsets.decode(ids[sample, :token].tolist())
        if isinstance(thing, Text):
            assert thing.content in said
        assert said != before


def test_answers_are_those_of_the_scene() -> None:
    heart = Item("heart", "red", "big", "top left", ((4.0, 4.0),))
    scene = Scene(512, 512, "blue", (heart,), (Text("春天", "bottom"),))
    names = list(ASKED)

    def answers(thing: Item | Text | None) -> dict:
        found = asked_by(thing, scene).tolist()
        return {n: ASKED[n][i] for n, i in zip(names, found, strict=True) if i >= 0}

    assert answers(None) == {"kind": None, "colour": "blue"}
    assert answers(scene.texts[0]) == {
        "kind": Text, "place": "bottom", "script": "chinese", "length": 2,
    }  # fmt: skip
    assert answers(heart) == {
        "kind": Item, "place": "top left", "colour": "red", "shape": "heart", "size": "big",
        "count": 1,
    }  # fmt: skip


def test_every_place_says_what_is_there() -> None:
    heart = Item("heart", "red", "big", "top left", ((4.0, 4.0),))
    star = replace(heart, shape="star", place=None, centres=((9.0, 9.0),))
    scene = Scene(512, 512, "blue", (heart,), (Text("春天", "bottom"),))

    def said(place: str, scene: Scene) -> dict:
        found = zip(ABOUT.items(), layout_of(scene)[PLACES.index(place)].tolist(), strict=True)
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


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_place_says_where_its_thing_begins_in_the_preview(size) -> None:
    for i in range(30):
        scene = draw_scene(np.random.default_rng([7, i]), *size)
        places = dict(zip(PLACES, layout_of(scene).tolist(), strict=True))
        for thing in (*scene.items, *scene.texts):
            if thing.place is None:
                continue
            is_text = isinstance(thing, Text)
            alone = replace(scene, items=() if is_text else (thing,), texts=(thing,) * is_text)
            drawn = np.argwhere(cells(alone, scene.preview) >= INSIDE)
            said = places[f"<|{'text' if is_text else 'at'} {thing.place}|>"]
            row, column = (said[list(ABOUT).index(name)] for name in ("row", "column"))
            assert (row, column) == tuple(drawn.min(0))


def test_the_places_lie_equally_far_from_the_cells(stage) -> None:
    """Whatever is asked for, at whatever size; so they can be found by distance."""
    for i, size in enumerate(SIZES):
        prompt = stage._prompt(np.random.default_rng([5, i]), *size).prompt
        ids = [stage.offsets.token_to_id(place) for place in PLACES]
        first = prompt.ids.tolist().index(ids[0])
        assert prompt.ids[first : first + len(ids)].tolist() == ids
        assert prompt.end - int(prompt.positions[1, first]) == 27


def test_cells_show_the_shapes_and_texts_of_their_scene() -> None:
    for i, (height, width) in enumerate(SIZES):
        scene = draw_scene(np.random.default_rng([4, i]), height, width, texts=1)
        shown = set(shown_by(torch.from_numpy(cells(scene))).flatten().tolist())
        colours = {NAMES.index(item.colour) for item in scene.items}
        assert shown == colours | {NOTHING, WRITING}


def test_the_rows_asked_for_are_those_below() -> None:
    """Heads that only hand on what a state says of these rows make no error."""
    scene = draw_scene(np.random.default_rng(6), 512, 512, texts=1)
    codes = torch.from_numpy(cells(scene))[None]
    shown = shown_by(codes)
    reading = Reading([torch.nn.Identity()] * (WHERE_LAYER + 1), HIDDEN)
    said = torch.zeros(*codes.shape, HIDDEN)
    for i, rows in enumerate(BELOW):
        one_hot = torch.nn.functional.one_hot(shown[:, rows:], WRITING + 1).float()
        said[:, :-rows, :, i * (WRITING + 1) : (i + 1) * (WRITING + 1)] = one_hot
    with torch.no_grad():
        reading.below.weight.copy_(100 * torch.eye(*reading.below.weight.shape))
        reading.below.bias.zero_()
        assert reading.rows_below(said.flatten(1, 2), codes) < 1e-6
        assert reading.rows_below(said.flip(1).flatten(1, 2), codes) > 0.1


def test_edits_must_say_what_the_picture_will_show(stage) -> None:
    rng = np.random.default_rng([6, 1])
    edit = draw_edit(np.random.default_rng([6, 1]), 512, 768)
    sample = stage._edit(rng, 512, 768, 0.0)
    assert sample.grid == edit.after.grid
    assert torch.equal(sample.layout, layout_of(edit.after))
    assert not torch.equal(sample.layout, layout_of(edit.before))


def test_every_state_must_say_where_the_cell_lies_that_it_is_to_name(stage) -> None:
    """A head that says so loses nothing; one that is a column beside loses much."""
    scene, sample = stage._scene(np.random.default_rng([7, 0]), 512, 768)
    rows, columns = scene.preview
    positions = grid_positions(scene.preview, sample.prompt.end).unsqueeze(1)
    width = 2 * LONGEST_SIDE
    layers = [torch.nn.Identity() for _ in range(WHERE_LAYER + 1)]
    reading = Reading(layers, width)
    torch.nn.init.eye_(reading.where.weight)
    reading.where.weight.data.mul_(20)

    def loss(step: int) -> float:
        row, column = positions[1, 0] - positions[0, 0], positions[2, 0] - positions[0, 0] + step
        states = torch.zeros(1, rows * columns, width)
        states[0, torch.arange(rows * columns), row] = 1
        states[0, torch.arange(rows * columns), LONGEST_SIDE + column] = 1
        layers[WHERE_LAYER](torch.cat([torch.zeros(1, 30, width), states], 1))
        return float(reading.whereabouts(positions))

    assert loss(0) < 1e-3 < loss(1)
