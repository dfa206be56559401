"""Sampling semantic tokens: the preview, then the large grid, one cell after the other.

A cell's draw is a Gumbel-max over the filtered candidates. Its noise depends only on the seed, the
sample's index, the grid (0: preview, 1: large), the row and the column, so whatever else is forced,
batched or written in the prompt moves no draw.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .ar_model import ARModel, KVCache, rope_table
from .errors import GLMImageError
from .grids import Grid, grid_positions, preview_grid
from .philox import gumbel, sample_keys
from .prompt import Prompt
from .tokens import UNKNOWN

REPORT_SECONDS = 0.1
_PREVIEW, _LARGE = 0, 1


@dataclass(frozen=True)
class SamplingOptions:
    """The checkpoint's defaults; temperature 0 takes the likeliest token, top_k 0 keeps all."""

    temperature: float = 0.9
    top_p: float = 0.75
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise GLMImageError(f"temperature is {self.temperature}: use 0 (greedy) or more.")
        if not 0 <= self.top_p <= 1:
            raise GLMImageError(f"top_p is {self.top_p}: use a value between 0 and 1.")
        if self.top_k < 0:
            raise GLMImageError(f"top_k is {self.top_k}: use 0 (off) or more.")


@dataclass(frozen=True, eq=False)
class Forced:
    """Cells of a grid that are given instead of drawn.

    values: int64 [B or 1, rows, columns], read where the mask holds.
    mask: bool [rows, columns], on the CPU.
    """

    values: Tensor
    mask: Tensor


