"""The cases of `make eval` hold for pictures drawn as they should be, and for blank ones never."""

from argparse import ArgumentTypeError
from dataclasses import replace

import numpy as np
import pytest

from evaluation import run as evaluation
from training.render import render
from training.scene import HELD_OUT_WORDS, draw_content

SETTINGS = evaluation.Settings("tiny")
TALL = evaluation.Settings("tiny", width=512, height=768)
SETS = (evaluation.shape_cases, evaluation.latin_cases, evaluation.chinese_cases)
BLANK = np.full((512, 512, 3), 128, np.uint8)

each_size = pytest.mark.parametrize("settings", [SETTINGS, TALL], ids=["square", "tall"])


@each_size
@pytest.mark.parametrize("cases", SETS, ids=lambda cases: cases.__name__)
def test_a_picture_of_the_scene_passes_and_a_blank_one_does_not(cases, settings) -> None:
    for case in cases(settings, 3):
        (scene,) = case.check.args
        picture = render(scene)
        assert picture.shape == (settings.height, settings.width, 3)
        assert all(case.check([picture]).values())
        assert not any(case.check([np.full_like(picture, 128)]).values())


@each_size
def test_an_edit_passes_when_it_is_drawn_and_not_when_nothing_was_done(settings) -> None:
    for case in evaluation.edit_cases(settings, 3):
        (edit,) = case.check.args
        assert all(case.check([render(edit.after)]).values())
        undone = case.check([render(edit.before)])
        assert not undone["edit does what was wished"]


def test_blank_pictures_show_nothing_that_was_asked_for() -> None:
    for cases in evaluation.SETS.values():
        for case in cases(SETTINGS, 2):
            held = case.check([BLANK] * len(case.graphs))
            held.pop("... the rest unchanged", None)  # between two blank pictures it is
            assert not any(held.values())


def test_an_override_changes_the_texts_and_nothing_else() -> None:
    for case in evaluation.override_cases(SETTINGS, 3):
        first, second = case.graphs
        changed = [key for key in first if first[key] != second[key]]
        assert [first[key]["class_type"] for key in changed] == ["GLMImageGlyphEncode"]
        scene, word = case.check.args
        assert {scene.texts[0].content, word} <= set(HELD_OUT_WORDS)


def test_training_draws_no_word_that_is_asked_for() -> None:
    rng = np.random.default_rng(5)
    drawn = {draw_content(rng, "latin") for _ in range(20000)}
    assert not drawn & set(HELD_OUT_WORDS)
    asked = {case.check.args[0].texts[0].content for case in evaluation.latin_cases(SETTINGS, 20)}
    assert asked <= set(HELD_OUT_WORDS)


def test_a_layout_counts_as_kept_when_it_is() -> None:
    for case in evaluation.layout_cases(SETTINGS, 3):
        (scene,) = case.check.args
        moved = np.roll(render(scene), 70, axis=(0, 1))
        held = case.check([render(scene), render(scene), moved])
        assert held["locked layout, another seed: centres kept"]
        assert not held["no lock, another seed: centres kept"]


def test_an_override_counts_when_the_word_alone_is_another() -> None:
    for case in evaluation.override_cases(SETTINGS, 3):
        scene, word = case.check.args
        text = replace(scene.texts[0], content=word)
        other = render(replace(scene, texts=(text,)))
        assert all(case.check([render(scene), other]).values())
        assert not case.check([render(scene), render(scene)])["... the new word read"]


def test_graphs_ask_for_the_size_that_is_judged() -> None:
    for cases in (evaluation.shape_cases, evaluation.layout_cases):
        for case in cases(TALL, 1):
            for graph in case.graphs:
                inputs = evaluation.node(graph, "GLMImageSampleTokens")
                assert (inputs["width"], inputs["height"]) == (512, 768)


@pytest.mark.parametrize(
    ("given", "size"), [("768", (768, 768)), ("512x768", (512, 768)), ("1152x768", (1152, 768))]
)
def test_a_size_is_read(given, size) -> None:
    assert evaluation.read_size(given) == size


@pytest.mark.parametrize("given", ["640", "768x1024", "768x0", "large"])
def test_a_size_that_the_model_does_not_know_is_refused(given) -> None:
    with pytest.raises(ArgumentTypeError, match="768x512"):
        evaluation.read_size(given)
