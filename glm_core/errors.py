"""The only exception that the pack raises on purpose, its sentences' values, and full devices."""

from collections.abc import Iterable

import torch

FULL = ("out of memory", "alloc_failed", "can't allocate memory")
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device is full. torch has a type for it, and libraries texts."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in FULL)
