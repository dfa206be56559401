"""Milliseconds of a step of the AR model, in each way that it can run."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.ar import LAYOUTS, LOOKAHEAD, ARBench
from bench.measure import Bench
from bench.networks import ar_pair
from bench.presets import Preset
from glm_core.ar.cache import span_of
from glm_core.ar.choice import StepChoice, candidates
from glm_core.ar.operations import PLAIN
from glm_core.ar.replay import EagerRunner, Runner
from glm_core.ar.step import next_logits, step
from glm_core.choice import (
    SECONDS,
    Candidates,
    described,
    named,
    operations_of,
    relative_difference,
)
from glm_core.data.grids import Grid, token_grid
from glm_core.quant.packing import FORMATS

from ..measure_quantised import quantised
from .report import Report

TIMES = 50
Step = Callable[[], object]


class PlainBench(ARBench):
    """Steps that run as they come."""

    def new_runner(self) -> Runner:
        return EagerRunner()


def measure(preset: Preset, bench: Bench, report: Report) -> None:
    ours, reference = ar_pair(preset.ar, bench.device, preset.ar_dtype)
    ar = ARBench(bench, ours, reference, preset.ar_dtype)
    with report.attempt("greedy tokens equal transformers'"):
        ar.require_agreement()
    grid, found = token_grid(*preset.sizes[0]), candidates()
    floor = 1000 * ar.weight_read_seconds()
    report.row("all weights read once", floor, "ms")
    chosen = ""
    with report.attempt("the trial"):
        chosen = _trial(ar, grid, found, report)
    for name, make in _steps(ar, grid, found, chosen):
        with report.attempt(name):
            report.milliseconds(name, make(), TIMES, floor)
    differences(ar, grid, found, report)


def _trial(ar: ARBench, grid: Grid, found: Candidates, report: Report) -> str:
    """What the pack's own trial chooses, and how long it takes."""
    seconds = 0.0 if ar.bench.on_cpu else SECONDS  # Triton's interpreter is slow
    choice, runner = StepChoice(None, found, seconds), ar.new_runner()
    buffers = ar.step_buffers(runner, ar.ours, grid)
    since = time.perf_counter()
    choice.choose(ar.ours, buffers, runner, lambda: None)
    report.row("the trial", time.perf_counter() - since, "s")
    (names,) = choice.choice.known.values()
    report.row("the trial's choice", described(names))
    return "" if not names else described(names)


def _steps(
    ar: ARBench, grid: Grid, found: Candidates, chosen: str
) -> Iterator[tuple[str, Callable[[], Step]]]:
    """A name, and a function that makes the step; it is made when its turn comes."""
    plain = PlainBench(ar.bench, ar.ours, ar.reference, ar.dtype)
    yield "step, plain", partial(plain.our_step, grid, 1)
    yield "step, graphs", partial(ar.our_step, grid, 1)
    yield "step, transformers", partial(ar.their_step, ar.middle(grid))
    best = step_of(chosen, found)
    if chosen:
        yield f"step, graphs, {chosen}", partial(ar.our_step, grid, 1, run_step=best)
    if ar.dtype == torch.bfloat16:
        for name in FORMATS:

            def packed(name: str = name) -> Step:
                model = quantised(ar.ours, name, ar.bench.device)
                return ar.our_step(grid, 1, model, run_step=best)

            yield f"step, {name}, {chosen or 'plain'}", packed
    yield f"step of {LAYOUTS} samples", partial(ar.our_step, grid, LAYOUTS, run_step=best)
    yield f"step of {LOOKAHEAD} cells", partial(ar.our_step, grid, 1, width=LOOKAHEAD)
    for text in texts(found):
        one = step_of(text, found)
        yield f"step, graphs, {text}", partial(ar.our_step, grid, 1, run_step=one)


def differences(ar: ARBench, grid: Grid, found: Candidates, report: Report) -> None:
    """How far each candidate's logits are from the plain step's."""
    buffers, span = ar.step_buffers(EagerRunner(), ar.ours, grid), span_of(ar.middle(grid) + 1)
    expected = next_logits(ar.ours, buffers, span)
    for text in texts(found):
        name = f"{text}: relative difference of logits"
        with report.attempt(name):
            operations = operations_of(PLAIN, named(text), found)
            ours = next_logits(ar.ours, buffers, span, operations)
            report.row(name, relative_difference(ours, expected))


def texts(found: Candidates) -> list[str]:
    return [described({field: name}) for field, functions in found.items() for name in functions]


def step_of(text: str, found: Candidates) -> Callable:
    """A step with other operations in the place of plain ones."""
    return partial(step, operations=operations_of(PLAIN, named(text or "plain"), found))
