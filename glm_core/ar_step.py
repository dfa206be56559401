"""One token for every sample, as a step whose shapes and addresses never change.

What moves from step to step (which cell, at which position, with which noise) is in buffers on the
device, so the same step can be recorded once, as a CUDA graph, and replayed for a whole image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .ar_model import ARModel
from .kv_cache import StepPass, step_mask
from .logits import SamplingOptions, draw_token


@dataclass(frozen=True)
class StepShape:
    """All that a step depends on beside the weights and what its buffers hold.

    Args:
        cells: of all grids together.
        columns: of the widest grid.
        length: positions that the cache has room for, a multiple of `kv_cache.SPAN`.
        dtype: what to compute in.
    """

    batch: int
    cells: int
    columns: int
    length: int
    options: SamplingOptions
    device: torch.device
    dtype: torch.dtype


class StepBuffers:
    """A run's state on the device.

    tokens: int64 [B, cells], in the order in which they are written.
    rope: [2, length, head_dim], see `ar_model.rope_table`.
    noise: float32 [B, columns, codebook] of the row being written; None where greedy.
    """

    def __init__(self, model: ARModel, shape: StepShape) -> None:
        config = model.config
        place = {"device": shape.device, "dtype": shape.dtype}
        self.shape = shape
        self.cache = model.new_cache(shape.batch, shape.length, **place)
        self.tokens = torch.zeros(shape.batch, shape.cells, dtype=torch.int64, device=shape.device)
        self.rope = torch.zeros(2, shape.length, config.head_dim, **place)
        self.noise = (
            torch.zeros(shape.batch, shape.columns, config.codebook, device=shape.device)
            if shape.options.temperature
            else None
        )
        # The cell to write, its column, and the position of the id before it: int64 [1] each.
        self.cell, self.column, self.position = torch.zeros(
            3, 1, dtype=torch.int64, device=shape.device
        )

    def aim(self, cell: int, column: int, position: int) -> None:
        """Set what the next `step` writes; three fills, which wait for nothing."""
        self.cell.fill_(cell)
        self.column.fill_(column)
        self.position.fill_(position)

    def step(self, model: ARModel, span: int) -> None:
        """Read the id at `position`, and draw the token of `cell`.

        It reads and writes buffers alone, so it may be run again, and asks the device nothing.

        Args:
            span: how many positions of the cache to attend to; more than `position`.
        """
        ids = self.tokens.index_select(1, self.cell - 1)
        rope = self.rope.index_select(1, self.position)
        mask = step_mask(self.position, span, self.shape.dtype)
        reading = StepPass(self.cache, self.position, mask)
        self.draw(model(ids, rope, reading, self.shape.dtype))

    def draw(self, logits: Tensor) -> None:
        """Draw the token of `cell` from its logits [B, 1, codebook]."""
        noise = None if self.noise is None else self.noise.index_select(1, self.column)
        self.tokens.index_copy_(1, self.cell, draw_token(logits, noise, self.shape.options))


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

    def __init__(self, record: Recorder) -> None:
        self._record = record
        self.drop()

    def drop(self) -> None:
        """Let go of the buffers and of all that was recorded."""
        self._made_for: tuple | None = None
        self._buffers: StepBuffers | None = None
        self._seen: set[int] = set()
        self._recorded: dict[int, Callable[[], None]] = {}

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
            self._recorded[span] = self._record(step)
        self._recorded[span]()
