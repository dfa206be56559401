"""Writing tokens one after the other: prefill, step and draw, over buffers allocated once.

A step reads the id before its cell, attends to the cache, draws, and writes the token. Which cell,
at which position and with which noise are numbers in buffers on the device. So every step has the
same shapes and addresses and waits for nothing: it can be recorded once and replayed, see
`replay.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..fallbacks import index_copy_
from .cache import BlockPass, KVCache, StepPass, step_mask
from .lookahead import count_final
from .model import ARModel
from .operations import PLAIN, Operations
from .philox import gumbel

MIN_TEMPERATURE = 1e-30  # logits divided by less overflow float32


@dataclass(frozen=True)
class SamplingOptions:
    """The checkpoint's defaults; temperature 0 takes the likeliest token, top_k 0 keeps all."""

    temperature: float = 0.9
    top_p: float = 0.75
    top_k: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or self.temperature >= MIN_TEMPERATURE):
            raise InputError(
                f"temperature is {self.temperature}: use 0 (greedy), or {MIN_TEMPERATURE} or more."
            )
        if not 0 <= self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: use a value between 0 and 1.")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}: use 0 (off) or more.")


@dataclass(frozen=True)
class StepShape:
    """The sizes, options, device and dtype of a step; a recording holds for one of these.

    Args:
        cells: of all grids together.
        columns: of the widest grid.
        length: positions that the cache has room for, a multiple of `cache.SPAN`.
        dtype: what to compute in.
        width: cells that a step draws; all but the first are drawn after guesses, see
            `lookahead.py`.
        padded: whether samples have prompts and forced cells of their own, see `StepBuffers.first`
            and `StepBuffers.drawn`.
    """

    batch: int
    cells: int
    columns: int
    length: int
    options: SamplingOptions
    device: torch.device
    dtype: torch.dtype
    width: int = 1
    padded: bool = False


@dataclass(frozen=True, eq=False)
class StepBuffers:
    """The state of a sampling run, on the device.

    `tokens` and `noise` are padded, so that a step of several cells may reach beyond the last one.

    tokens: int64 [B, cells + width - 1], in the order in which they are written. Cells of the row
        being written that are not final hold guesses.
    rope: [1, 2, length, head_dim], see `model.rope_table`; if padded, one for each sample,
        [B, 2, length, head_dim].
    first: int64 [B], where each sample's prompt begins in the cache: prompts of several lengths end
        at the same position, and no sample sees the positions before its own. None if not padded:
        the prompt begins at 0.
    drawn: bool [B], the samples that a pass is for; the others keep their tokens. None if not
        padded: all.
    noise: float32 [B, columns + width - 1, codebook], of the row being written; None if greedy.
    cell, column, position: int64 [width], of the cells to draw; `position` is that of the id
        before each.
    remaining: int64 [], how many cells from the first on may be written.
    final: int64 [], how many of the cells that the last step drew are final in every sample.
    """

    shape: StepShape
    cache: KVCache
    tokens: Tensor
    rope: Tensor
    noise: Tensor | None
    cell: Tensor
    column: Tensor
    position: Tensor
    remaining: Tensor
    final: Tensor
    offsets: Tensor  # 0, 1, ... width - 1
    first: Tensor | None
    drawn: Tensor | None

    @classmethod
    def allocate(cls, model: ARModel, shape: StepShape) -> "StepBuffers":
        config, padding = model.config, shape.width - 1
        floats = {"device": shape.device, "dtype": shape.dtype}
        integers = {"device": shape.device, "dtype": torch.int64}
        noise = (shape.batch, shape.columns + padding, config.codebook)
        return cls(
            shape,
            cache=model.new_cache(shape.batch, shape.length, **floats),
            tokens=torch.zeros(shape.batch, shape.cells + padding, **integers),
            rope=torch.zeros(
                shape.batch if shape.padded else 1, 2, shape.length, config.head_dim, **floats
            ),
            noise=torch.zeros(noise, device=shape.device) if shape.options.temperature else None,
            cell=torch.zeros(shape.width, **integers),
            column=torch.zeros(shape.width, **integers),
            position=torch.zeros(shape.width, **integers),
            remaining=torch.zeros((), **integers),
            final=torch.ones((), **integers),
            offsets=torch.arange(shape.width, **integers),
            first=torch.zeros(shape.batch, **integers) if shape.padded else None,
            drawn=(
                torch.ones(shape.batch, device=shape.device, dtype=torch.bool)
                if shape.padded
                else None
            ),
        )


# ---- prefill -----------------------------------------------------------------------------------


def prefill(
    model: ARModel, ids: Tensor, buffers: StepBuffers, rows: Sequence[int], end: int
) -> Tensor:
    """Read a prompt once for all samples that have it.

    It is read alone, so what it gives does not depend on the other samples.

    Args:
        ids: int64 [1, L].
        rows: the samples.
        end: the position of the first cell, which the prompt ends before.

    Returns:
        Logits [1, 1, codebook] of the first cell.
    """
    shape, length = buffers.shape, ids.shape[1]
    start = end - length
    cache = model.new_cache(1, length, shape.device, shape.dtype)
    rope = buffers.rope[rows[0] if shape.padded else 0, :, start:end]
    logits = model(ids, rope, BlockPass(cache, 0), shape.dtype)
    buffers.cache.copy_prefix(cache, length, rows, start)
    return logits


