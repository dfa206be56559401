"""The next cells of every sample, as a step whose shapes and addresses never change.

What moves from step to step (which cells, at which positions, with which noise) is in buffers on
the device, so the same step can be recorded once, as a CUDA graph, and replayed for a whole image.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .cache import StepPass, step_mask
from .logits import SamplingOptions, draw_token
from .lookahead import accepted
from .model import ARModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepShape:
    """All that a step depends on beside the weights and what its buffers hold.

    Args:
        cells: of all grids together.
        columns: of the widest grid.
        length: positions that the cache has room for, a multiple of `kv_cache.SPAN`; the step that
            writes the last cell reaches `width - 1` beyond it.
        dtype: what to compute in.
        width: cells that a step draws, all but the first after guesses, see `lookahead.py`.
    """

    batch: int
    cells: int
    columns: int
    length: int
    options: SamplingOptions
    device: torch.device
    dtype: torch.dtype
    width: int = 1


class StepBuffers:
    """A run's state on the device.

    What a step of several cells reaches beyond the last cell or column is there and never read.

    tokens: int64 [B, cells + width - 1], in the order in which they are written; cells of the row
        being written that are not final hold guesses.
    rope: [2, length, head_dim], see `ar_model.rope_table`.
    noise: float32 [B, columns + width - 1, codebook] of the row being written; None where greedy.
    final: int64 [], of the cells that the last step drew, how many are final in every sample.
    """

    def __init__(self, model: ARModel, shape: StepShape) -> None:
        config, beyond = model.config, shape.width - 1
        place = {"device": shape.device, "dtype": shape.dtype}
        whole = {"device": shape.device, "dtype": torch.int64}
        self.shape = shape
        self.cache = model.new_cache(shape.batch, shape.length, **place)
        self.tokens = torch.zeros(shape.batch, shape.cells + beyond, **whole)
        self.rope = torch.zeros(2, shape.length, config.head_dim, **place)
        self.noise = (
            torch.zeros(shape.batch, shape.columns + beyond, config.codebook, device=shape.device)
            if shape.options.temperature
            else None
        )
        # The cells to draw, their columns, and the positions of the ids before them.
        self.cell, self.column, self.position = torch.zeros(3, shape.width, **whole)
        self.left = torch.zeros((), **whole)  # cells from the first on that may be written
        self.final = torch.ones((), **whole)
        self._ahead = torch.arange(shape.width, **whole)

    def aim(self, cell: int, column: int, position: int, left: int) -> None:
        """Set what the next `step` draws; wait for nothing.

        Args:
            cell, column, position: of the first cell; `position` is that of the id before it.
            left: cells from there on that are to be written; those after them keep their tokens.
        """
        torch.add(self._ahead, cell, out=self.cell)
        torch.add(self._ahead, column, out=self.column)
        torch.add(self._ahead, position, out=self.position)
        self.left.fill_(left)

    def step(self, model: ARModel, span: int) -> None:
        """Read the ids at `position`, and draw the tokens of `cell`.

        It reads and writes buffers alone, so it may be run again, and asks the device nothing.

        Args:
            span: how many positions of the cache to attend to; more than the last `position`.
        """
        ids = self.tokens.index_select(1, self.cell - 1)
        rope = self.rope.index_select(1, self.position)
        sharing = model.config.heads // model.config.kv_heads
        mask = step_mask(self.position, sharing, span, self.shape.dtype)
        reading = StepPass(self.cache, self.position, mask)
        logits = model(ids, rope, reading, self.shape.dtype, self.shape.width)
        if self.shape.width == 1:
            self.draw(logits)
        else:
            self._draw_ahead(logits)

    def draw(self, logits: Tensor) -> None:
        """Draw the token of the first cell from its logits [B, 1, codebook]."""
        drawn = self._drawn(logits, self.column[:1])
        self.tokens.index_copy_(1, self.cell[:1], drawn)

    def _draw_ahead(self, logits: Tensor) -> None:
        """Draw all cells, each given the guesses before it: what is not final is the next guess."""
        drawn = self._drawn(logits, self.column)
        guesses = self.tokens.index_select(1, self.cell)
        self.final.copy_(torch.minimum(accepted(drawn, guesses), self.left))
        kept = torch.where(self._ahead < self.left, drawn, guesses)
        self.tokens.index_copy_(1, self.cell, kept)

    def _drawn(self, logits: Tensor, columns: Tensor) -> Tensor:
        noise = None if self.noise is None else self.noise.index_select(1, columns)
        return draw_token(logits, noise, self.shape.options)


class Runner(Protocol):
    """Who holds a run's buffers and runs its steps. A host's may replay what it has recorded."""

    def buffers(self, model: ARModel, shape: StepShape) -> StepBuffers:
        """Buffers of that shape; an earlier run may have used them, but left no NaN."""

    def run(self, step: Callable[[], None], span: int) -> None:
        """Run a step of the buffers given last; steps of the same span are the same work."""


class EagerRunner:
    """Buffers made anew for each run, steps run as they come."""

    def buffers(self, model: ARModel, shape: StepShape) -> StepBuffers:
        return StepBuffers(model, shape)

    def run(self, step: Callable[[], None], span: int) -> None:
        step()


Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a step, does its work or not, and gives a function that does it again."""


class ReplayRunner:
    """Records a step once for each span and replays it, also for later prompts of that shape.

    What is recorded holds addresses, so it is dropped when the shape, the options or the place of
    any weight is another than when it was made.
    """

    def __init__(self, new_recorder: Callable[[], Recorder]) -> None:
        """new_recorder: called anew after each `drop`, before the first recording."""
        self._new_recorder = new_recorder
        self.drop()

    def drop(self) -> None:
        """Let go of the buffers and of all that was recorded."""
        self._made_for: tuple | None = None
        self._buffers: StepBuffers | None = None
        self._seen: set[int] = set()
        self._record: Recorder | None = None
        self._recorded: dict[int, Callable[[], None]] = {}

    @property
    def nbytes(self) -> int:
        """Of the cache that is held, beside which the other buffers are small."""
        return 0 if self._buffers is None else self._buffers.cache.nbytes

    def buffers(self, model: ARModel, shape: StepShape) -> StepBuffers:
        made_for = shape, tuple(weight.data_ptr() for weight in model.parameters())
        if self._buffers is None or made_for != self._made_for:
            self.drop()
            self._buffers, self._made_for = StepBuffers(model, shape), made_for
        return self._buffers

    def run(self, step: Callable[[], None], span: int) -> None:
        if span not in self._seen:  # the first one finds what a recording may not: kernels, room
            self._seen.add(span)
            step()
            return
        if span not in self._recorded:
            self._recorded[span] = self._recording(step)
        self._recorded[span]()

    def _recording(self, step: Callable[[], None]) -> Callable[[], None]:
        """What does the step again: the step itself where the device refuses to record it."""
        try:
            self._record = self._record or self._new_recorder()
            return self._record(step)
        except RuntimeError as error:
            log.warning("The AR model's steps run without graphs, slower: %s", error)
            self._record = _as_it_is  # until all is dropped: the next span would be refused too
            return step


def _as_it_is(step: Callable[[], None]) -> Callable[[], None]:
    return step
