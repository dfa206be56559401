"""The best of several by one score or more: each score list counts by its ranks."""

import math
from collections.abc import Sequence


def ranks(scores: Sequence[float]) -> list[float]:
    """From 0 (worst) up; equal scores share the mean of their ranks, NaN ranks lowest."""
    values = [-math.inf if math.isnan(score) else score for score in scores]
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


def best_first(score_lists: Sequence[Sequence[float]], weights: Sequence[float]) -> list[int]:
    """Indices by the weighted sum of ranks, best first; equal ones by their index.

    One whose scores are all NaN comes last, whatever the weights.
    """
    ranked = [ranks(scores) for scores in score_lists]

    def key(i: int) -> tuple[bool, float]:
        known = any(not math.isnan(scores[i]) for scores in score_lists)
        return not known, -sum(weight * own[i] for weight, own in zip(weights, ranked, strict=True))

    return sorted(range(len(score_lists[0])), key=key)
