"""The one exception that the pack raises on purpose, and lists in its sentences."""

from collections.abc import Iterable


class GLMImageError(ValueError):
    """A sentence for the person at the graph: what was wrong, the value, what to do."""

    __module__ = "glm_image"  # hosts show it, and import the pack under its path


def first_few(items: Iterable[str], count: int = 3) -> str:
    """The first few, with dots where there are more."""
    items = list(items)
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")
