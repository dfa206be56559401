"""What a foreign JSON object must hold: a table of keys, each with a type and a range.

A key may be a path, `text_config.vocab_size`. The first value that does not fit is a sentence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError, quoted

REQUIRED = object()


@dataclass(frozen=True)
class Kind:
    """What a value must be.

    Args:
        wanted: ends the sentence about a value that does not fit.
        default: the value of a key that is missing or null, unless it is `REQUIRED`.
    """

    wanted: str
    fits: Callable[[Any], bool]
    default: Any = REQUIRED


def whole(low: int, high: int) -> Kind:
    """A whole number, and no bool."""
    wanted = f"but must be a whole number from {low} to {high}"
    return Kind(wanted, lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Kind:
    """A finite number, and no bool."""
    wanted = f"but must be a number from {low:g} to {high:g}"
    return Kind(wanted, lambda value: type(value) in (int, float) and low <= value <= high)


def exactly(value: Any) -> Kind:
    """This value, of this type."""
    wanted = f"but only {value!r} is supported"
    return Kind(wanted, lambda found: type(found) is type(value) and found == value)


def many(item: Kind, least: int, most: int) -> Kind:
    """A list of `least` to `most` values of one kind."""
    count = str(least) if least == most else f"{least} to {most}"
    wanted = f"but must be a list of {count} values, each of which {item.wanted[4:]}"
    return Kind(
        wanted,
        lambda value: (
            isinstance(value, list | tuple)
            and least <= len(value) <= most
            and all(map(item.fits, value))
        ),
    )


FLAG = Kind("but must be true or false", lambda value: isinstance(value, bool))
TEXT = Kind("but must be a text", lambda value: isinstance(value, str))
OBJECT = Kind("but must be a JSON object", lambda value: isinstance(value, dict))

# Bounds that several networks share. They are far above any real network's, and a network of this
# size is still described in a moment.
WIDTH = whole(1, 2**18)
LAYERS = whole(1, 256)
HEADS = whole(1, 1024)
EPSILON = number(0, 1)


def optional(kind: Kind, default: Any = None) -> Kind:
    """The kind, for a key that may be missing or null."""
    return Kind(kind.wanted, kind.fits, default)


def read(
    config: Mapping[str, Any], table: Mapping[str, Kind], source: str, advice: str
) -> dict[str, Any]:
    """The values of a table's keys, by the last part of each path.

    Args:
        source: names the object in a sentence.
        advice: what to do, as the end of a sentence.

    Raises:
        GLMImageError: a value is missing, of another type or out of range.
    """
    return {
        path.rpartition(".")[2]: _value(config, path, kind, source, advice)
        for path, kind in table.items()
    }


def _value(config: Mapping[str, Any], path: str, kind: Kind, source: str, advice: str) -> Any:
    *parents, key = path.split(".")
    for count, parent in enumerate(parents, 1):
        config = _fitting(config, parent, OBJECT, ".".join(parents[:count]), source, advice)
    return _fitting(config, key, kind, path, source, advice)


def _fitting(
    config: Mapping[str, Any], key: str, kind: Kind, path: str, source: str, advice: str
) -> Any:
    value = config.get(key)
    if value is None and kind.default is not REQUIRED:
        return kind.default
    if value is None:
        raise CheckpointError(f"{source} has no '{path}'; {advice}.")
    if not kind.fits(value):
        raise CheckpointError(f"{source}'s {path} is {quoted(value)}, {kind.wanted}; {advice}.")
    return value
