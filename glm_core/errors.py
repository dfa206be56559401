"""The only exception that the pack raises on purpose, and how its sentences show values."""

from collections.abc import Iterable
from typing import Any

LONGEST = 200
"""Characters of a value or a list in a sentence."""


class GLMImageError(ValueError):
    """A sentence for the person at the graph: what was wrong, the value, what to do."""

    __module__ = "glm_image"  # shown by hosts, which import the pack under its file path


def cut(text: str) -> str:
    """The text, with dots for what follows its first `LONGEST` characters."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def shown(value: Any) -> str:
    """A value as Python writes it, cut."""
    return cut(repr(value))


def first_few(items: Iterable[str], count: int = 3) -> str:
    """The first `count` items, with dots if there are more. Cut as a whole."""
    items = list(items)
    return cut(", ".join(items[:count])) + (", ..." if len(items) > count else "")
