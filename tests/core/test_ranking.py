"""The best by ranks: what NaN, ties and weights do."""

import math

from glm_image.glm_core.data.ranking import best_first, ranks


def test_ranks_share_ties_and_put_nan_last() -> None:
    assert ranks([0.5, 2.0, 0.5, math.nan, -math.inf]) == [2.5, 4.0, 2.5, 0.5, 0.5]


def test_bigger_is_better_and_ties_go_to_the_lower_index() -> None:
    assert best_first([[1.0, 3.0, 1.0, 3.0]], [1.0]) == [1, 3, 0, 2]


def test_nan_is_last_under_any_weight() -> None:
    assert best_first([[math.nan, -5.0, 2.0]], [1.0]) == [2, 1, 0]
    assert best_first([[math.nan, -5.0, 2.0]], [0.0]) == [1, 2, 0]


def test_scores_of_any_scale_count_by_their_weight() -> None:
    small, large = [0.1, 0.2, 0.3], [900.0, 800.0, 100.0]
    assert best_first([small, large], [1.0, 1.0]) == [0, 1, 2]
    assert best_first([small, large], [2.0, 1.0]) == [2, 1, 0]
    assert best_first([small, large], [1.0, 2.0]) == [0, 1, 2]
