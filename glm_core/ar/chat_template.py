"""Chat templates: Jinja of the plain kind, rendered within a budget of work.

A template comes with a checkpoint. It may be endless, or double a text until memory is full, and
no interrupt ends that. So each loop's round, each macro's call and each value is paid for, and
what cannot be counted is refused: other calls, filters and operators.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import update_wrapper
from typing import Any

from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ..errors import CheckpointError, shown
from ..foreign import wall

ADVICE = "take chat_template.jinja from the original checkpoint"
MAX_LENGTH = 2**16
BUDGET = 2**24
"""Characters that one rendering may read and write. A round costs the template's own length."""
VALUE_COST = 100
MAX_NUMBER = 2**63

STATEMENTS = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign,
    nodes.AssignBlock, nodes.Macro, nodes.ExprStmt, nodes.Break, nodes.Continue, nodes.With,
)  # fmt: skip
EXPRESSIONS = (
    nodes.Name, nodes.NSRef, nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair,
    nodes.Keyword, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem,
    nodes.Getattr, nodes.Slice, nodes.Concat, nodes.Compare, nodes.Operand, nodes.And, nodes.Or,
    nodes.Not, nodes.Add, nodes.Sub, nodes.Mul, nodes.Mod, nodes.FloorDiv, nodes.Neg, nodes.Pos,
)  # fmt: skip
FILTERS = (
    "trim", "upper", "lower", "title", "capitalize", "length", "count", "first", "last", "default",
    "d", "string", "list", "int", "select", "reject", "selectattr", "rejectattr", "map",
    "safe", "items", "reverse", "unique",
)  # fmt: skip
METHODS = {
    "strip", "lstrip", "rstrip", "startswith", "endswith", "split", "rsplit", "upper", "lower",
    "title", "capitalize", "get", "items", "keys", "values", "cycle", "changed",
}  # fmt: skip


class ChatTemplate:
    """A checkpoint's template.

    Raises:
        GLMImageError: it is too long, broken or not of the plain kind.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_LENGTH:
            raise CheckpointError(
                f"The AR model's chat template has {len(source)} characters, and this pack reads "
                f"at most {MAX_LENGTH}: {ADVICE}."
            )
        with wall("The AR model's chat template is broken", ADVICE):
            self._environment = Environment(len(source) + 1)
            tree = self._environment.parse(source)
            _require_plain(tree)
            self._template = self._environment.from_string(_Counted().visit(tree))

    def render(self, messages: list[dict[str, Any]], names: dict[str, str]) -> str:
        """The messages as text.

        Args:
            names: of control tokens, which a template may write.

        Raises:
            GLMImageError: the template asks for too much work, or refuses the messages.
        """
        self._environment.remaining = BUDGET
        with wall("The AR model's chat template cannot be rendered", ADVICE):
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=False, **names
            )


class Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with a budget."""

    intercepted_binops = frozenset(("+", "-", "*", "%", "//"))

    def __init__(self, round_cost: int) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=self.pay
        )
        self.round_cost, self.remaining = round_cost, BUDGET
        self.filters = {name: _paid(self, self.filters[name]) for name in FILTERS}
        self.filters["tojson"] = _paid(self, lambda value: json.dumps(value, ensure_ascii=False))
        self.filters["join"] = self.join
        self.filters["paid"], self.filters["counted"] = self.pay, self.counted
        self.filters["concatenated"] = lambda parts: "".join(str(self.pay(part)) for part in parts)
        namespace = self.globals["namespace"]
        self.globals = {
            "namespace": namespace,
            "range": self.globals["range"],  # of bounded length; its numbers are paid by the round
            "raise_exception": _refuse,
        }

    def pay(self, value: Any) -> Any:
        """Charge for a value's characters and elements, and return it."""
        waiting = [value]
        while waiting:
            part = waiting.pop()
            self.charge(VALUE_COST + (len(part) if isinstance(part, str) else 0))
            if isinstance(part, dict):
                waiting += [*part.keys(), *part.values()]
            elif isinstance(part, list | tuple):
                waiting += part
            elif type(part) is int and abs(part) > MAX_NUMBER:
                raise CheckpointError(f"The AR model's chat template counts too far: {ADVICE}.")
        return value

    def join(self, parts: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
        if attribute is not None:
            parts = (part[attribute] for part in parts)
        texts = []
        for part in parts:
            self.pay([part, separator])
            texts.append(str(part))
        return separator.join(texts)

    def charge(self, cost: int) -> None:
        self.remaining -= cost
        if self.remaining < 0:
            raise CheckpointError(
                f"The AR model's chat template is endless, or writes too much: {ADVICE}."
            )

    def counted(self, values: Iterable[Any] | None) -> Iterator[Any]:
        """The values, each for the price of a round."""
        if values is None:
            self.charge(self.round_cost)
            return iter(())
        return self._rounds(values)

    def _rounds(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.charge(self.round_cost)
            yield value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator != "+" and not all(isinstance(x, int | float) for x in (left, right)):
            raise TypeError(operator)  # a text times a number, or formatted
        self.pay(left)
        self.pay(right)
        return self.pay(super().call_binop(context, operator, left, right))

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        name = name or getattr(called, "_undefined_name", None)
        known = isinstance(called, Macro) or called in self.globals.values()
        if not known and not (isinstance(owner, str | dict | LoopContext) and name in METHODS):
            raise CheckpointError(
                f"The AR model's chat template calls {shown(str(name))}, which is not supported: "
                f"{ADVICE}."
            )
        self.pay([owner, *args, *kwargs.values()])
        return super().call(context, called, *args, **kwargs)


def _paid(environment: Environment, function: Callable) -> Callable:
    """A filter that charges for its values. It keeps Jinja's marks of what it is passed."""

    def paid(*args: Any, **kwargs: Any) -> Any:
        environment.pay([x for x in args if isinstance(x, str | int | list | tuple | dict)])
        return function(*args, **kwargs)

    return update_wrapper(paid, function)


def _refuse(message: str) -> None:
    raise CheckpointError(f"The AR model's chat template says: {shown(str(message))}; {ADVICE}.")


def _require_plain(tree: nodes.Template) -> None:
    for node in [tree, *tree.find_all(nodes.Node)]:
        name = type(node).__name__
        if isinstance(node, nodes.Filter):
            plain, name = node.name in (*FILTERS, "join", "tojson"), f"filter {node.name}"
        elif isinstance(node, nodes.For):
            plain, name = not node.recursive, "recursive loop"
        else:
            plain = isinstance(node, (*STATEMENTS, *EXPRESSIONS))
        if not plain or getattr(node, "dyn_args", None) or getattr(node, "dyn_kwargs", None):
            raise CheckpointError(
                f"The AR model's chat template has a {shown(name)} in line {node.lineno}, which is "
                f"not supported: {ADVICE}."
            )


class _Counted(NodeTransformer):
    """Puts the counting filters into a template."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        node = self.generic_visit(node)
        node.iter = _filter(node.iter, "counted")
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:  # noqa: N802
        node = self.generic_visit(node)
        tick = nodes.ExprStmt(_filter(nodes.Const(None, lineno=node.lineno), "counted"))
        node.body.insert(0, tick.set_lineno(node.lineno))
        return node

    def visit_List(self, node: nodes.List) -> nodes.Filter:  # noqa: N802
        """Lists are paid for when made: one that holds another twice is twice as long."""
        return _filter(self.generic_visit(node), "paid")

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        node = self.generic_visit(node)
        return _filter(node, "paid") if node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        node = self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "concatenated")


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
