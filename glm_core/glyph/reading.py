"""How well texts that were read in a picture match those that it should show.

The character error rate (CER) is the Levenshtein distance over the length of the wanted texts.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

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
    texts = [plain(text) for text in wanted]
    pieces = [plain(text) for text in read]
    free = [True] * len(pieces)
    found = {i: Match(wanted[i], "", len(text)) for i, text in enumerate(texts)}
    missing = set(found)
    for _, start, stop, i, distance in sorted(_candidates(texts, pieces)):
        if i in missing and all(free[start:stop]):
            found[i] = Match(wanted[i], "".join(pieces[start:stop]), distance)
            missing.remove(i)
            free[start:stop] = [False] * (stop - start)
    return list(found.values())


def score(matches: Sequence[Match]) -> float:
    """1 - CER over all wanted texts, from 0 to 1."""
    length = sum(len(plain(match.wanted)) for match in matches)
    return max(0.0, 1 - sum(match.distance for match in matches) / length)


def _candidates(texts: list[str], pieces: list[str]) -> Iterator[tuple[float, int, int, int, int]]:
    """Each span of pieces and text with a CER below 1: CER, start, stop, text, distance."""
    for i, text in enumerate(texts):
        for start in range(len(pieces)):
            span = pieces[start : start + MAX_SPAN]
            # A distance is at least the difference of lengths.
            near = sum(length < 2 * len(text) for length in accumulate(map(len, span)))
            for stop, distance in enumerate(distances(text, span[:near]), start + 1):
                if distance < len(text):
                    yield distance / len(text), start, stop, i, distance


def distances(text: str, pieces: Iterable[str]) -> Iterator[int]:
    """Levenshtein distances of a text from the first piece, from the first two joined, and so on.

    The table of distances has a row for each beginning of the text and a column for each of the
    pieces. A column is numbers whose bit i says of row i + 1 whether it is one more or one less
    than row i (Hyyrö, "A bit-vector algorithm for computing Levenshtein and Damerau edit
    distances", 2003).
    """
    length, rows = len(text), (1 << len(text)) - 1
    places: dict[str, int] = {}
    for i, character in enumerate(text):
        places[character] = places.get(character, 0) | 1 << i
    more, less, distance = rows, 0, length
    for piece in pieces:
        for character in piece:
            equal = places.get(character, 0)
            diagonal = (((equal & more) + more) ^ more) | equal
            # Rows that are one more, or one less, than in the column before; bit 0 is row 0.
            grown = (less | rows & ~(diagonal | more)) << 1 | 1
            shrunk = (more & diagonal) << 1
            distance += (grown >> length & 1) - (shrunk >> length & 1)
            same = equal | less
            more = (shrunk | ~(same | grown)) & rows
            less = grown & same & rows
        yield distance
