"""What a sampling run is told by its host: how to draw, where to compute, and whom to notify."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError
from .choice import Chooser, plainly
from .replay import EagerRunner, Runner
from .step import SamplingOptions


@dataclass(frozen=True)
class SamplingRun:
    """
    Args:
        seeds: one for each sample, see `philox.batch_seeds`.
        device, dtype: where and in what to compute.
        lookahead: cells that one step of the model may write, all but the first only if they were
            guessed right, see `lookahead.py`. 1 writes one a step. The tokens are the same.
        runner: runs the steps.
        choose: gives the operations that the steps run with, see `choice.py`.
        progress: called with (cells drawn, cells to draw), at most every 100 ms and at the end. A
            cell counts if it is drawn in any sample.
        show: called before each progress with the grids so far, int64 [B, rows, columns] on the
            CPU; cells that are not known yet are `UNKNOWN`.
        check_interrupt: called before every pass of the model; raises to stop.
        gone: gives the samples that nobody waits for any more. It is called before each row of a
            grid; from there on no pass of the model is for these samples.
        finished: called with a sample that is not gone and its grids, int64 [rows, columns] on the
            CPU, after the row of a grid in which its last cell was drawn.
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
    gone: Callable[[], Collection[int]] = tuple
    finished: Callable[[int, list[Tensor]], None] = lambda sample, grids: None

    def __post_init__(self) -> None:
        if self.lookahead < 1:
            raise InputError(f"lookahead is {self.lookahead}: use 1 (off) or more.")

    @property
    def batch_size(self) -> int:
        return len(self.seeds)
