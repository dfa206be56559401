"""The cases of `make eval` pass for correctly drawn pictures, and never for blank ones."""

from argparse import ArgumentTypeError
from dataclasses import replace

import numpy as np
import pytest

from evaluation import best_of
from evaluation import cases as evaluation
from evaluation.run import read_size
from training.render import render
from training.scene import HELD_OUT_WORDS, draw_content

SETTINGS = evaluation.Settings("tiny")
TALL = evaluation.Settings("tiny", width=512, height=768)
SETS = (evaluation.shape_cases, evaluation.latin_cases, evaluation.chinese_cases)
BLANK = np.full((512, 512, 3), 128, np.uint8)

each_size = pytest.mark.parametrize("settings", [SETTINGS, TALL], ids=["square", "tall"])


@each_size
@pytest.mark.parametrize("cases", SETS, ids=lambda cases: cases.__name__)
def test_a_picture_of_the_scene_passes_and_a_blank_one_fails(cases, settings) -> None:
    for case in cases(settings, 3):
        (scene,) = case.check.args
        picture = render(scene)
        assert picture.shape == (settings.height, settings.width, 3)
        assert all(case.check([picture]).values())
        assert not any(case.check([np.full_like(picture, 128)]).values())


@each_size
def test_the_edited_scene_passes_and_the_unedited_one_fails(settings) -> None:
    for case in evaluation.edit_cases(settings, 3):
        (edit,) = case.check.args
        assert all(case.check([render(edit.after)]).values())
        unedited = case.check([render(edit.before)])
        assert not unedited["edit does what was wished"]


def test_blank_pictures_fail_every_case() -> None:
    for cases in evaluation.SETS.values():
        for case in cases(SETTINGS, 2):
            held = case.check([BLANK] * len(case.graphs))
            held.pop("... the rest unchanged", None)  # two blank pictures are equal
            assert not any(held.values())


def test_an_override_changes_the_glyph_encoders_texts_only() -> None:
    for case in evaluation.override_cases(SETTINGS, 3):
        first, second = case.graphs
        changed = [key for key in first if first[key] != second[key]]
        assert [first[key]["class_type"] for key in changed] == ["GLMImageGlyphEncode"]
        scene, word = case.check.args
        assert {scene.texts[0].content, word} <= set(HELD_OUT_WORDS)


def test_training_draws_no_word_of_the_evaluation() -> None:
    rng = np.random.default_rng(5)
    drawn = {draw_content(rng, "latin") for _ in range(20000)}
    assert not drawn & set(HELD_OUT_WORDS)
    asked = {case.check.args[0].texts[0].content for case in evaluation.latin_cases(SETTINGS, 20)}
    assert asked <= set(HELD_OUT_WORDS)


def test_an_equal_layout_passes_and_a_moved_one_fails() -> None:
    for case in evaluation.layout_cases(SETTINGS, 3):
        (scene,) = case.check.args
        moved = np.roll(render(scene), 70, axis=(0, 1))
        held = case.check([render(scene), render(scene), moved])
        assert held["locked layout, another seed: centres kept"]
        assert not held["no lock, another seed: centres kept"]


def test_an_override_passes_if_only_the_word_changed() -> None:
    for case in evaluation.override_cases(SETTINGS, 3):
        scene, word = case.check.args
        text = replace(scene.texts[0], content=word)
        other = render(replace(scene, texts=(text,)))
        assert all(case.check([render(scene), other]).values())
        assert not case.check([render(scene), render(scene)])["... the new word read"]


def value(graph, class_type, name):
    """Of an input of the one node of a type, followed to the primitive that it is linked to."""
    found = evaluation.node(graph, class_type)[name]
    return graph[found[0]]["inputs"]["value"] if isinstance(found, list) else found


def test_graphs_have_the_settings_size() -> None:
    for cases in (evaluation.shape_cases, evaluation.layout_cases):
        for case in cases(TALL, 1):
            for graph in case.graphs:
                sides = [value(graph, "GLMImageSampleTokens", side) for side in ("width", "height")]
                assert sides == [512, 768]


@pytest.mark.parametrize("cases", SETS, ids=lambda cases: cases.__name__)
def test_another_workflow_paints_the_same_prompts_and_seeds(cases) -> None:
    other = replace(TALL, workflow="best_of_eight_layouts")
    for usual, chosen in zip(cases(TALL, 2), cases(other, 2), strict=True):
        (first,), (second,) = usual.graphs, chosen.graphs
        for name in ("prompt", "seed", "width", "height"):
            wanted = value(first, "GLMImageSampleTokens", name)
            assert value(second, "GLMImageSampleLayout", name) == wanted
        assert value(second, "GLMImageSampleLayout", "batch_size") == 8
        assert value(second, "GLMImageDecode", "steps") == TALL.steps


@pytest.mark.parametrize(
    ("given", "size"), [("768", (768, 768)), ("512x768", (512, 768)), ("1152x768", (1152, 768))]
)
def test_sizes_are_parsed(given, size) -> None:
    assert read_size(given) == size


@pytest.mark.parametrize("given", ["640", "768x1024", "768x0", "large"])
def test_an_unknown_size_is_refused(given) -> None:
    with pytest.raises(ArgumentTypeError, match="768x512"):
        read_size(given)


def test_the_best_is_the_first_of_equal_ones() -> None:
    assert best_of.chosen([0.1, 0.7, 0.7, -1.0]) == 1


def test_right_above_wrong_counts_pairs_of_one_case() -> None:
    assert best_of.right_above_wrong([([3, 2, 1], [True, False, False])]) == 1
    assert best_of.right_above_wrong([([3, 2, 1], [False, True, True])]) == 0
    assert best_of.right_above_wrong([([3, 2, 2], [False, True, False])]) == 0.25
    assert best_of.right_above_wrong([([3, 2], [True, True])]) is None


def test_the_table_compares_single_chosen_and_oracle() -> None:
    measure = "colours and places of shapes match"

    def found(held, scores):
        other = [-score for score in scores]
        return best_of.Candidates(
            [{measure: one} for one in held],
            {"prompt match": other, "likelihood": scores, "layout's likelihood": other},
            {"likelihood": 1.0, "picture": 4.0},
        )

    rows = best_of.table(
        [
            found([False, True], [1.0, 2.0]),
            found([True, True], [2.0, 1.0]),
            found([False, False], [2.0, 1.0]),
            found([False, True], [1.0, 2.0]),
        ]
    )
    given = f"| {measure} | 4 | 25% | 50% | 75%"
    assert f"{given} | likelihood | 75% | 1.00 |" in rows
    assert f"{given} | prompt match | 25% | 0.00 |" in rows
    assert "likelihood: 1.00 s to score a batch" in rows
