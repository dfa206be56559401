"""The inputs of a queued graph's nodes that are known before it runs."""

from collections.abc import Callable, Mapping
from typing import Any

from comfy_execution.graph_utils import is_link

Graph = Mapping[str, Mapping[str, Any]]
"""An API prompt: nodes by id."""
Values = dict[str, list[Any]]
"""Lists by input's name, as a node with `is_input_list` gets them."""

PRIMITIVES = (
    "PrimitiveString",
    "PrimitiveStringMultiline",
    "PrimitiveInt",
    "PrimitiveFloat",
    "PrimitiveBoolean",
)
"""ComfyUI's nodes that give their `value`."""


class NotConstantError(Exception):
    """An input is linked to a node that has to run first."""


class Constants:
    """What nodes that only hold values give.

    Args:
        givers: for further classes of nodes, their first output's list, from their values.
    """

    def __init__(self, graph: Graph, givers: Mapping[str, Callable[[Values], list[Any]]]) -> None:
        self._graph = graph
        self._givers = givers

    def inputs(self, node_id: str, leave_out: frozenset[str] = frozenset()) -> Values:
        """
        Raises:
            NotConstantError: another input than those left out is linked to a node that has to run.
        """
        given = self._graph[node_id]["inputs"]
        return {name: self._value(value) for name, value in given.items() if name not in leave_out}

    def _value(self, value: Any) -> list[Any]:
        if not is_link(value):
            return [value]
        source, output = value
        kind = self._graph[source]["class_type"]
        if output == 0 and kind in PRIMITIVES:
            return self.inputs(source)["value"]
        if output == 0 and kind in self._givers:
            return self._givers[kind](self.inputs(source))
        raise NotConstantError(kind)


def needed(graph: Graph, outputs: list[str]) -> list[str]:
    """The ids of the nodes that outputs may need, in the order of the graph."""
    found: set[str] = set()
    waiting = list(outputs)
    while waiting:
        node_id = waiting.pop()
        if node_id not in found and node_id in graph:
            found.add(node_id)
            links = filter(is_link, graph[node_id]["inputs"].values())
            waiting += [link[0] for link in links]
    return [node_id for node_id in graph if node_id in found]
