"""The judge of trained models finds in a drawn picture what was drawn, and nothing else."""

from dataclasses import replace
from itertools import permutations

import cv2
import numpy as np
import pytest

from evaluation.judge import (
    background_of,
    changed_outside,
    furthest_move,
    matches_kinds,
    matches_scene,
    read_text,
    shapes_of,
    shows_item,
    text_box,
)
from training.render import render
from training.scene import COLOURS, SHAPES, Item, Scene, Text, draw_content, draw_scene, place_item

MIRRORED = {
    "left": "right", "right": "left", "top": "bottom", "bottom": "top", "top left": "bottom right",
    "top right": "bottom left", "bottom left": "top right", "bottom right": "top left",
}  # fmt: skip


def _scenes() -> list[Scene]:
    sizes = [(512, 512)] * 20 + [(512, 768)] * 2 + [(768, 512)] * 2
    drawn = (draw_scene(np.random.default_rng([41, i]), *size) for i, size in enumerate(sizes))
    return [scene for scene in drawn if scene.items]


SCENES = _scenes()


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [render(scene) for scene in SCENES]


def _with_first(scene: Scene, **what) -> Scene:
    return replace(scene, items=(replace(scene.items[0], **what), *scene.items[1:]))


def test_a_drawn_scene_matches(pictures) -> None:
    assert len(SCENES) >= 20
    for scene, picture in zip(SCENES, pictures, strict=True):
        assert background_of(picture) == scene.background
        assert matches_scene(picture, scene), scene
        assert matches_kinds(picture, scene), scene
        assert all(shows_item(shapes_of(picture, scene), scene, item) for item in scene.items)


def test_a_noisy_scene_matches(pictures) -> None:
    noise = np.random.default_rng(0).normal(0, 12, (768, 768, 3))
    for scene, picture in zip(SCENES, pictures, strict=True):
        noisy = picture + noise[: scene.height, : scene.width]
        assert matches_kinds(np.clip(noisy, 0, 255).astype(np.uint8), scene), scene


@pytest.mark.parametrize("shape", SHAPES)
def test_small_shapes_with_soft_edges_match_their_kind(shape) -> None:
    for colour, background in permutations(COLOURS, 2):
        empty = Scene(512, 512, background, (), ())
        scene = replace(empty, items=(place_item(empty, shape, colour, "small", "left"),))
        assert matches_kinds(cv2.GaussianBlur(render(scene), (0, 0), 2), scene), scene


def test_another_colour_place_background_kind_or_number_does_not_match(pictures) -> None:
    mirrored = 0
    for scene, picture in zip(SCENES, pictures, strict=True):
        taken = {scene.background, *(item.colour for item in scene.items)}
        free = [colour for colour in COLOURS if colour not in taken]
        assert not matches_scene(picture, _with_first(scene, colour=free[0]))
        assert not matches_scene(picture, replace(scene, background=free[0]))
        assert not matches_scene(picture, replace(scene, items=scene.items[1:]))
        assert not matches_scene(picture, replace(scene, items=scene.items[:1] * 4))
        if (side := MIRRORED.get(scene.items[0].place)) and len(
            {item.colour for item in scene.items}
        ) == len(scene.items):
            mirrored += 1
            assert not matches_scene(picture, _with_first(scene, place=side))
        shown = {item.shape for item in scene.items}
        other = next(shape for shape in SHAPES if shape not in shown)
        assert matches_scene(picture, _with_first(scene, shape=other))
        assert not matches_kinds(picture, _with_first(scene, shape=other))
    assert mirrored >= 8


def test_a_move_is_measured_and_is_infinite_for_a_lost_shape() -> None:
    def shapes(row: float, colour: str = "red") -> list:
        scene = Scene(512, 512, "white", (Item("star", colour, "small", None, ((row, 8.0),)),), ())
        return shapes_of(render(scene), scene)

    assert furthest_move(shapes(5), shapes(5)) == 0
    assert furthest_move(shapes(5), shapes(7)) == 64
    assert furthest_move(shapes(5), shapes(5, "blue")) == np.inf
    assert furthest_move(shapes(5), shapes(5, "white")) == np.inf


@pytest.mark.parametrize(("script", "length", "least"), [("latin", None, 19), ("chinese", 2, 17)])
def test_drawn_texts_can_be_read(script: str, length: int | None, least: int) -> None:
    read = 0
    for i in range(20):
        rng = np.random.default_rng([42, i])
        text = Text(draw_content(rng, script, length), ("top", "bottom", "centre")[i % 3])
        scene = Scene(512, 512, str(rng.choice(list(COLOURS))), (), (text,))
        read += read_text(render(scene), text_box(scene, text)) == text.content
    assert read >= least


def test_an_empty_box_has_no_text() -> None:
    assert read_text(np.full((512, 512, 3), 90, np.uint8), (32, 64, 64, 320)) == ""


def test_only_visible_change_outside_the_box_counts() -> None:
    before = np.full((100, 200, 3), 90, np.uint8)
    after = before.copy()
    after[10:30, 20:80] = 255
    assert changed_outside(before, after, (10, 20, 20, 60)) == 0
    after[50:60, 0:94, 1] = 115
    after[70:80, :] = 114
    assert changed_outside(before, after, (10, 20, 20, 60)) == pytest.approx(940 / 18800)
