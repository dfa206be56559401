"""The base of the pack's nodes: every input is checked before a node sees it, and search words.

ComfyUI compares the types that a graph gives its links. It lets pass a literal where a link
belongs, what comes through a link of any type, and a linked number beyond its range. Such a link
also carries None, where a switch node has nothing to give.
"""

import inspect
import json
from collections.abc import Callable
from functools import wraps
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..glm_core.errors import InputError, shown
from .host.kinds import KINDS, Kind
from .search_aliases import ALIASES

WIDGETS = {
    "INT": Kind(lambda value: isinstance(value, Integral), "a whole number", "type one"),
    "FLOAT": Kind(lambda value: isinstance(value, Real), "a number", "type one"),
    "STRING": Kind(lambda value: isinstance(value, str), "text", "type some"),
    "COMBO": Kind(lambda value: isinstance(value, str), "one of its names", "choose one"),
}


class Node(io.ComfyNode):
    """A node whose `execute` gets only values of the types and ranges in its schema.

    None at an optional input is as if nothing were connected: the default of `execute` applies.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, wrapped in (("define_schema", _with_aliases), ("execute", _checked)):
            own = cls.__dict__[name].__func__
            # ComfyUI runs a node as a copy of its class, which has the wrapped methods already.
            if not hasattr(own, "__wrapped__"):
                setattr(cls, name, classmethod(wrapped(own)))


def _with_aliases(define_schema: Callable[..., io.Schema]) -> Callable[..., io.Schema]:
    @wraps(define_schema)
    def with_aliases(cls: type[Node]) -> io.Schema:
        schema = define_schema(cls)
        if hasattr(schema, "search_aliases"):  # ComfyUI 0.3.75 has no such field
            schema.search_aliases = ALIASES.get(schema.node_id, [])
        return schema

    return with_aliases


def _checked(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    signature = inspect.signature(execute)

    @wraps(execute)
    def checked(cls: type[Node], *args: Any, **kwargs: Any) -> io.NodeOutput:
        values = signature.bind_partial(cls, *args).arguments | kwargs
        schema = cls.SCHEMA or cls.define_schema()
        for given in schema.inputs:
            if given.id not in values:
                continue
            value = values.pop(given.id)
            entries = value if schema.is_input_list and value is not None else [value]
            if given.optional and entries and all(entry is None for entry in entries):
                continue
            entries = [_or_default(given, entry) for entry in entries]
            for entry in entries:
                require_input(given, entry)
            values[given.id] = entries if schema.is_input_list else entries[0]
        return execute(**values)

    return checked


def _or_default(given: io.Input, entry: Any) -> Any:
    """An entry of a list. One that is None, at an optional widget, has the widget's default."""
    return getattr(given, "default", None) if given.optional and entry is None else entry


def require_input(given: io.Input, value: Any) -> None:
    """
    Raises:
        GLMImageError: the value is not of the input's type, or beyond its range.
    """
    if value is None and given.optional and given.get_io_type() not in WIDGETS:
        return  # an entry of a list without such a link
    kinds = [(WIDGETS | KINDS)[name] for name in given.get_io_type().split(",")]
    if not any(kind.fits(value) for kind in kinds):
        titles = " or ".join(kind.title for kind in kinds)
        remedy = kinds[0].remedy
        raise InputError(f"{given.id} is {_described(value)} and not {titles}; {remedy}.")
    low, high = getattr(given, "min", None), getattr(given, "max", None)
    if low is not None and not low <= value <= high:  # nan is in no range
        raise InputError(f"{given.id} is {value}; use a value from {low} to {high}.")


def _described(value: Any) -> str:
    """A literal as JSON writes it; a tensor by its shape, anything else by its type."""
    if isinstance(value, Tensor):
        return f"a tensor of the shape {list(value.shape)}"
    try:
        return shown(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):
        return f"of the type {type(value).__name__}"
