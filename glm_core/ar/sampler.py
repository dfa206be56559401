"""Sampling semantic tokens: the preview, then the large grid, one cell after the other.

A cell's draw is a Gumbel-max over the filtered candidates. Its noise depends only on the sample's
seed, the grid (0: preview, 1: large), the row and the column. The prompt, forced cells, guesses
and the other samples do not change it.

The samples of a run have one prompt, or each its own. Prompts of several lengths are padded at
their beginning, so that all first cells are at one position of the cache. It is the prompt's length
rounded up to a multiple of `cache.SPAN`, and so depends on no other sample. A prompt is read alone,
and in a pass no operation mixes samples. So a sample's tokens in bf16 depend on the number of
samples, which chooses kernels, but not on what the others are.
"""

import time
from collections.abc import Collection, Sequence

from torch import Tensor

from ..data.grids import Grid, preview_grid
from ..data.tokens import UNKNOWN, Forced
from .model import ARModel
from .run import SamplingRun
from .writer import LARGE, PREVIEW, GridPlan, Prompts, Writer, split_grids

REPORT_SECONDS = 0.1


def sample_tokens(
    model: ARModel,
    prompt: Prompts,
    grid: Grid,
    run: SamplingRun,
    *,
    preview: Forced | None = None,
    large: Forced | None = None,
) -> tuple[Tensor, Tensor]:
    """Write a large grid and the preview before it.

    Args:
        prompt: see `PromptTokenizer.text_to_image`.
        grid: (rows, columns) of the large grid.
        preview, large: cells that are forced. They cost no step of their own: forced cells that
            follow each other are read in one pass, which also gives the next cell's logits. With
            a prompt for each sample, the masks may be of each sample too, [B, rows, columns].

    Returns:
        Tokens int64 [B, h, w] and preview int64 [B, ph, pw], on the run's device.
    """
    plans = [GridPlan(PREVIEW, preview_grid(grid), preview), GridPlan(LARGE, grid, large)]
    preview_tokens, tokens = _write(model, prompt, plans, run)
    return tokens, preview_tokens


def sample_layout(
    model: ARModel,
    prompt: Prompts,
    grid: Grid,
    run: SamplingRun,
    *,
    preview: Forced | None = None,
) -> Tensor:
    """The preview stage of `sample_tokens` alone: int64 [B, ph, pw], on the run's device."""
    return _write(model, prompt, [GridPlan(PREVIEW, preview_grid(grid), preview)], run)[0]


def sample_from_references(
    model: ARModel, prompt: Prompts, grid: Grid, run: SamplingRun, *, large: Forced | None = None
) -> Tensor:
    """The large grid after a prompt with references, which has no preview: int64 [B, h, w].

    Args are those of `sample_tokens`, with a prompt of `PromptTokenizer.image_to_image`.
    """
    return _write(model, prompt, [GridPlan(LARGE, grid, large)], run)[0]


def _write(
    model: ARModel, prompt: Prompts, plans: Sequence[GridPlan], run: SamplingRun
) -> list[Tensor]:
    """Fill the grids in order, each cell given the prompt and all cells before it.

    Returns:
        int64 [B, rows, columns] for each grid.
    """
    writer = Writer(model, prompt, plans, run)
    report = _Report(writer, plans, run)
    for plan in plans:
        for row in range(plan.grid[0]):
            report.leave(run.gone())
            for columns in writer.begin_row(plan, row):
                for cell, count in writer.write(columns):
                    report.wrote(cell, count)
            report.ended_row(plan.grid[1])
    return split_grids(writer.tokens.clone(), plans)


class _Report:
    """Progress about every 100 ms, and each sample's end. What is reported waits for the device, so
    that it is true."""

    def __init__(self, writer: Writer, plans: Sequence[GridPlan], run: SamplingRun) -> None:
        self._writer = writer
        self._plans = plans
        self._run = run
        self._waiting = set(range(run.batch_size))  # samples that have not finished
        self._cell = self._row_end = 0  # all before these are known
        self._total = self._remaining()
        self._done = self._reported = 0
        self._next = 1
        self._time = time.monotonic()

    def _remaining(self) -> int:
        return int(self._writer.free[:, self._cell :].any(dim=0).sum())

    def leave(self, samples: Collection[int]) -> None:
        """Nobody waits for these samples any more."""
        if self._waiting.isdisjoint(samples):
            return
        self._waiting -= set(samples)
        self._writer.leave(samples)
        self._total = self._done + self._remaining()
        self._next = min(self._next, self._total)

    def wrote(self, cell: int, count: int) -> None:
        """`count` cells up to `cell` were drawn; all cells before them are known."""
        self._done += count
        self._cell = cell + 1
        if self._done < self._next:
            return
        tokens = self._writer.tokens.to("cpu", copy=True)  # waits for the device
        tokens[:, cell + 1 :].masked_fill_(self._writer.free[:, cell + 1 :], UNKNOWN)
        now = time.monotonic()
        self._run.show(split_grids(tokens, self._plans))
        self._run.progress(self._done, self._total)
        drawn, seconds = self._done - self._reported, max(now - self._time, 1e-6)
        # The next report comes one interval later at the pace measured, at most twice as far away.
        stride = max(1, min(2 * drawn, int(drawn * REPORT_SECONDS / seconds)))
        self._next = min(self._done + stride, self._total)
        self._reported, self._time = self._done, now

    def ended_row(self, columns: int) -> None:
        """A row of so many cells is known; samples without a free cell after it have finished."""
        self._row_end += columns
        later = self._writer.free[:, self._row_end :].any(dim=1).tolist()
        ended = [sample for sample in sorted(self._waiting) if not later[sample]]
        self._waiting.difference_update(ended)
        for sample in ended:
            tokens = self._writer.tokens[sample : sample + 1].cpu()
            grids = [grid[0] for grid in split_grids(tokens, self._plans)]
            self._run.finished(sample, grids)
