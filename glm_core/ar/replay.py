"""Running steps as they come, or recorded once and replayed."""

from collections.abc import Callable, Hashable
from typing import Protocol

from .graphs import CaptureError, Step
from .model import ARModel
from .step import StepBuffers, StepShape


class Recorder(Protocol):
    """Records steps, and runs them again; `graphs.CudaGraphs` is one."""

    def warm_up(self, step: Step) -> None:
        """Run a step in the way that a recording of it needs."""

    def record(self, work: Hashable, step: Step) -> None:
        """Record a step, which may run it.

        Raises:
            CaptureError: the device refuses.
        """

    def replay(self, work: Hashable) -> bool:
        """Run a recording; False if there is none, or it was dropped for another recorder's."""

    def drop(self) -> None:
        """Free all recordings."""


class Runner(Protocol):
    """Holds a run's buffers and runs its steps."""

    def buffers(self, model: ARModel, shape: StepShape) -> StepBuffers:
        """Buffers of that shape; an earlier run may have used them, but left no NaN."""

    def run(self, step: Step, work: Hashable) -> None:
        """Run a step over the buffers given last; steps of equal `work` do the same."""

    def forget(self) -> None:
        """Free what is kept of the steps that were run; the buffers stay."""


class EagerRunner:
    """Allocates buffers for each run, and runs steps as they come."""

    def buffers(self, model: ARModel, shape: StepShape) -> StepBuffers:
        return StepBuffers.allocate(model, shape)

    def run(self, step: Step, work: Hashable) -> None:
        step()

    def forget(self) -> None:
        pass


class ReplayRunner:
    """Records a step once for each kind of work and replays it, also for later prompts.

    A recording holds addresses. It is dropped when the shape, the options or the address of any
    weight is another than when it was made.
    """

    def __init__(self, new_recorder: Callable[[], Recorder]) -> None:
        """new_recorder: called before the first recording, and anew after each `drop`."""
        self._new_recorder = new_recorder
        self._recorder: Recorder | None = None
        self.drop()

    def drop(self) -> None:
        """Free the buffers and all recordings."""
        self._made_for: tuple | None = None
        self._buffers: StepBuffers | None = None
        self._refused = False
        self.forget()

    def forget(self) -> None:
        if self._recorder is not None:
            self._recorder.drop()
        self._recorder = None
        self._warmed_up: set[Hashable] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of the KV cache that is allocated; the other buffers are small beside it."""
        return 0 if self._buffers is None else self._buffers.cache.nbytes

    def buffers(self, model: ARModel, shape: StepShape) -> StepBuffers:
        made_for = shape, tuple(weight.data_ptr() for weight in model.parameters())
        if self._buffers is None or made_for != self._made_for:
            self.drop()
            self._buffers, self._made_for = StepBuffers.allocate(model, shape), made_for
        return self._buffers

    def run(self, step: Step, work: Hashable) -> None:
        if self._refused:
            step()
            return
        self._recorder = self._recorder or self._new_recorder()
        if self._recorder.replay(work):
            return
        if work not in self._warmed_up:
            self._recorder.warm_up(step)
            self._warmed_up.add(work)
            return
        self._record(step, work)

    def _record(self, step: Step, work: Hashable) -> None:
        """Record a step and run it, or run it alone where the device refuses to record it.

        Any error drops all recordings: they address memory that the failed one may have freed. A
        run that goes on has its own reference to the buffers.
        """
        try:
            self._recorder.record(work, step)
        except CaptureError:
            self.drop()
            self._refused = True
            step()
            return
        except BaseException:
            self.drop()
            raise
        self._recorder.replay(work)
