"""Sampling semantic tokens: the preview, then the large grid, one cell after the other.

A cell's draw is a Gumbel-max over the filtered candidates. Its noise depends only on the seed, the
sample's index, the grid (0: preview, 1: large), the row and the column, so whatever else is forced,
batched, guessed or written in the prompt moves no draw.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from ..data.grids import Grid, grid_positions, preview_grid
from ..data.tokens import UNKNOWN, Forced
from ..errors import GLMImageError
from .cache import BlockPass, span_of
from .logits import SamplingOptions
from .lookahead import guess_row
from .model import ARModel, rope_table
from .philox import gumbel, sample_keys
from .prompt import Prompt
from .step import EagerRunner, Runner, StepShape

REPORT_SECONDS = 0.1
_PREVIEW, _LARGE = 0, 1


@dataclass(frozen=True)
class Run:
    """How to draw, where to compute, and whom to tell.

    Args:
        seed: of sample 0; sample i draws with (seed + i) mod 2^64.
        device, dtype: where and in what to compute.
        lookahead: cells that one pass of the model may write, all but the first if they are
            guessed right, see `lookahead.py`; 1 writes one a pass. The tokens are the same.
        runner: runs the steps that write one cell.
        progress: called with (cells drawn, cells to draw), at most every 100 ms and at the end.
        show: called before each progress with the grids so far, int64 [B, rows, columns] on the
            CPU; cells that are not known yet are `UNKNOWN`.
        check_interrupt: called before every pass; raises to stop.
    """

    seed: int
    batch_size: int
    options: SamplingOptions
    device: torch.device
    dtype: torch.dtype
    lookahead: int = 1
    runner: Runner = field(default_factory=EagerRunner)
    progress: Callable[[int, int], None] = lambda done, total: None
    show: Callable[[list[Tensor]], None] = lambda grids: None
    check_interrupt: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        if self.lookahead < 1:
            raise GLMImageError(f"lookahead is {self.lookahead}: use 1 (off) or more.")


def sample_tokens(
    model: ARModel,
    prompt: Prompt,
    grid: Grid,
    run: Run,
    *,
    preview: Forced | None = None,
    large: Forced | None = None,
) -> tuple[Tensor, Tensor]:
    """Write a large grid and the preview before it.

    Args:
        prompt: see `PromptTokenizer.text_to_image`.
        grid: (rows, columns) of the large grid.
        preview, large: cells that are forced. A forced run costs no step of its own: it is read in
            one pass together with the next cell that is drawn.

    Returns:
        Tokens int64 [B, h, w] and preview int64 [B, ph, pw], on the run's device.
    """
    plan = [_Plan(_PREVIEW, preview_grid(grid), preview), _Plan(_LARGE, grid, large)]
    preview_tokens, tokens = _write(model, prompt, plan, run)
    return tokens, preview_tokens


def sample_layout(
    model: ARModel, prompt: Prompt, grid: Grid, run: Run, *, preview: Forced | None = None
) -> Tensor:
    """The preview stage of `sample_tokens` alone: int64 [B, ph, pw], on the run's device."""
    return _write(model, prompt, [_Plan(_PREVIEW, preview_grid(grid), preview)], run)[0]


def sample_from_references(
    model: ARModel, prompt: Prompt, grid: Grid, run: Run, *, large: Forced | None = None
) -> Tensor:
    """The large grid after a prompt with references, which has no preview: int64 [B, h, w].

    Args are those of `sample_tokens`, with a prompt of `PromptTokenizer.image_to_image`.
    """
    return _write(model, prompt, [_Plan(_LARGE, grid, large)], run)[0]


@dataclass(frozen=True)
class _Plan:
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
                raise GLMImageError(
                    f"The forced cells are a grid of {mask.shape[0]}x{mask.shape[1]} (rows x "
                    f"columns), but this image has {self.grid[0]}x{self.grid[1]}."
                )
            if values.shape[0] not in (1, batch):
                raise GLMImageError(
                    f"There are forced cells for {values.shape[0]} samples, but {batch} are drawn."
                )
            tokens[:, mask] = values[:, mask].to(torch.int64)
        return rearrange(tokens, "b h w -> b (h w)")

    def free(self) -> Tensor:
        """bool [rows, columns]: the cells to be drawn."""
        if self.forced is None:
            return torch.ones(self.grid, dtype=torch.bool)
        return ~self.forced.mask