def read_cells(
    model: ARModel, buffers: StepBuffers, cells: range, start: int, samples: Tensor | None = None
) -> Tensor:
    """Read cells that are written already, in one pass.

    Args:
        cells: those that the cache does not hold yet.
        start: the position of the first of them.
        samples: int64, those whose keys and values are written; None for all.

    Returns:
        Logits [B, 1, codebook] of the cell after them.
    """
    ids = buffers.tokens[:, cells.start : cells.stop]
    rope = buffers.rope[:, :, start : start + len(cells)]
    block = BlockPass(buffers.cache, start, buffers.first, samples)
    return model(ids, rope, block, buffers.shape.dtype)


# ---- step --------------------------------------------------------------------------------------


def set_target(buffers: StepBuffers, cell: int, column: int, position: int, remaining: int) -> None:
    """Set what the next step draws; waits for nothing.

    Args:
        cell, column, position: of the first cell; `position` is that of the id before it.
        remaining: cells from the first on that are to be written; those after keep their tokens.
    """
    torch.add(buffers.offsets, cell, out=buffers.cell)
    torch.add(buffers.offsets, column, out=buffers.column)
    torch.add(buffers.offsets, position, out=buffers.position)
    buffers.remaining.fill_(remaining)


def step(model: ARModel, buffers: StepBuffers, span: int, operations: Operations = PLAIN) -> None:
    """Write the target cells: one, or as many as were guessed right.

    Args:
        span: how many positions of the cache to attend to; more than the last position.
        operations: those of the blocks, see `choice.py`.
    """
    decode = decode_one_token if buffers.shape.width == 1 else decode_ahead
    decode(model, buffers, span, operations)


def decode_one_token(
    model: ARModel, buffers: StepBuffers, span: int, operations: Operations
) -> None:
    """Read the id before the target cell, draw the cell's token, and write it."""
    logits = next_logits(model, buffers, span, operations)
    draw_and_write(buffers, logits)


def decode_ahead(model: ARModel, buffers: StepBuffers, span: int, operations: Operations) -> None:
    """`decode_one_token` for several cells, each drawn after the guesses before it.

    Draws that are not final are written too: they are the next guesses.
    """
    logits = next_logits(model, buffers, span, operations)
    drawn = draw(buffers, logits, buffers.column)
    guesses = buffers.tokens.index_select(1, buffers.cell)
    drawn = _of_drawn(buffers, drawn, buffers.cell)
    buffers.final.copy_(torch.minimum(count_final(drawn, guesses), buffers.remaining))
    tokens = torch.where(buffers.offsets < buffers.remaining, drawn, guesses)
    index_copy_(buffers.tokens, 1, buffers.cell, tokens)


def next_logits(
    model: ARModel, buffers: StepBuffers, span: int, operations: Operations = PLAIN
) -> Tensor:
    """Logits [B, width, codebook] of the target cells, given the ids before them."""
    shape, config = buffers.shape, model.config
    ids = buffers.tokens.index_select(1, buffers.cell - 1)
    rope = buffers.rope.index_select(2, buffers.position)
    sharing = config.heads // config.kv_heads
    mask = step_mask(buffers.position, sharing, span, shape.dtype, buffers.first)
    attention = StepPass(buffers.cache, buffers.position, mask, operations, buffers.first)
    return model(ids, rope, attention, shape.dtype, shape.width)


# ---- draw --------------------------------------------------------------------------------------


def set_noise(
    buffers: StepBuffers, keys: Tensor, grid: int, row: int, columns: int, codebook: int
) -> None:
    """Fill in the Gumbel noise of a row, one sample at a time, which bounds the memory.

    Args:
        keys: int64 [B, 2], see `philox.sample_keys`.
        grid: the grid's number in the random address.
    """
    if buffers.noise is None:
        return
    numbers = torch.arange(columns, device=keys.device)
    for noise, key in zip(buffers.noise, keys, strict=True):
        noise[:columns] = gumbel(key[None], grid, row, numbers, codebook)[0]


def draw_and_write(buffers: StepBuffers, logits: Tensor) -> None:
    """Draw the first target cell from its logits [B, 1, codebook], and write it."""
    cell = buffers.cell[:1]
    token = draw(buffers, logits, buffers.column[:1])
    index_copy_(buffers.tokens, 1, cell, _of_drawn(buffers, token, cell))


def _of_drawn(buffers: StepBuffers, tokens: Tensor, cells: Tensor) -> Tensor:
    """Tokens [B, W] for the samples that the pass is for; the others keep those in the cells.

    What they keep counts as guessed right, so they hold up no sample.
    """
    if buffers.drawn is None:
        return tokens
    return torch.where(buffers.drawn[:, None], tokens, buffers.tokens.index_select(1, cells))


def draw(buffers: StepBuffers, logits: Tensor, columns: Tensor) -> Tensor:
    """Tokens int64 [B, W] from the logits [B, W, codebook] of cells in these columns."""
    noise = None if buffers.noise is None else buffers.noise.index_select(1, columns)
    return gumbel_max(logits, noise, buffers.shape.options)


def gumbel_max(logits: Tensor, noise: Tensor | None, options: SamplingOptions) -> Tensor:
    """Ids int64 [...] drawn from logits with noise, both [..., n]; the likeliest without noise."""
    if noise is None:
        return logits.argmax(dim=-1)
    return (filter_logits(logits, options) + noise).argmax(dim=-1)


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Temperature, then top-k, then top-p, as transformers' logits warpers: float32 [..., n].

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
