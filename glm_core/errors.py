"""The only exception that the pack raises on purpose, and lists for its sentences."""

from collections.abc import Iterable


class GLMImageError(ValueError):
    """A sentence for the person at the graph: what was wrong, the value, what to do."""

    __module__ = "glm_image"  # shown by hosts, which import the pack under its file path


def shown(value: object, longest: int = 200) -> str:
    """A value as a sentence shows it: on one line, its end cut, half surrogate pairs as `?`."""
    text = " ".join(str(value).split())
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    return text if len(text) <= longest else text[:longest] + "..."


def first_few(items: Iterable[str], count: int = 3) -> str:
    """The first `count` items, with dots if there are more."""
    items = list(items)
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")
