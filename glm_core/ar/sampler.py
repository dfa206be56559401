"""Sampling semantic tokens: the preview, then the large grid, one cell after the other.

A cell's draw is a Gumbel-max over the filtered candidates. Its noise depends only on the sample's
seed, the grid (0: preview, 1: large), the row and the column. The prompt, forced cells, guesses
and the other samples do not change it.

The samples of a run have one prompt, or each its own. Prompts of several lengths are padded at
their beginning, so that all first cells are at one position of the cache. It is the prompt's length
rounded up to a multiple of `cache.SPAN`, and so depends on no other sample. A prompt is read alone,
and in a step no operation mixes samples. So a sample's tokens in bf16 depend on the number of
samples, which chooses kernels, but not on what the others are.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from ..data.cells import ranges_of
from ..data.grids import Grid, preview_grid
from ..data.tokens import UNKNOWN, Forced
from ..errors import BatchError, InputError, TokensError
from .cache import span_of
from .choice import Chooser, plainly
from .lookahead import guess_row
from .model import ARModel, rope_table
from .operations import Operations
from .philox import sample_keys
from .prompt import Prompt, positions_with_grids
from .replay import EagerRunner, Runner
from .step import (
    SamplingOptions,
    StepShape,
    draw_and_write,
    prefill,
    read_cells,
    set_noise,
    set_target,
    step,
)

REPORT_SECONDS = 0.1
_PREVIEW, _LARGE = 0, 1


@dataclass(frozen=True)
class SamplingRun:
    """How to draw, where to compute, and whom to notify.

    Args:
        seeds: one for each sample, see `philox.batch_seeds`.
        device, dtype: where and in what to compute.
        lookahead: cells that one step of the model may write, all but the first only if they were
            guessed right, see `lookahead.py`. 1 writes one a step. The tokens are the same.
        runner: runs the steps.
        choose: gives the operations that the steps run with, see `choice.py`.
        progress: called with (cells drawn, cells to draw), at most every 100 ms and at the end.
        show: called before each progress with the grids so far, int64 [B, rows, columns] on the
            CPU; cells that are not known yet are `UNKNOWN`.
        check_interrupt: called before every pass of the model; raises to stop.
    """

    seeds: Sequence[int]
    options: SamplingOptions
    device: torch.device
    dtype: torch.dtype
    lookahead: int = 1
    runner: Runner = field(default_factory=EagerRunner)
    choose: Chooser = plainly
    progress: Callable[[int, int], None] = lambda done, total: None
    show: Callable[[list[Tensor]], None] = lambda grids: None
    check_interrupt: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        if self.lookahead < 1:
            raise InputError(f"lookahead is {self.lookahead}: use 1 (off) or more.")

    @property
    def batch_size(self) -> int:
        return len(self.seeds)


Prompts = Prompt | Sequence[Prompt]
"""One for all samples of a run, or one for each; those of one run take equal spans of the cache."""


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
            follow each other are read in one pass, which also gives the next cell's logits.

    Returns:
        Tokens int64 [B, h, w] and preview int64 [B, ph, pw], on the run's device.
    """
    plans = [_GridPlan(_PREVIEW, preview_grid(grid), preview), _GridPlan(_LARGE, grid, large)]
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
    return _write(model, prompt, [_GridPlan(_PREVIEW, preview_grid(grid), preview)], run)[0]


def sample_from_references(
    model: ARModel, prompt: Prompts, grid: Grid, run: SamplingRun, *, large: Forced | None = None
) -> Tensor:
    """The large grid after a prompt with references, which has no preview: int64 [B, h, w].

    Args are those of `sample_tokens`, with a prompt of `PromptTokenizer.image_to_image`.
    """
    return _write(model, prompt, [_GridPlan(_LARGE, grid, large)], run)[0]


@dataclass(frozen=True)
class _GridPlan:
    """A grid to write: its number in the random address, its shape, what is forced in it."""

    number: int
    grid: Grid
    forced: Forced | None

    @property
    def cells(self) -> int:
        return self.grid[0] * self.grid[1]

    def tokens(self, batch: int) -> Tensor:
        """int64 [B, rows * columns]: the forced cells filled in, the others 0."""
        tokens = torch.zeros(batch, *self.grid, dtype=torch.int64)
        if self.forced is not None:
            values, mask = self.forced.values.cpu(), self.forced.mask
            if tuple(mask.shape) != self.grid or tuple(values.shape[1:]) != self.grid:
                raise TokensError(
                    f"The forced cells are a grid of {mask.shape[0]}x{mask.shape[1]} (rows x "
                    f"columns), but this image has {self.grid[0]}x{self.grid[1]}."
                )
            if values.shape[0] not in (1, batch):
                raise BatchError(
                    f"There are forced cells for {values.shape[0]} samples, but {batch} are drawn."
                )
            tokens[:, mask] = values[:, mask].to(torch.int64)
        return rearrange(tokens, "b h w -> b (h w)")

    def free(self) -> Tensor:
        """bool [rows, columns]: the cells to be drawn."""
        if self.forced is None:
            return torch.ones(self.grid, dtype=torch.bool)
        return ~self.forced.mask


