"""Choosing the operations of steps by a trial of whole steps, once for each shape.

In float32 the tokens do not depend on the choice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import choice
from ..choice import Candidates, Choice, mean_milliseconds
from .cache import span_of
from .compiled import compiled_operations
from .kernels import VERSION, triton_operations
from .model import ARModel
from .operations import PLAIN, Operations, attend_by_products
from .replay import Runner
from .step import StepBuffers, next_logits, step

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""The largest relative difference of logits. A plain step in bf16 differs from one in float32 by
0.02 or less, and two that round in other places by that twice (`tests/core/test_ar_choice.py`)."""
COMPILING_SECONDS = 300.0
"""For a trial in which torch compiles; every compiled candidate may take minutes."""

Chooser = Callable[[ARModel, StepBuffers, Runner, Callable[[], None]], Operations]
"""Gives a run's operations before its first step. It is called with the model, the buffers, which
hold a prompt and a target, what runs the steps, and a function that raises to stop."""


def candidates(triton: bool = True, compiled: bool = False) -> Candidates:
    """What there is beside the plain operations, what usually gains most first.

    Args:
        triton: whether Triton's kernels are among them.
        compiled: whether those are that `torch.compile` makes when they are first used.
    """
    parts = (
        triton_operations() if triton else {},
        {"attend": {"products": attend_by_products}},
        compiled_operations() if compiled else {},
    )
    found: dict[str, dict[str, Callable]] = {}
    for part in parts:
        for field, functions in part.items():
            found.setdefault(field, {}).update(functions)
    return found


def plainly(*_: Any) -> Operations:
    """A `Chooser` of the plain operations."""
    return PLAIN


def fixed(operations: Operations) -> Chooser:
    """A `Chooser` of given operations."""
    return lambda *_: operations


class StepChoice:
    """A choice for the steps of each shape; `choose` and `recall` are `Chooser`s."""

    def __init__(
        self, path: Path | None, found: Candidates, seconds: float = choice.SECONDS
    ) -> None:
        """See `Choice`."""
        self.choice = Choice("The AR model's steps", PLAIN, found, path, seconds)

    def choose(
        self,
        model: ARModel,
        buffers: StepBuffers,
        runner: Runner,
        check_interrupt: Callable[[], None],
    ) -> Operations:
        """What is remembered, or else the outcome of a trial of a few seconds."""
        choose = partial(self.choice.choose, check_interrupt=check_interrupt)
        return self._by_trial(choose, model, buffers, runner)

    def recall(self, model: ARModel, buffers: StepBuffers, runner: Runner, *_: Any) -> Operations:
        """What is remembered, or else the plain operations: for steps that cannot be timed."""
        return self._by_trial(self.choice.recall, model, buffers, runner)

    def _by_trial(
        self,
        ask: Callable[[str, "_Trial"], Operations],
        model: ARModel,
        buffers: StepBuffers,
        runner: Runner,
    ) -> Operations:
        if model.segments:
            return PLAIN
        trial = _Trial(model, buffers, runner)
        with trial.leaving_no_trace():
            return ask(self.key(model, buffers), trial)

    def key(self, model: ARModel, buffers: StepBuffers) -> str:
        """What a choice depends on."""
        shape, config = buffers.shape, model.config
        return self.choice.key(
            shape.device,
            VERSION,
            f"{config.layers} layers of {config.hidden_size}, {config.intermediate_size}",
            f"heads {config.heads}/{config.kv_heads} of {config.head_dim}",
            str(shape.dtype).removeprefix("torch."),
            f"batch {shape.batch}",
            f"cells {shape.width}",
            f"positions {shape.length}",
            *(["padded"] if shape.padded else []),
        )


class _Trial:
    """A step, as the runner runs it over a run's buffers."""

    def __init__(self, model: ARModel, buffers: StepBuffers, runner: Runner) -> None:
        self._model = model
        self._buffers = buffers
        self._runner = runner
        self._used = False
        self._position = buffers.position.clone()
        self.tolerance = TOLERANCE.get(buffers.shape.dtype, 0.0)

    @contextmanager
    def leaving_no_trace(self) -> Iterator[None]:
        """Restores the buffers after a trial, and frees what the runner keeps of it."""
        changed = self._buffers.tokens, self._buffers.position, self._buffers.final
        before = [tensor.clone() for tensor in changed]
        try:
            yield
        finally:
            if self._used:
                for tensor, value in zip(changed, before, strict=True):
                    tensor.copy_(value)
                self._runner.forget()

    def results(self, operations: Operations) -> Sequence[Tensor]:
        """The logits of the run's next step."""
        self._used = True
        self._buffers.position.copy_(self._position)
        span = span_of(int(self._position[-1]) + 1)
        return (next_logits(self._model, self._buffers, span, operations),)

    def milliseconds(self, operations: Operations) -> float:
        """Of a step at the last positions, where attention has most to do. They are written again
        later."""
        model, buffers, span = self._model, self._buffers, self._buffers.shape.length
        buffers.position.copy_(buffers.offsets + span - buffers.shape.width)

        def run(times: int) -> None:
            for _ in range(times):
                work = span, operations
                self._runner.run(lambda: step(model, buffers, span, operations), work)
            int(buffers.final)  # waits for the device

        int(buffers.final)
        return mean_milliseconds(run)
