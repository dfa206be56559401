"""The only exception that the pack raises on purpose, and lists for its sentences."""

from collections.abc import Iterable


class GLMImageError(ValueError):
    """A sentence for the person at the graph: what was wrong, the value, what to do."""

    __module__ = "glm_image"  # shown by hosts, which import the pack under its file path


def first_few(items: Iterable[str], count: int = 3) -> str:
    """The first `count` items, with dots if there are more."""
    items = list(items)
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")
