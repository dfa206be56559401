"""How well texts that were read in a picture match those that it should show.

The character error rate (CER) is the Levenshtein distance over the length of the wanted texts.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

MAX_SPAN = 8
"""Texts that a reader may have cut one wanted text into."""


@dataclass(frozen=True)
class Match:
    """A wanted text, what was read for it (empty: nothing), and their distance in characters."""

    wanted: str
    read: str
    distance: int


def plain(text: str) -> str:
    """A text without spaces, its letters in one form (NFKC), as texts are compared."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def match_texts(wanted: Sequence[str], read: Sequence[str]) -> list[Match]:
    """What was read for each wanted text, whatever the order of either.

    A wanted text may be found in several texts that follow each other, as a reader cuts lines. The
    best match is taken first; what was read counts for one wanted text.

    Args:
        read: in reading order.
    """
    remaining = {i: plain(text) for i, text in enumerate(wanted)}
    pieces = [plain(text) for text in read]
    free = [True] * len(pieces)
    found: dict[int, Match] = {}
    while remaining:
        best = _best(remaining, pieces, free)
        if best is None:
            break
        i, span, distance = best
        found[i] = Match(wanted[i], "".join(pieces[span.start : span.stop]), distance)
        del remaining[i]
        free[span.start : span.stop] = [False] * len(span)
    missing = {i: Match(wanted[i], "", len(text)) for i, text in remaining.items()}
    return [(found | missing)[i] for i in range(len(wanted))]


def score(matches: Sequence[Match]) -> float:
    """1 - CER over all wanted texts, from 0 to 1."""
    length = sum(len(plain(match.wanted)) for match in matches)
    return max(0.0, 1 - sum(match.distance for match in matches) / length)


def _best(
    wanted: dict[int, str], pieces: list[str], free: list[bool]
) -> tuple[int, range, int] | None:
    """The wanted text and the free span of pieces with the lowest CER below 1, and the distance."""
    best, lowest = None, 1.0
    for start in range(len(pieces)):
        for stop in range(start + 1, min(start + MAX_SPAN, len(pieces)) + 1):
            if not free[stop - 1]:
                break
            text = "".join(pieces[start:stop])
            for i, own in wanted.items():
                distance = levenshtein(own, text)
                if distance < lowest * len(own):
                    best, lowest = (i, range(start, stop), distance), distance / len(own)
    return best


def levenshtein(a: str, b: str) -> int:
    """The least number of characters to insert, delete or replace to make `b` of `a`."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        above, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]
