"""What other programs wrote is read here: behind a wall, and JSON within bounds.

A tokenizer's library may panic, which is no `Exception` and would end a server's worker. Python's
JSON reader may run out of stack or of time.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from .errors import FileError, GLMImageError, shown

MAX_ELEMENTS = 4_000_000
"""Values in one JSON text. A tokenizer with 170,000 tokens has about a million."""
MAX_DEPTH = 64
Result = TypeVar("Result")


@contextmanager
def wall(what: str, advice: str = "download it again") -> Iterator[None]:
    """Turn whatever a reader raises into the sentence "`what`; `advice`."

    An interrupt of the process passes, and so does a sentence.
    """
    try:
        yield
    except (GLMImageError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise FileError(f"{shown(what)}; {advice}.") from error


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """What `work()` returns or raises, if it ends in time.

    `work` runs in a thread, which nothing can stop: after a TimeoutError it goes on to its end. It
    has to leave Python's lock to others meanwhile.

    Raises:
        TimeoutError: it takes longer.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # a panic of a library is no Exception
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    for error in errors:
        raise error
    if not results:
        raise TimeoutError(f"It takes more than {seconds} seconds.")
    return results[0]


def parse_json(text: str, source: str) -> dict[str, Any]:
    """A JSON object; `source` names the text in an error sentence."""
    require_few_elements(text, source)
    with wall(f"{source} is not valid JSON, or is nested too deeply"):
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise FileError(
                f"{source} is not valid JSON (line {error.lineno}, column {error.colno}); "
                "download it again."
            ) from error
    if not isinstance(value, dict):
        raise FileError(f"{source} is not a JSON object; download it again.")
    if depth(value, MAX_DEPTH) > MAX_DEPTH:
        raise FileError(f"{source} is nested more than {MAX_DEPTH} deep; download it again.")
    return value


def require_few_elements(text: str, source: str) -> None:
    """Refuse a text that may hold more than `MAX_ELEMENTS` values. Commas are counted."""
    if text.count(",") > MAX_ELEMENTS:
        raise FileError(
            f"{source} holds more than {MAX_ELEMENTS} values, too many to read; choose another."
        )


def depth(value: Any, limit: int) -> int:
    """How deep objects and lists are nested; counting ends beyond `limit`."""
    level, count = [value], 0
    while level and count <= limit:
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        count += 1
    return count
