"""The pictures that training draws, their prompts and their codes agree."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from glm_core.glyph.texts import texts_to_render
from training.codes import (
    CODEBOOK,
    EDGE,
    INSIDE,
    NAMES,
    PAIRS,
    PATTERNS,
    SLOTS,
    TEXT,
    USED,
    cells,
    patterns,
    slots_of,
    vectors,
)
from training.edits import draw_edit
from training.render import render
from training.scene import COLOURS, SIZES, Scene, draw_scene, place_item
from training.wording import ZH_COLOURS, ZH_SHAPES, prompt_of


def scenes(count: int = 30) -> list[tuple[np.random.Generator, Scene]]:
    drawn = []
    for i in range(count):
        rng = np.random.default_rng([1, i])
        drawn.append((rng, draw_scene(rng, *SIZES[i % len(SIZES)])))
    return drawn


def test_a_seed_draws_the_same_scene() -> None:
    assert [s for _, s in scenes(5)] == [s for _, s in scenes(5)]
    assert len({s for _, s in scenes(20)}) == 20


def test_a_window_is_a_part_of_the_picture() -> None:
    for _, scene in scenes(6):
        part = render(scene, (64, 96, 128, 192))
        assert np.array_equal(part, render(scene)[64:192, 96:288])


@pytest.mark.parametrize(("share", "least", "most"), [(1.0, 40, 40), (0.0, 0, 9)])
def test_a_share_of_scenes_has_open_places(share, least, most) -> None:
    rng = np.random.default_rng(2)
    drawn = [draw_scene(rng, 512, 512, all_anywhere=share) for _ in range(40)]
    single = [[item for item in scene.items if len(item.centres) == 1] for scene in drawn]
    assert least <= sum(not any(item.place for item in items) for items in single) <= most


def test_a_prompt_names_every_shape_background_and_text() -> None:
    for rng, scene in scenes(60):
        prompt = prompt_of(rng, scene)
        chinese = any(name in prompt for name in ZH_COLOURS.values())
        words = prompt.lower()
        for item in scene.items:
            assert (ZH_COLOURS[item.colour] if chinese else item.colour) in words
            assert (ZH_SHAPES[item.shape] if chinese else item.shape) in words
        assert (ZH_COLOURS[scene.background] if chinese else scene.background) in words
        assert sorted(filter(None, texts_to_render(prompt))) == sorted(
            t.content for t in scene.texts
        )


@pytest.mark.parametrize("preview", [False, True])
def test_a_code_has_the_colour_of_its_cell(preview) -> None:
    for _, scene in scenes():
        grid = scene.preview if preview else scene.grid
        codes, picture = cells(scene, grid), render(scene).astype(float)
        for row in range(grid[0]):
            for column in range(grid[1]):
                code = codes[row, column]
                top, bottom = (row * scene.height // grid[0], (row + 1) * scene.height // grid[0])
                left, right = (
                    column * scene.width // grid[1],
                    (column + 1) * scene.width // grid[1],
                )
                colour = picture[top:bottom, left:right].mean((0, 1))
                if code < EDGE:
                    name = NAMES[code % INSIDE]
                    if not _near_text(codes, row, column):
                        assert np.abs(colour - COLOURS[name]).max() < 12
                elif code >= TEXT:
                    assert scene.texts


def _near_text(codes: np.ndarray, row: int, column: int) -> bool:
    """Whether a character is near: a preview's cell may show a sliver of its neighbour's."""
    return (codes[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] >= TEXT).any()


def test_an_edges_code_has_the_pattern_nearest_to_its_pixels() -> None:
    right, count = 0, 0
    for _, scene in scenes():
        scene = replace(scene, texts=())
        codes, picture = cells(scene), render(scene).astype(float)
        ground = np.array(COLOURS[scene.background], float)
        for row, column in np.argwhere((codes >= EDGE) & (codes < TEXT)):
            pair, pattern = divmod(codes[row, column] - EDGE, PATTERNS)
            colour, background = list(PAIRS)[pair]
            assert background == scene.background
            step = np.array(COLOURS[colour], float) - ground
            cell = picture[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] - ground
            parts = (cell @ step / (step @ step)).reshape(4, 8, 4, 8).mean((1, 3)).flatten()
            distances = ((patterns() - parts) ** 2).sum(1)
            right += distances[pattern] <= distances.min() + 0.02
            count += 1
    assert right >= 0.99 * count > 500


def test_a_texts_codes_name_their_script_and_index() -> None:
    for _, scene in scenes():
        codes = torch.from_numpy(cells(scene))
        for text in scene.texts:
            row, column = scene.text_origin(text)
            for i in range(len(text.content)):
                first = column + 2 * i
                slots = slots_of(codes[row : row + 2, first : first + 2])
                assert (slots == SLOTS.index((text.script, i))).all()


def test_codes_have_edges_and_texts_as_the_scene_has_shapes_and_texts() -> None:
    for _, scene in scenes():
        codes = cells(scene)
        assert ((codes >= EDGE) & (codes < TEXT)).any() == bool(scene.items)
        letters = sum(len(text.content) for text in scene.texts)
        assert (codes >= TEXT).sum() == 4 * letters


def test_drawn_codes_have_different_vectors() -> None:
    assert USED <= CODEBOOK
    drawn = np.unique(np.concatenate([cells(scene).ravel() for _, scene in scenes(60)]))
    assert len(drawn) > 200
    table = vectors()[drawn]
    likeness = table @ table.T - 2 * np.eye(len(drawn))
    assert likeness.max() < 1 - 1e-5


def test_an_edit_makes_only_the_change_of_its_kind() -> None:
    kinds = set()
    for i in range(60):
        edit = draw_edit(np.random.default_rng([2, i]), 512, 512)
        kinds.add(edit.kind)
        before, after = edit.before, edit.after
        unchanged = set(before.items) & set(after.items)
        if edit.kind == "background":
            assert after.items == before.items
            assert edit.after.background in edit.wish or ZH_COLOURS[after.background] in edit.wish
        elif edit.kind == "isolate":
            assert len(after.items) == 1
            assert after.background != before.background
        else:
            assert after.background == before.background
            assert len(unchanged) == len(before.items) - 1
    assert kinds == {"recolour", "background", "replace", "remove", "isolate"}


def test_shapes_are_placed_where_asked() -> None:
    scene = Scene(512, 512, "yellow", (), ())
    for place, column in (("left", 3), ("centre", 8), ("right", 13)):
        item = place_item(scene, "circle", "red", "medium", place)
        assert item.centres == ((8, column),)
        scene = replace(scene, items=(*scene.items, item))
    crowded = place_item(scene, "star", "blue", "medium", "left")
    assert crowded is None


def test_a_shape_moves_aside_for_a_big_one() -> None:
    scene = Scene(512, 512, "yellow", (), ())
    left = place_item(scene, "circle", "red", "big", "left")
    centre = place_item(replace(scene, items=(left,)), "star", "blue", "big", "centre")
    (row, column), (_, taken) = centre.centres[0], left.centres[0]
    assert column - taken >= 7
    assert abs(row - 8) <= 2