def _write(model: ARModel, prompt: Prompt, plan: list[_Plan], run: Run) -> list[Tensor]:
    """Fill the grids of a plan in order, each cell given the prompt and all cells before it.

    Returns:
        int64 [B, rows, columns] for each grid.
    """
    sequence = _Sequence(model, prompt, plan, run)
    report = _Report(sequence, plan, run)
    for p in plan:
        for row, free in enumerate(p.free()):
            if free.any():
                sequence.begin_row(p, row, free)
            for columns in _runs(free.tolist()):
                for cell, cells in sequence.write(columns):
                    report.wrote(cell, cells)
    return _grids(sequence.tokens.clone(), plan)


def _runs(free: list[bool]) -> Iterator[range]:
    """The columns of each run of free cells."""
    start = None
    for column, is_free in enumerate([*free, False]):
        if is_free and start is None:
            start = column
        elif not is_free and start is not None:
            yield range(start, column)
            start = None


def _grids(cells: Tensor, plan: list[_Plan]) -> list[Tensor]:
    """[B, cells of all grids] to [B, rows, columns] for each grid."""
    flat = cells.split([p.cells for p in plan], dim=1)
    return [
        rearrange(part, "b (h w) -> b h w", w=p.grid[1]) for p, part in zip(plan, flat, strict=True)
    ]


