"""The only exception that the pack raises on purpose, and how its sentences show values."""

from collections.abc import Iterable

LONGEST = 200
"""Characters of a value in a sentence."""


class GLMImageError(ValueError):
    """A sentence for the person at the graph: what was wrong, the value, what to do."""

    __module__ = "glm_image"  # shown by hosts, which import the pack under its file path


def shown(value: object) -> str:
    """A value as a sentence shows it: on one line, its end cut, half surrogate pairs as `?`."""
    text = " ".join(str(value).split())
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def quoted(value: object) -> str:
    """A value as Python writes it, cut like `shown`."""
    return shown(repr(value))


def first_few(items: Iterable[str], count: int = 3) -> str:
    """The first `count` items, each as `shown`, with dots if there are more."""
    items = list(items)
    return ", ".join(map(shown, items[:count])) + (", ..." if len(items) > count else "")
