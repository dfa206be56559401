"""Milliseconds of a step of the AR model, in each way that it can run."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.ar import LAYOUTS, LOOKAHEAD, ARBench
from bench.measure import Bench
from bench.networks import ar_pair
from bench.presets import Preset
from glm_core.ar.choice import candidates, operations_of
from glm_core.ar.replay import EagerRunner, Runner
from glm_core.ar.step import step
from glm_core.data.grids import token_grid
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
    floor = 1000 * ar.weight_read_seconds()
    report.row("all weights read once", floor, "ms")
    times = 3 if bench.on_cpu else TIMES
    for name, make in _steps(ar, preset):
        with report.attempt(name):
            report.milliseconds(name, make(), times, floor)


def _steps(ar: ARBench, preset: Preset) -> Iterator[tuple[str, Callable[[], Step]]]:
    """A name, and a function that makes the step; it is made when its turn comes."""
    grid = token_grid(*preset.sizes[0])
    plain = PlainBench(ar.bench, ar.ours, ar.reference, ar.dtype)
    yield "step, plain", partial(plain.our_step, grid, 1)
    yield "step, graphs", partial(ar.our_step, grid, 1)
    yield "step, transformers", partial(ar.their_step, ar.middle(grid))
    for name, run_step in _candidates():
        yield f"step, graphs, {name}", partial(ar.our_step, grid, 1, run_step=run_step)
    if ar.dtype == torch.bfloat16:
        for name in FORMATS:

            def packed(name: str = name) -> Step:
                return ar.our_step(grid, 1, quantised(ar.ours, name, ar.bench.device))

            yield f"step, {name}", packed
    yield f"step of {LAYOUTS} samples", partial(ar.our_step, grid, LAYOUTS)
    yield f"step of {LOOKAHEAD} cells", partial(ar.our_step, grid, 1, width=LOOKAHEAD)


def _candidates() -> Iterator[tuple[str, Callable]]:
    """Steps with one other operation in the place of a plain one."""
    found = candidates()
    for field, functions in found.items():
        for name in functions:
            operations = operations_of({field: name}, found)
            yield f"{field}={name}", partial(step, operations=operations)