class _Sequence:
    """The prompt and the cells after it, read by the model no further than a draw asks for."""

    def __init__(self, model: ARModel, prompt: Prompt, plan: list[_Plan], run: Run) -> None:
        self._model = model
        self._plan = plan
        self._run = run
        self._prompt = prompt.ids[None].to(run.device)
        self._keys = sample_keys(run.seed, run.batch_size, run.device)
        cells = torch.cat([p.tokens(run.batch_size) for p in plan], dim=1)
        positions = _positions(prompt, plan).to(run.device)
        shape = StepShape(
            run.batch_size,
            cells.shape[1],
            max(p.grid[1] for p in plan),
            span_of(positions.shape[1] + run.lookahead - 1),
            run.options,
            run.device,
            run.dtype,
            run.lookahead,
        )
        self._buffers = run.runner.buffers(model, shape)
        self.tokens.copy_(cells)
        self._rope = rope_table(model.config, positions, run.dtype)
        self._buffers.rope[:, : positions.shape[1]] = self._rope
        self._filled = 0  # positions read so far
        self._row_start = 0  # the first cell of the row being written

    @property
    def tokens(self) -> Tensor:
        """int64 [B, cells of all grids]; cells not written yet are guesses or 0."""
        return self._buffers.tokens[:, : self._buffers.shape.cells]

    def begin_row(self, plan: "_Plan", row: int, free: Tensor) -> None:
        """Turn to a row: its noise, a sample at a time, which is all the memory it needs, and
        where the run looks ahead, guesses in its free cells (bool [columns])."""
        first = sum(p.cells for p in self._plan[: self._plan.index(plan)])
        self._row_start = first + row * plan.grid[1]
        if self._run.lookahead > 1:
            self._guess(plan, row, free.to(self._run.device))
        if self._buffers.noise is None:
            return
        columns = torch.arange(plan.grid[1], device=self._run.device)
        codebook = self._model.config.codebook
        for noise, key in zip(self._buffers.noise, self._keys, strict=True):
            noise[: len(columns)] = gumbel(key[None], plan.number, row, columns, codebook)[0]

    def _guess(self, plan: "_Plan", row: int, free: Tensor) -> None:
        start, width = self._row_start, plan.grid[1]
        above = self.tokens[:, start - width : start] if row else None
        preview = None
        if plan.number == _LARGE and len(self._plan) > 1:
            preview = _grids(self.tokens, self._plan)[0]
        guesses = guess_row(above, preview, plan.grid, row)
        if guesses is not None:
            cells = self.tokens[:, start : start + width]
            cells.copy_(torch.where(free, guesses, cells))

    def write(self, columns: range) -> Iterator[tuple[int, int]]:
        """Draw free cells of the row, which follow each other, up to `lookahead` a pass.

        Yields:
            the last cell that is final, and how many became so
        """
        start = columns.start
        while start < columns.stop:
            self._run.check_interrupt()
            cell = self._row_start + start
            final = self._write_from(cell, start, columns.stop - start)
            start += final
            yield cell + final - 1, final

    def _write_from(self, cell: int, column: int, left: int) -> int:
        """Draw a cell, and after it as many of those left in its run as were guessed right."""
        before = self._prompt.shape[1] + cell - 1  # the position of the id before the cell
        self._buffers.aim(cell, column, before, left)
        if self._filled == 0:
            logits = self._read_prompt()
            if cell == 0:
                self._buffers.draw(logits)
                return 1
        if self._filled < before:
            self._buffers.draw(self._read_up_to(cell))
            return 1
        span = span_of(before + self._run.lookahead)
        self._run.runner.run(lambda: self._buffers.step(self._model, span), span)
        final = int(self._buffers.final) if self._run.lookahead > 1 else 1  # waits for the device
        self._filled += final
        return final

    def _read_up_to(self, cell: int) -> Tensor:
        """Logits [B, 1, codebook] of a cell; what is before it and has not been read yet goes in
        one pass."""
        start, length = self._filled, self._prompt.shape[1]
        self._filled = length + cell
        block = self.tokens[:, start - length : cell]
        rope = self._rope[:, start : self._filled]
        reading = BlockPass(self._buffers.cache, start)
        return self._model(block, rope, reading, self._run.dtype)

    def _read_prompt(self) -> Tensor:
        """Read the prompt once for the whole batch, then give each sample its copy."""
        run, length = self._run, self._prompt.shape[1]
        cache = self._model.new_cache(1, length, run.device, run.dtype)
        rope = self._rope[:, :length]
        logits = self._model(self._prompt, rope, BlockPass(cache, 0), run.dtype)
        self._buffers.cache.copy_prefix(cache, length)
        self._filled = length
        return logits.expand(run.batch_size, -1, -1)


def _positions(prompt: Prompt, plan: list[_Plan]) -> Tensor:
    """int64 [3, L] of the prompt and of the grids after it."""
    positions, base = [prompt.positions], prompt.end
    for p in plan:
        positions.append(grid_positions(p.grid, base))
        base += max(p.grid)
    return torch.cat(positions, dim=1)


class _Report:
    """Progress about every 100 ms, each time after waiting for the device, so that it is true."""

    def __init__(self, sequence: _Sequence, plan: list[_Plan], run: Run) -> None:
        self._sequence = sequence
        self._plan = plan
        self._run = run
        self._free = torch.cat([p.free().flatten() for p in plan])
        self._total = int(self._free.sum())
        self._done = self._reported = 0
        self._due = 1
        self._time = time.monotonic()

    def wrote(self, index: int, cells: int) -> None:
        """So many cells up to `index` were drawn, and with it all before it are known."""
        self._done += cells
        if self._done < self._due:
            return
        tokens = self._sequence.tokens.to("cpu", copy=True)  # waits for the device
        tokens[:, index + 1 :].masked_fill_(self._free[index + 1 :], UNKNOWN)
        now = time.monotonic()
        self._run.show(_grids(tokens, self._plan))
        self._run.progress(self._done, self._total)
        steps, seconds = self._done - self._reported, max(now - self._time, 1e-6)
        # The next report is one interval away at the pace measured, but never a leap.
        stride = max(1, min(2 * steps, int(steps * REPORT_SECONDS / seconds)))
        self._due = min(self._done + stride, self._total)
        self._reported, self._time = self._done, now
