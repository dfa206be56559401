"""Which pass of the model draws which cell of which samples, and when forced cells are read.

A cell after a drawn one is drawn by a step. Forced cells that follow each other are read in one
pass, which also draws the cell after them. So a sample's passes depend on its own forced cells
alone.

Where samples of a run have other cells forced, each pass is for those that need it. It still has
all samples, in the same shapes, and writes tokens for its own alone. A step writes every sample's
keys and values; where a sample has forced cells, these are not final, and the pass that reads the
cells writes them again.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ..data.grids import Grid
from ..data.tokens import Forced
from ..errors import BatchError, TokensError
from .cache import span_of
from .lookahead import guess_row
from .model import ARModel, rope_table
from .operations import Operations
from .philox import sample_keys
from .prompt import Prompt, positions_with_grids
from .run import SamplingRun
from .step import (
    StepShape,
    draw_and_write,
    prefill,
    read_cells,
    set_noise,
    set_target,
    step,
)

PREVIEW, LARGE = 0, 1
MOST_READ = 4096
"""Forced cells of all samples that one pass reads where samples have their own, so that the memory
of a run does not depend on who joins it."""

Prompts = Prompt | Sequence[Prompt]
"""One for all samples of a run, or one for each; those of one run take equal spans of the cache."""


@dataclass(frozen=True)
class GridPlan:
    """A grid to write: its number in the random address, its shape, what is forced in it.

    Args:
        forced: its mask may be one for each sample, bool [B, rows, columns].
    """

    number: int
    grid: Grid
    forced: Forced | None

    @property
    def cells(self) -> int:
        return self.grid[0] * self.grid[1]

    def tokens(self, batch: int) -> Tensor:
        """int64 [B, rows * columns]: the forced cells filled in, the others 0."""
        if self.forced is None:
            return torch.zeros(batch, self.cells, dtype=torch.int64)
        require_forced_fit(self.forced, self.grid)
        values = self.forced.values.cpu().to(torch.int64)
        if values.shape[0] not in (1, batch):
            raise BatchError(
                f"There are forced cells for {values.shape[0]} samples, but {batch} are drawn."
            )
        tokens = torch.where(self.forced.mask, values, 0).expand(batch, *self.grid)
        return rearrange(tokens, "b h w -> b (h w)")

    def free(self, batch: int) -> Tensor:
        """bool [B, rows * columns]: the cells to be drawn."""
        mask = torch.zeros(self.grid, dtype=torch.bool) if self.forced is None else self.forced.mask
        return rearrange(~mask.expand(batch, *self.grid), "b h w -> b (h w)")


def require_forced_fit(forced: Forced, grid: Grid) -> None:
    """
    Raises:
        TokensError: the forced cells are of another grid.
    """
    shape = tuple(forced.mask.shape[-2:])
    if shape != grid or tuple(forced.values.shape[1:]) != grid:
        raise TokensError(
            f"The forced cells are a grid of {shape[0]}x{shape[1]} (rows x columns), but this "
            f"image has {grid[0]}x{grid[1]}."
        )


def split_grids(cells: Tensor, plans: Sequence[GridPlan]) -> list[Tensor]:
    """[B, cells of all grids] to [B, rows, columns] for each grid."""
    flat = cells.split([plan.cells for plan in plans], dim=1)
    return [
        rearrange(part, "b (h w) -> b h w", w=plan.grid[1])
        for plan, part in zip(plans, flat, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Prompts:
    """A run's prompts, and where in the cache they end.

    samples: of each prompt.
    end: the position of the first cell.
    padded: whether a prompt may begin after position 0.
    """

    samples: dict[Prompt, list[int]]
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
        samples: dict[Prompt, list[int]] = {}
        for sample, prompt in enumerate(prompts):
            samples.setdefault(prompt, []).append(sample)
        return cls(samples, ends.pop(), padded=True)


class Writer:
    """Writes free cells, and has the model read prompts and forced cells when needed.

    free: bool [B, cells of all grids], the cells to be drawn; none of samples that have left.
    """

    def __init__(
        self, model: ARModel, prompts: Prompts, plans: Sequence[GridPlan], run: SamplingRun
    ) -> None:
        self._model = model
        self._plans = plans
        self._run = run
        self._prompts = _Prompts.of(prompts, run.batch_size)
        self._keys = sample_keys(run.seeds, run.device)
        cells = torch.cat([plan.tokens(run.batch_size) for plan in plans], dim=1)
        self.free = torch.cat([plan.free(run.batch_size) for plan in plans], dim=1)
        if not self._prompts.padded and (self.free != self.free[:1]).any():
            raise BatchError(
                "Samples of one prompt have other cells forced: give each sample its prompt."
            )
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
        self._prompts_are_read = False
        self._read = [0] * run.batch_size  # cells whose keys and values are final, by sample
        self._row_start = 0  # the first cell of the row being written
        self._operations: Operations | None = None  # chosen before the first step
        self._drawn: list[int] | None = None  # what the buffer of that name says
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def _place_prompts(self) -> None:
        """Fill in where each sample's prompt begins, and the rotations of it and its cells."""
        buffers, grids = self._buffers, [plan.grid for plan in self._plans]
        for prompt, samples in self._prompts.samples.items():
            positions = positions_with_grids(prompt, grids).to(self._run.device)
            first = self._prompts.end - len(prompt)
            places = slice(first, first + positions.shape[1])
            rope = rope_table(self._model.config, positions, self._run.dtype)
            buffers.rope[samples if self._prompts.padded else 0, :, places] = rope
            if buffers.first is not None:
                buffers.first[samples] = first

    @property
    def tokens(self) -> Tensor:
        """int64 [B, cells of all grids]; cells not written yet are guesses or 0."""
        return self._buffers.tokens[:, : self._buffers.shape.cells]

    def leave(self, samples: Collection[int]) -> None:
        """Draw nothing more for these samples."""
        self.free[list(samples)] = False

    def begin_row(self, plan: GridPlan, row: int) -> list[range]:
        """Turn to a row: fill in its noise and, with lookahead, guesses in its free cells.

        Returns:
            The columns to write, see `columns_of`.
        """
        first = sum(before.cells for before in self._plans[: self._plans.index(plan)])
        self._row_start = first + row * plan.grid[1]
        free = self.free[:, self._row_start : self._row_start + plan.grid[1]]
        if not free.any():
            return []
        if self._run.lookahead > 1:
            self._guess(plan, row, free.to(self._run.device))
        codebook = self._model.config.codebook
        set_noise(self._buffers, self._keys, plan.number, row, plan.grid[1], codebook)
        return columns_of(free)

    def _guess(self, plan: GridPlan, row: int, free: Tensor) -> None:
        start, width = self._row_start, plan.grid[1]
        above = self.tokens[:, start - width : start] if row else None
        preview = None
        if plan.number == LARGE and len(self._plans) > 1:
            preview = split_grids(self.tokens, self._plans)[0]
        guesses = guess_row(above, preview, plan.grid, row)
        if guesses is not None:
            cells = self.tokens[:, start : start + width]
            cells.copy_(torch.where(free, guesses, cells))

    def write(self, columns: range) -> Iterator[tuple[int, int]]:
        """Draw one of `begin_row`'s ranges, up to `lookahead` cells a step.

        Yields:
            The last cell that is final, and how many became so.
        """
        start = columns.start
        samples = self.free[:, self._row_start + start].nonzero().flatten().tolist()
        while start < columns.stop:
            count = self._write_from(start, columns.stop - start, samples)
            start += count
            yield self._row_start + start - 1, count

    def _write_from(self, column: int, remaining: int, samples: list[int]) -> int:
        """Draw a cell, and those after it that were guessed right. Returns how many.

        Args:
            samples: those in which these cells are free.
        """
        cell, count = self._row_start + column, 1
        unread: dict[int, list[int]] = {}  # by the first cell that they have not read
        for sample in samples:
            unread.setdefault(self._read[sample], []).append(sample)
        stepping = unread.pop(cell - 1, [])
        if not self._prompts_are_read:
            logits = self._read_prompts()
            if cell == 0:
                unread = {}
                self._aim(column, 1, samples)
                draw_and_write(self._buffers, logits)
        if stepping:
            self._aim(column, 1 if unread else remaining, stepping)
            count = self._step(span_of(self._prompts.end + cell - 1 + self._run.lookahead))
        for first, some in unread.items():
            self._aim(column, 1, some)
            self._read_forced(range(first, cell), some)
        for sample in samples:
            self._read[sample] = cell + count - 1
        return count

    def _aim(self, column: int, remaining: int, samples: list[int]) -> None:
        """Set what is drawn next, and for whom."""
        buffers, cell = self._buffers, self._row_start + column
        set_target(buffers, cell, column, self._prompts.end + cell - 1, remaining)
        if buffers.drawn is not None and samples != self._drawn:
            buffers.drawn.copy_(self._mask(samples))
            self._drawn = samples

    def _mask(self, samples: list[int]) -> Tensor:
        """bool [B] on the device, made once for each set of samples."""
        key = tuple(samples)
        if key not in self._masks:
            mask = torch.zeros(self._run.batch_size, dtype=torch.bool)
            mask[samples] = True
            self._masks[key] = mask.to(self._run.device)
        return self._masks[key]

    def _read_prompts(self) -> Tensor:
        """Logits [B, 1, codebook] of the first cell."""
        logits: list[Tensor] = [None] * self._run.batch_size
        for prompt, samples in self._prompts.samples.items():
            self._run.check_interrupt()
            ids = prompt.ids[None].to(self._run.device)
            after = prefill(self._model, ids, self._buffers, samples, self._prompts.end)
            for sample in samples:
                logits[sample] = after
        self._prompts_are_read = True
        return torch.cat(logits)

    def _read_forced(self, cells: range, samples: list[int]) -> None:
        """Read forced cells for some samples, and draw the cell after them."""
        index = None
        if len(samples) < self._run.batch_size:
            index = torch.tensor(samples, device=self._run.device)
        most = MOST_READ // self._run.batch_size if self._prompts.padded else len(cells)
        for first in range(cells.start, cells.stop, most):
            self._run.check_interrupt()
            part = range(first, min(first + most, cells.stop))
            logits = read_cells(self._model, self._buffers, part, self._prompts.end + first, index)
        draw_and_write(self._buffers, logits)

    def _step(self, span: int) -> int:
        """Run one step. Returns how many cells are final after it."""
        model, buffers, run = self._model, self._buffers, self._run
        run.check_interrupt()
        if self._operations is None:
            self._operations = run.choose(model, buffers, run.runner, run.check_interrupt)
        operations = self._operations
        run.runner.run(lambda: step(model, buffers, span, operations), (span, operations))
        return 1 if self._run.lookahead == 1 else int(buffers.final)  # waits for the device


def columns_of(free: Tensor) -> list[range]:
    """The columns of bool [B, columns] that are free in some sample, as ranges of those that
    follow each other and are free in the same samples."""
    ranges: list[range] = []
    before: list[bool] = []
    for column, samples in enumerate(free.T.tolist()):
        if not any(samples):
            pass
        elif samples == before:
            ranges[-1] = range(ranges[-1].start, column + 1)
        else:
            ranges.append(range(column, column + 1))
        before = samples
    return ranges
