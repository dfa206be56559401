"""What was read against what should be there."""

import random
import time

import pytest
from glm_image.glm_core.glyph.reading import distances, match_texts, score


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2), ("你好", "你们好", 1)],
)
def test_the_distance_counts_edits(a, b, distance) -> None:
    assert list(distances(a, [b])) == list(distances(b, [a])) == [distance]


def edits(a: str, b: str) -> int:
    """By the definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


def test_distances_are_those_of_the_pieces_joined() -> None:
    texts = random.Random(0)
    for _ in range(30):
        a, *pieces = ("".join(texts.choices("ab", k=texts.randrange(4))) for _ in range(3))
        expected = [edits(a, pieces[0]), edits(a, "".join(pieces))]
        assert list(distances(a, pieces)) == expected


def of(wanted: list[str], read: list[str]) -> float:
    return score(match_texts(wanted, read))


def test_one_where_every_text_is_there_in_any_order() -> None:
    assert of(["OPEN", "今日"], ["今日", "noise", "OPEN"]) == 1
    assert of(["HELLO WORLD"], ["HELLO", "WORLD"]) == 1
    assert of(["ＡＢ１"], ["AB1"]) == 1


def test_each_wrong_character_counts_over_all_texts() -> None:
    assert of(["HELLO", "WORLD"], ["HELLO", "W0RLD"]) == pytest.approx(0.9)
    assert of(["HELLO", "WORLD"], ["WORLD"]) == pytest.approx(0.5)
    assert of(["hello"], ["HELLO"]) == 0


def test_nothing_read_and_nonsense_are_zero() -> None:
    assert of(["HELLO"], []) == 0
    assert of(["HI"], ["COMPLETELY DIFFERENT"]) == 0


def test_what_was_read_counts_once() -> None:
    assert of(["SALE", "SALE"], ["SALE"]) == pytest.approx(0.5)
    assert of(["SALE", "SALE"], ["SALE", "SALE"]) == 1


def test_the_best_match_is_taken_first() -> None:
    matches = match_texts(["CAT", "CAR"], ["CAR"])
    assert [(one.wanted, one.read, one.distance) for one in matches] == [
        ("CAT", "", 3),
        ("CAR", "CAR", 0),
    ]


def test_a_page_full_of_text_takes_no_long_time() -> None:
    texts = random.Random(0)
    wanted, read = (
        ["".join(texts.choices("abcdefghij", k=length)) for _ in range(count)]
        for count, length in ((12, 60), (100, 30))
    )
    read[40:42] = wanted[3][:30], wanted[3][30:]
    start = time.perf_counter()
    matches = match_texts(wanted, read)
    assert time.perf_counter() - start < 10  # minutes if each round compares all again
    assert matches[3].distance == 0