def _write(
    model: ARModel, prompt: Prompts, plans: list[_GridPlan], run: SamplingRun
) -> list[Tensor]:
    """Fill the grids in order, each cell given the prompt and all cells before it.

    Returns:
        int64 [B, rows, columns] for each grid.
    """
    writer = _Writer(model, prompt, plans, run)
    report = _Report(writer, plans, run)
    for plan in plans:
        for row, free in enumerate(plan.free()):
            if free.any():
                writer.begin_row(plan, row, free)
            for columns in ranges_of(free.tolist()):
                for cell, count in writer.write(columns):
                    report.wrote(cell, count)
    return _grids(writer.tokens.clone(), plans)


def _grids(cells: Tensor, plans: list[_GridPlan]) -> list[Tensor]:
    """[B, cells of all grids] to [B, rows, columns] for each grid."""
    flat = cells.split([plan.cells for plan in plans], dim=1)
    return [
        rearrange(part, "b (h w) -> b h w", w=plan.grid[1])
        for plan, part in zip(plans, flat, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Prompts:
    """A run's prompts, and where in the cache they end.

    rows: the samples of each prompt.
    end: the position of the first cell.
    padded: whether a prompt may begin after position 0.
    """

    rows: dict[Prompt, list[int]]
    end: int
    padded: bool

    @classmethod
    def of(cls, prompts: Prompts, batch: int) -> "_Prompts":
        if isinstance(prompts, Prompt):
            return cls({prompts: list(range(batch))}, len(prompts), padded=False)
        if len(prompts) != batch:
            raise BatchError(f"There are {len(prompts)} prompts, but {batch} samples are drawn.")
        ends = {span_of(len(prompt)) for prompt in prompts}
        if len(ends) > 1:
            raise BatchError(
                f"The prompts take {min(ends)} to {max(ends)} positions of the cache; write those "
                "that take the same in one run."
            )
        rows: dict[Prompt, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(prompt, []).append(row)
        return cls(rows, ends.pop(), padded=True)


class _Writer:
    """Writes free cells, and has the model read prompts and forced cells when needed."""

    def __init__(
        self, model: ARModel, prompts: Prompts, plans: list[_GridPlan], run: SamplingRun
    ) -> None:
        self._model = model
        self._plans = plans
        self._run = run
        self._prompts = _Prompts.of(prompts, run.batch_size)
        self._keys = sample_keys(run.seeds, run.device)
        cells = torch.cat([plan.tokens(run.batch_size) for plan in plans], dim=1)
        shape = StepShape(
            run.batch_size,
            cells.shape[1],
            max(plan.grid[1] for plan in plans),
            span_of(self._prompts.end + cells.shape[1] + run.lookahead - 1),
            run.options,
            run.device,
            run.dtype,
            run.lookahead,
            self._prompts.padded,
        )
        self._buffers = run.runner.buffers(model, shape)
        self.tokens.copy_(cells)
        self._place_prompts()
        self._read = 0  # positions that the cache holds
        self._row_start = 0  # the first cell of the row being written
        self._operations: Operations | None = None  # chosen before the first step

    def _place_prompts(self) -> None:
        """Fill in where each sample's prompt begins, and the rotations of it and its cells."""
        buffers, grids = self._buffers, [plan.grid for plan in self._plans]
        for prompt, rows in self._prompts.rows.items():
            positions = positions_with_grids(prompt, grids).to(self._run.device)
            first = self._prompts.end - len(prompt)
            places = slice(first, first + positions.shape[1])
            rope = rope_table(self._model.config, positions, self._run.dtype)
            buffers.rope[rows if self._prompts.padded else 0, :, places] = rope
            if buffers.first is not None:
                buffers.first[rows] = first

    @property
    def tokens(self) -> Tensor:
        """int64 [B, cells of all grids]; cells not written yet are guesses or 0."""
        return self._buffers.tokens[:, : self._buffers.shape.cells]

    def begin_row(self, plan: _GridPlan, row: int, free: Tensor) -> None:
        """Turn to a row: fill in its noise and, with lookahead, guesses in its free cells.

        Args:
            free: bool [columns].
        """
        first = sum(before.cells for before in self._plans[: self._plans.index(plan)])
        self._row_start = first + row * plan.grid[1]
        if self._run.lookahead > 1:
            self._guess(plan, row, free.to(self._run.device))
        codebook = self._model.config.codebook
        set_noise(self._buffers, self._keys, plan.number, row, plan.grid[1], codebook)

    def _guess(self, plan: _GridPlan, row: int, free: Tensor) -> None:
        start, width = self._row_start, plan.grid[1]
        above = self.tokens[:, start - width : start] if row else None
        preview = None
        if plan.number == _LARGE and len(self._plans) > 1:
            preview = _grids(self.tokens, self._plans)[0]
        guesses = guess_row(above, preview, plan.grid, row)
        if guesses is not None:
            cells = self.tokens[:, start : start + width]
            cells.copy_(torch.where(free, guesses, cells))

    def write(self, columns: range) -> Iterator[tuple[int, int]]:
        """Draw a range of free cells of the row, up to `lookahead` of them a step.

        Yields:
            The last cell that is final, and how many became so.
        """
        start = columns.start
        while start < columns.stop:
            self._run.check_interrupt()
            cell = self._row_start + start
            count = self._write_from(cell, start, columns.stop - start)
            start += count
            yield cell + count - 1, count

    def _write_from(self, cell: int, column: int, remaining: int) -> int:
        """Draw a cell and those after it that were guessed right. Returns how many."""
        buffers, prompt_end = self._buffers, self._prompts.end
        position = prompt_end + cell - 1  # of the id before the cell
        set_target(buffers, cell, column, position, remaining)
        if self._read == 0:
            logits = self._read_prompts()
            self._read = prompt_end
            if cell == 0:
                draw_and_write(buffers, logits)
                return 1
        if self._read < position:  # forced cells lie between
            unread = range(self._read - prompt_end, cell)
            draw_and_write(buffers, read_cells(self._model, buffers, unread, self._read))
            self._read = prompt_end + cell
            return 1
        count = self._step(span_of(position + self._run.lookahead))
        self._read += count
        return count

    def _read_prompts(self) -> Tensor:
        """Logits [B, 1, codebook] of the first cell."""
        logits: list[Tensor] = [None] * self._run.batch_size
        for prompt, rows in self._prompts.rows.items():
            if 0 not in rows:  # before the first prompt it was called
                self._run.check_interrupt()
            ids = prompt.ids[None].to(self._run.device)
            after = prefill(self._model, ids, self._buffers, rows, self._prompts.end)
            for row in rows:
                logits[row] = after
        return torch.cat(logits)

    def _step(self, span: int) -> int:
        """Run one step. Returns how many cells are final after it."""
        model, buffers, run = self._model, self._buffers, self._run
        if self._operations is None:
            self._operations = run.choose(model, buffers, run.runner, run.check_interrupt)
        operations = self._operations
        run.runner.run(lambda: step(model, buffers, span, operations), (span, operations))
        return 1 if self._run.lookahead == 1 else int(buffers.final)  # waits for the device


class _Report:
    """Progress about every 100 ms. Each report waits for the device, so that it is true."""

    def __init__(self, writer: _Writer, plans: list[_GridPlan], run: SamplingRun) -> None:
        self._writer = writer
        self._plans = plans
        self._run = run
        self._free = torch.cat([plan.free().flatten() for plan in plans])
        self._total = int(self._free.sum())
        self._done = self._reported = 0
        self._next = 1
        self._time = time.monotonic()

    def wrote(self, cell: int, count: int) -> None:
        """`count` cells up to `cell` were drawn; all cells before them are known."""
        self._done += count
        if self._done < self._next:
            return
        tokens = self._writer.tokens.to("cpu", copy=True)  # waits for the device
        tokens[:, cell + 1 :].masked_fill_(self._free[cell + 1 :], UNKNOWN)
        now = time.monotonic()
        self._run.show(_grids(tokens, self._plans))
        self._run.progress(self._done, self._total)
        drawn, seconds = self._done - self._reported, max(now - self._time, 1e-6)
        # The next report comes one interval later at the pace measured, at most twice as far away.
        stride = max(1, min(2 * drawn, int(drawn * REPORT_SECONDS / seconds)))
        self._next = min(self._done + stride, self._total)
        self._reported, self._time = self._done, now
