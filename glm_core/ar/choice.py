"""Choosing the operations of steps by a trial on the device, and remembering the choice.

Every candidate must agree with the plain step. Those that make the step faster are kept, one
purpose after the other. A machine takes the same path every time, because the choice is kept in a
file, so the same seed gives the same tokens in bf16 too. In float32 they do not depend on it.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, is_out_of_memory
from .cache import span_of
from .kernels import VERSION, triton_operations
from .model import ARModel
from .operations import PLAIN, Operations, attend_by_products
from .replay import Runner
from .step import StepBuffers, next_logits, step

log = logging.getLogger(__name__)

Candidates = Mapping[str, Mapping[str, Callable]]
"""Functions by the field of `Operations` that they are for, and by name."""
Names = Mapping[str, str]
"""Names of candidates by the field of `Operations`; fields that are not in it are plain."""

AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""The largest relative difference of logits. A plain step in bf16 differs from one in float32 by
0.02 or less, and two that round in other places by that twice (`tests/core/test_ar_choice.py`)."""
GAIN = 0.99  # of the time so far, at most: less is within the noise of a measurement
REPEATS, SECONDS = 20, 0.2
"""A candidate is timed over so many steps, or those of so many seconds, at least three."""


class CandidateError(Exception):
    """A candidate does not run on this device."""


def candidates(triton: bool = True) -> Candidates:
    """What there is beside the plain operations.

    Args:
        triton: whether Triton's kernels are among them.
    """
    found: dict[str, dict[str, Callable]] = {"attend": {"products": attend_by_products}}
    for field, functions in (triton_operations() if triton else {}).items():
        found.setdefault(field, {}).update(functions)
    return found


def operations_of(names: Names, found: Candidates) -> Operations:
    """
    Raises:
        InputError: there is no candidate of a name.
    """
    for field, name in names.items():
        if name not in found.get(field, {}):
            raise InputError(
                f"There is no {name!r} for {field!r} among the operations of a step; there are "
                + ", ".join(f"{f}={n}" for f, functions in found.items() for n in functions)
                + "."
            )
    return replace(PLAIN, **{field: found[field][name] for field, name in names.items()})


def described(names: Names) -> str:
    return " ".join(f"{field}={name}" for field, name in sorted(names.items())) or "plain"


def named(text: str) -> dict[str, str]:
    """The opposite of `described`: "attend=split gate=triton", or "plain"."""
    return {} if text == "plain" else dict(part.split("=") for part in text.split())


Chooser = Callable[[ARModel, StepBuffers, Runner, Callable[[], None]], Operations]
"""Gives a run's operations before its first step. It is called with the model, the buffers, which
hold a prompt and a target, what runs the steps, and a function that raises to stop."""


def plainly(*_: Any) -> Operations:
    """A `Chooser` of the plain operations."""
    return PLAIN


def fixed(operations: Operations) -> Chooser:
    """A `Chooser` of given operations."""
    return lambda *_: operations


class StepChoice:
    """Tries the candidates once for each shape, and remembers; both methods are `Chooser`s."""

    def __init__(self, path: Path | None, found: Candidates) -> None:
        """path: the file that remembers; None remembers for this process alone."""
        self._path = path
        self._found = found
        self._known: dict[str, Names] = {}

    def choose(
        self,
        model: ARModel,
        buffers: StepBuffers,
        runner: Runner,
        check_interrupt: Callable[[], None],
    ) -> Operations:
        """What is remembered, or else the outcome of a trial of a few seconds."""
        if model.segments:
            return PLAIN
        key = self._key(model, buffers)
        names = self._recalled(key)
        if names is None:
            trial = _Trial(model, buffers, runner, self._found, check_interrupt)
            names = self._try(trial, key)
        return operations_of(names or {}, self._found)

    def recall(self, model: ARModel, buffers: StepBuffers, *_: Any) -> Operations:
        """What is remembered, or else the plain operations: for steps that cannot be timed."""
        if model.segments:
            return PLAIN
        return operations_of(self._recalled(self._key(model, buffers)) or {}, self._found)

    def _recalled(self, key: str) -> Names | None:
        if key not in self._known:
            self._known |= self._read()
        return self._known.get(key)

    def _try(self, trial: "_Trial", key: str) -> Names | None:
        """The names of a trial; None if the device was full, which says nothing of candidates."""
        try:
            names, milliseconds, plain = trial.run()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.warning("The AR model's steps stay plain for now: %s", str(error).splitlines()[0])
            return None
        log.info(
            "The AR model's steps run with %s: %.2f ms a step, plain %.2f ms (%s)",
            described(names), milliseconds, plain, key,
        )  # fmt: skip
        self._known[key] = names
        self._write(key, names)
        return names

    def _key(self, model: ARModel, buffers: StepBuffers) -> str:
        """What a choice depends on."""
        shape, config = buffers.shape, model.config
        found = sorted(f"{field}={name}" for field in self._found for name in self._found[field])
        return ", ".join(
            [
                *_machine(shape.device),
                f"{config.layers} layers of {config.hidden_size}, {config.intermediate_size}",
                f"heads {config.heads}/{config.kv_heads} of {config.head_dim}",
                str(shape.dtype).removeprefix("torch."),
                f"batch {shape.batch}",
                f"cells {shape.width}",
                f"positions {shape.length}",
                *(["padded"] if shape.padded else []),
                f"kernels {VERSION}: {' '.join(found)}",
            ]
        )

    def _read(self) -> dict[str, Names]:
        """What the file remembers; nothing if it is missing or is not ours."""
        try:
            stored = json.loads(self._path.read_text("utf-8")) if self._path else {}
        except (OSError, ValueError):
            return {}
        if not isinstance(stored, dict):
            return {}
        return {key: names for key, names in stored.items() if self._is_known(names)}

    def _is_known(self, names: Any) -> bool:
        return isinstance(names, dict) and all(
            isinstance(name, str) and name in self._found.get(field, {})
            for field, name in names.items()
        )

    def _write(self, key: str, names: Names) -> None:
        if self._path is None:
            return
        text = json.dumps(self._read() | {key: dict(names)}, indent=1)
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, "utf-8")
            part.replace(self._path)
        except OSError as error:
            log.warning("The choice of the AR model's steps is not remembered: %s", error)


