"""The AR model's step with what `torch.compile` makes, and how long that takes to make."""

import time

from bench.ar import ARBench
from bench.measure import Bench
from bench.networks import ar_pair
from bench.presets import Preset
from glm_core.ar.compiled import compiled_operations
from glm_core.data.grids import token_grid

from .ar import TIMES, differences, step_of, texts
from .report import Report


def measure(preset: Preset, bench: Bench, report: Report) -> None:
    """A CPU runs what the compiler reads, uncompiled."""
    ar = ARBench(bench, *ar_pair(preset.ar, bench.device, preset.ar_dtype), preset.ar_dtype)
    grid = token_grid(*preset.sizes[0])
    plain = report.milliseconds("step, graphs", ar.our_step(grid, 1), TIMES)
    found = compiled_operations("eager" if bench.on_cpu else "inductor")
    for text in texts(found):
        with report.attempt(text):
            step = ar.our_step(grid, 1, run_step=step_of(text, found))
            since = time.perf_counter()
            step()
            bench.wait()
            report.row(f"{text}: the first step", time.perf_counter() - since, "s")
            report.milliseconds(f"step, graphs, {text}", step, TIMES, plain)
    differences(ar, grid, found, report)
