"""Tokens of recorded steps equal those of plain ones in float32, also after faults."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from bench.ar import ARBench
from bench.measure import Bench
from bench.networks import ar_pair
from bench.presets import PRESETS, Preset
from glm_core.ar.replay import EagerRunner, Runner
from glm_core.ar.sampler import sample_tokens
from glm_core.data.grids import preview_grid, token_grid
from glm_core.data.tokens import Forced

from .report import Report

SIZE = (256, 256)
ROOM = 2**20
FULL = 10
"""Times that the device runs out of memory in a row."""


class Interrupted(BaseException):
    """As an interrupt of the process, which is no `Exception`."""


def measure(preset: Preset, bench: Bench, report: Report) -> None:
    """It takes a small network whatever the preset: numbers are compared, not times."""
    ar = ARBench(bench, *ar_pair(PRESETS["tiny"]().ar, bench.device, torch.float32), torch.float32)
    plain = _written(ar, EagerRunner())

    def compare(name: str, runner: Runner) -> None:
        found = _written(ar, runner)
        report.require(name, torch.equal(found, plain), f"{_same(found, plain)} of {plain.numel()}")

    with report.attempt("tokens, recorded"):
        compare("tokens, recorded", ar.new_runner())
    with report.attempt("tokens of requests, recorded"):
        recorded, stepped = (_of_requests(ar, one) for one in (ar.new_runner(), EagerRunner()))
        equal = f"{_same(recorded, stepped)} of {stepped.numel()}"
        report.require("tokens of requests, recorded", torch.equal(recorded, stepped), equal)
    with report.attempt("after an interrupt within a recording"):
        _interrupted(ar, compare)
    with report.attempt("after a full device"):
        _full(ar, report, compare)
    with report.attempt("after a recording that failed"):  # last: none is tried after it
        _refused(ar, compare)


def _written(ar: ARBench, runner: Runner) -> Tensor:
    tokens, preview = sample_tokens(ar.ours, ar.prompt, token_grid(*SIZE), ar.run(runner=runner))
    return torch.cat([preview.flatten(), tokens.flatten()])


def _of_requests(ar: ARBench, runner: Runner) -> Tensor:
    """A run of two samples as a service has it, with a prompt and locked cells each."""
    grid = token_grid(*SIZE)
    locked = torch.ones(2, *preview_grid(grid), dtype=torch.bool)
    locked[0, 0] = locked[1, 1] = False
    preview = Forced(torch.zeros(1, *preview_grid(grid), dtype=torch.int64), locked)
    run = ar.run(2, runner=runner)
    return sample_tokens(ar.ours, [ar.prompt] * 2, grid, run, preview=preview)[0]


def _same(ours: Tensor, plain: Tensor) -> int:
    return int((ours == plain).sum())


def _interrupted(ar: ARBench, compare: Callable[[str, Runner], None]) -> None:
    runner = ar.new_runner()
    with _hook(ar, _raise), suppress(Interrupted):
        _written(ar, runner)
    compare("tokens, after an interrupt within a recording", runner)


def _refused(ar: ARBench, compare: Callable[[str, Runner], None]) -> None:
    """A recording may not read the device."""
    runner = ar.new_runner()
    with _hook(ar, lambda x: x.sum().item()):
        compare("tokens, while a recording fails", runner)
    compare("tokens, after a recording that failed", runner)


def _raise(_: Tensor) -> None:
    raise Interrupted


@contextmanager
def _hook(ar: ARBench, act: Callable[[Tensor], object]) -> Iterator[None]:
    """Acts within the first recording. On a CPU, which records nothing, in the second step."""
    calls = []

    def hook(module: torch.nn.Module, args: tuple, out: Tensor) -> None:
        calls.append(out.shape)
        if torch.cuda.is_available():
            now = torch.cuda.is_current_stream_capturing()
        else:
            now = len(calls) == 3
        if now and not acted:
            acted.append(True)
            act(out)

    acted: list[bool] = []
    last = [module for module in ar.ours.modules() if isinstance(module, torch.nn.Linear)][-1]
    handle = last.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _full(ar: ARBench, report: Report, compare: Callable[[str, Runner], None]) -> None:
    """Runs out of memory often in a row; nothing may stay allocated."""
    if ar.bench.on_cpu:
        compare("tokens, without a full device", ar.new_runner())
        return
    torch.cuda.empty_cache()
    total, before = torch.cuda.mem_get_info()[1], torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + ROOM) / total)
    runner, failures = ar.new_runner(), 0
    batch = math.ceil(ROOM / 2**10)
    try:
        for _ in range(FULL):
            try:
                run = ar.run(batch, runner=runner)
                sample_tokens(ar.ours, ar.prompt, token_grid(*SIZE), run)
            except torch.OutOfMemoryError:
                failures += 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    report.require("the device was full", failures == FULL, f"{failures} of {FULL} times")
    left = torch.cuda.memory_allocated() - before
    report.require("memory is free after it", left < ROOM, f"{left} bytes")
    compare("tokens, after a full device", runner)