def sample_tokens(
    model: ARModel,
    prompt: Prompt,
    grid: Grid,
    seed: int,
    batch_size: int,
    options: SamplingOptions,
    *,
    device: torch.device,
    dtype: torch.dtype,
    preview: Forced | None = None,
    large: Forced | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    show: Callable[[list[Tensor]], None] = lambda grids: None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Write a large grid and the preview before it.

    Args:
        prompt: see `PromptTokenizer.text_to_image`.
        grid: (rows, columns) of the large grid.
        seed: of sample 0; sample i draws with (seed + i) mod 2^64.
        device, dtype: where and in what to compute.
        preview, large: cells that are forced. A forced run costs no step of its own: it is read in
            one pass together with the next cell that is drawn.
        progress: called with (cells drawn, cells to draw), at most every 100 ms and at the end.
        show: called before each progress with the preview and the large grid so far, int64
            [B, rows, columns] on the CPU; cells that are not known yet are `UNKNOWN`.
        check_interrupt: called before every step; raises to stop.

    Returns:
        Tokens int64 [B, h, w] and preview int64 [B, ph, pw], on `device`.
    """
    plan = [_Plan(_PREVIEW, preview_grid(grid), preview), _Plan(_LARGE, grid, large)]
    draw = _Draw(seed, batch_size, options, device, dtype, progress, show, check_interrupt)
    preview_tokens, tokens = _write(model, prompt, plan, draw)
    return tokens, preview_tokens


def sample_layout(
    model: ARModel,
    prompt: Prompt,
    grid: Grid,
    seed: int,
    batch_size: int,
    options: SamplingOptions,
    *,
    device: torch.device,
    dtype: torch.dtype,
    preview: Forced | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    show: Callable[[list[Tensor]], None] = lambda grids: None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> Tensor:
    """The preview stage of `sample_tokens` alone: int64 [B, ph, pw], on `device`."""
    plan = [_Plan(_PREVIEW, preview_grid(grid), preview)]
    draw = _Draw(seed, batch_size, options, device, dtype, progress, show, check_interrupt)
    return _write(model, prompt, plan, draw)[0]


def sample_from_references(
    model: ARModel,
    prompt: Prompt,
    grid: Grid,
    seed: int,
    batch_size: int,
    options: SamplingOptions,
    *,
    device: torch.device,
    dtype: torch.dtype,
    large: Forced | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    show: Callable[[list[Tensor]], None] = lambda grids: None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> Tensor:
    """The large grid after a prompt with references, which has no preview: int64 [B, h, w].

    Args are those of `sample_tokens`, with a prompt of `PromptTokenizer.image_to_image`.
    """
    plan = [_Plan(_LARGE, grid, large)]
    draw = _Draw(seed, batch_size, options, device, dtype, progress, show, check_interrupt)
    return _write(model, prompt, plan, draw)[0]


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Temperature, then top-k, then top-p, as transformers' logits warpers: float32 [B, n].

    Candidates that drop out become -inf. The temperature must not be 0.
    """
    logits = logits.float() / options.temperature
    if options.top_k:
        kth = logits.topk(min(options.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if options.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - options.top_p
        drop[..., -1] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits


def draw_token(logits: Tensor, noise: Tensor | None, options: SamplingOptions) -> Tensor:
    """Ids int64 [B] from logits and Gumbel noise, both [B, n]; no noise where greedy."""
    if noise is None:
        return logits.argmax(dim=-1)
    return (filter_logits(logits, options) + noise).argmax(dim=-1)


@dataclass(frozen=True)
class _Plan:
    """A grid to write: its number in the random address, its shape, what is forced in it."""

    number: int
    grid: Grid
    forced: Forced | None

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


@dataclass(frozen=True)
class _Draw:
    """What a run draws with, and whom it tells."""

    seed: int
    batch_size: int
    options: SamplingOptions
    device: torch.device
    dtype: torch.dtype
    progress: Callable[[int, int], None]
    show: Callable[[list[Tensor]], None]
    check_interrupt: Callable[[], None]


def _write(model: ARModel, prompt: Prompt, plan: list[_Plan], draw: _Draw) -> list[Tensor]:
    """Fill the grids of a plan in order, each cell given the prompt and all cells before it.

    Returns:
        int64 [B, rows, columns] for each grid.
    """
    sequence = _Sequence(model, prompt, plan, draw)
    keys = sample_keys(draw.seed, draw.batch_size, draw.device)
    report = _Report(sequence, plan, draw)
    row_start = 0
    for p in plan:
        for row, free in enumerate(p.free()):
            columns = free.nonzero().flatten().tolist()
            noise = [None] * len(columns)
            if columns and draw.options.temperature:
                at = torch.tensor(columns, device=draw.device)
                noise = gumbel(keys, p.number, row, at, model.config.codebook).unbind(dim=1)
            for column, cell_noise in zip(columns, noise, strict=True):
                draw.check_interrupt()
                index = row_start + column
                token = draw_token(sequence.logits_at(index), cell_noise, draw.options)
                sequence.tokens[:, index] = token
                report.step(index)
            row_start += p.grid[1]
    return _grids(sequence.tokens, plan)


def _grids(cells: Tensor, plan: list[_Plan]) -> list[Tensor]:
    """[B, cells of all grids] to [B, rows, columns] for each grid."""
    flat = cells.split([p.grid[0] * p.grid[1] for p in plan], dim=1)
    return [
        rearrange(part, "b (h w) -> b h w", w=p.grid[1]) for p, part in zip(plan, flat, strict=True)
    ]


class _Sequence:
    """The prompt and the cells after it, read by the model no further than a draw asks for."""

    def __init__(self, model: ARModel, prompt: Prompt, plan: list[_Plan], draw: _Draw) -> None:
        self.tokens = torch.cat([p.tokens(draw.batch_size) for p in plan], dim=1).to(draw.device)
        self._model = model
        self._dtype = draw.dtype
        self._prompt = prompt.ids[None].to(draw.device)
        positions, base = [prompt.positions], prompt.end
        for p in plan:
            positions.append(grid_positions(p.grid, base))
            base += max(p.grid)
        positions = torch.cat(positions, dim=1).to(draw.device)
        self._rope = rope_table(model.config, positions, draw.dtype)
        self._cache: KVCache | None = None

    def logits_at(self, index: int) -> Tensor:
        """Logits [B, codebook] of cell `index`; cells not read yet are read in one pass."""
        if self._cache is None:
            logits = self._read_prompt()
            if index == 0:
                return logits
        start, stop = self._cache.filled, self._prompt.shape[1] + index
        block = self.tokens[:, start - self._prompt.shape[1] : index]
        return self._model(block, self._rope[:, start:stop], self._cache, self._dtype)

    def _read_prompt(self) -> Tensor:
        """Read the prompt once for the whole batch, then give each sample its copy."""
        batch, length, device = self.tokens.shape[0], self._prompt.shape[1], self._prompt.device
        cache = KVCache(self._model.config, 1, length, device, self._dtype)
        logits = self._model(self._prompt, self._rope[:, :length], cache, self._dtype)
        total = self._rope.shape[1]
        self._cache = KVCache(self._model.config, batch, total, device, self._dtype)
        self._cache.copy_prefix(cache)
        return logits.expand(batch, -1)


class _Report:
    """Progress about every 100 ms, each time after waiting for the device, so that it is true."""

    def __init__(self, sequence: _Sequence, plan: list[_Plan], draw: _Draw) -> None:
        self._sequence = sequence
        self._plan = plan
        self._draw = draw
        self._free = torch.cat([p.free().flatten() for p in plan])
        self._total = int(self._free.sum())
        self._done = self._reported = 0
        self._due = 1
        self._time = time.monotonic()

    def step(self, index: int) -> None:
        """Cell `index` is drawn, and with it all before it are known."""
        self._done += 1
        if self._done < self._due:
            return
        tokens = self._sequence.tokens.to("cpu", copy=True)  # waits for the device
        tokens[:, index + 1 :].masked_fill_(self._free[index + 1 :], UNKNOWN)
        now = time.monotonic()
        self._draw.show(_grids(tokens, self._plan))
        self._draw.progress(self._done, self._total)
        steps, seconds = self._done - self._reported, max(now - self._time, 1e-6)
        # The next report is one interval away at the pace measured, but never a leap.
        stride = max(1, min(2 * steps, int(steps * REPORT_SECONDS / seconds)))
        self._due = min(self._done + stride, self._total)
        self._reported, self._time = self._done, now