class _Trial:
    """Checks and times candidates over a run's buffers, and leaves them as they were."""

    def __init__(
        self,
        model: ARModel,
        buffers: StepBuffers,
        runner: Runner,
        found: Candidates,
        check_interrupt: Callable[[], None],
    ) -> None:
        self._model = model
        self._buffers = buffers
        self._runner = runner
        self._check_interrupt = check_interrupt
        self._found = found

    def run(self) -> tuple[Names, float, float]:
        """The names of the fastest operations, their milliseconds, and the plain ones'."""
        buffers, shape = self._buffers, self._buffers.shape
        changed = (buffers.tokens, buffers.position, buffers.final)
        before = [tensor.clone() for tensor in changed]
        try:
            found = self._agreeing()
            # The last positions, where attention has most to do. They are written again later.
            buffers.position.copy_(buffers.offsets + shape.length - shape.width)
            return self._fastest(found)
        finally:
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
            self._runner.forget()

    def _agreeing(self) -> list[tuple[str, str]]:
        """The fields and names of candidates that run, and agree with the plain operations."""
        span = span_of(int(self._buffers.position[-1]) + 1)
        expected = next_logits(self._model, self._buffers, span).float()
        agreeing = []
        for field, functions in self._found.items():
            for name, function in functions.items():
                self._check_interrupt()
                operations = replace(PLAIN, **{field: _telling(function)})
                try:
                    logits = next_logits(self._model, self._buffers, span, operations).float()
                except CandidateError as error:
                    log.info("The AR model's steps run without %s=%s: %s", field, name, error)
                    continue
                difference = relative_difference(logits, expected)
                if difference <= AGREEMENT.get(self._buffers.shape.dtype, 0):
                    agreeing.append((field, name))
                else:
                    log.warning(
                        "The AR model's steps run without %s=%s: its logits differ by %.1e",
                        field, name, difference,
                    )  # fmt: skip
        return agreeing

    def _fastest(self, found: list[tuple[str, str]]) -> tuple[Names, float, float]:
        names: dict[str, str] = {}
        plain = best = self._milliseconds(names)
        for field, name in found:
            self._check_interrupt()
            changed = names | {field: name}
            milliseconds = self._milliseconds(changed)
            if milliseconds <= GAIN * best:
                names, best = changed, milliseconds
        return names, best, plain

    def _milliseconds(self, names: Names) -> float:
        """Of a step, as the runner runs it again and again."""
        model, buffers, span = self._model, self._buffers, self._buffers.shape.length
        operations = operations_of(names, self._found)

        def run(times: int) -> float:
            int(buffers.final)  # waits for the device
            start = time.perf_counter()
            for _ in range(times):
                work = span, operations
                self._runner.run(lambda: step(model, buffers, span, operations), work)
            int(buffers.final)
            return time.perf_counter() - start

        run(2)  # the first warms up, the second records
        once = run(1)
        times = max(3, min(REPEATS, int(SECONDS / max(once, 1e-6))))
        return 1000 * run(times) / times


def relative_difference(ours: Tensor, expected: Tensor) -> float:
    """The norm of the difference by that of what was expected; NaN if ours has one."""
    return float((ours - expected).norm() / expected.norm())


def _telling(function: Callable) -> Callable:
    """A candidate whose errors are told from those of the step around it, such as interrupts."""

    def run(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            text = f"{type(error).__name__}: {error}".strip()
            raise CandidateError(text.splitlines()[0]) from error

    return run


def _machine(device: torch.device) -> list[str]:
    """The device's name, and the versions of what compiles and runs kernels on it."""
    backend = getattr(torch, device.type, None)
    name = getattr(backend, "get_device_name", None)
    driver = getattr(torch._C, "_cuda_getDriverVersion", None)
    return [
        name(device) if name else device.type,
        f"driver {driver() if driver and device.type == 'cuda' else None}",
        f"torch {torch.__version__}",
        f"triton {_triton_version()}",
    ]


def _triton_version() -> str | None:
    try:
        import triton
    except Exception:  # as in `triton_operations`
        return None
    return triton.__version__
