"""The queue of a replica, and the thread in which its model writes samples together.

An entry of the queue has a key. Entries of equal keys share a run if they wait at the same time.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from glm_core.ar.requests import SampleRequest
from glm_core.data.tokens import UNKNOWN
from glm_core.errors import GLMImageError, LowMemoryError, is_out_of_memory

from .bounds import RefusalError

log = logging.getLogger(__name__)

JOIN_SECONDS = 0.05
"""For which the first of a run waits for others."""
REPORT_SECONDS = 0.25
LONGEST_RETRY = 60
FIRST_RUN_SECONDS = 5.0
"""What a run is taken to last before one has ended."""
MOST_FAILURES = 3
"""Runs in a row that fail for reasons unknown, before the engine calls itself broken."""


class AbandonedError(Exception):
    """Nobody waits for a run any more."""


@dataclass(frozen=True)
class Progress:
    """Of one sample: cells written, cells to write, and the grids so far, int64 [rows, columns]."""

    sample: int
    done: int
    total: int
    grids: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What came of one sample, or of a request without samples."""

    sample: int
    value: Any


@dataclass(frozen=True)
class Failure:
    """The end of a request."""

    error: Exception


Event = Progress | Result | Failure


class Order:
    """A request in the queue or in a run, as its client sees it."""

    def __init__(self, count: int, wake: Callable[[], None]) -> None:
        """
        Args:
            count: its results.
            wake: called, in the model's thread, when there is something to take.
        """
        self.gone = False  # the client has left, or has been told of a failure
        self._missing = count
        self._wake = wake
        self._lock = threading.Lock()
        self._progress: dict[int, Progress] = {}
        self._others: deque[Event] = deque()

    @property
    def finished(self) -> bool:
        """Whether all events have been taken and none will follow."""
        with self._lock:
            return not self._missing and not self._others

    def take(self) -> list[Event]:
        """The events since the last call. Of a sample's progress only the newest is kept."""
        with self._lock:
            events = [*self._progress.values(), *self._others]
            self._progress.clear()
            self._others.clear()
            return events

    def put(self, event: Event) -> None:
        with self._lock:
            if self.gone or not self._missing:
                return
            if isinstance(event, Progress):
                self._progress[event.sample] = event
            else:
                if isinstance(event, Failure):
                    self.gone, self._missing = True, 0
                else:
                    self._progress.pop(event.sample, None)
                    self._missing -= 1
                self._others.append(event)
        self._wake()

    def leave(self) -> None:
        with self._lock:
            self.gone = True


class Watch:
    """How a piece of work notifies those who wait for it, and learns that nobody does."""

    def __init__(self, entries: Sequence["Entry"]) -> None:
        self._entries = entries
        self._answered: set[int] = set()
        self._grids: list[Tensor] = []
        self._due = 0.0

    def gone(self) -> list[int]:
        """The entries whose client has left."""
        return [row for row, entry in enumerate(self._entries) if entry.order.gone]

    def check_interrupt(self) -> None:
        if len(self._answered.union(self.gone())) == len(self._entries):
            raise AbandonedError

    def show(self, grids: list[Tensor]) -> None:
        self._grids = grids

    def progress(self, done: int, total: int) -> None:
        """The newest grids of every sample, and its own cells, at most every `REPORT_SECONDS`."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + REPORT_SECONDS
        for row, entry in enumerate(self._entries):
            if row in self._answered:
                continue
            own = [grid[row] for grid in self._grids]
            if entry.request is not None:
                done, total = _written(entry.request, own)
            entry.order.put(Progress(entry.sample, done, total, own))

    def finished(self, row: int, value: Any) -> None:
        """The result of an entry, which may come before the others'."""
        self._answered.add(row)
        self._entries[row].order.put(Result(self._entries[row].sample, value))


def _written(request: SampleRequest, grids: Sequence[Tensor]) -> tuple[int, int]:
    """How many cells of a sample are written, and how many are to be; forced ones are neither."""
    total = sum(grid.numel() for grid in grids) - request.forced
    return total - sum(int((grid == UNKNOWN).sum()) for grid in grids), total


class Model(Protocol):
    """What an engine needs of a model."""

    rows: int

    def key(self, request: SampleRequest) -> Hashable:
        """Requests of equal keys may share a run."""

    def write(self, requests: Sequence[SampleRequest], watch: Watch) -> None:
        """Write 1 to `rows` requests of one key in one run, and have the watch told of each."""


Work = Callable[[Watch], Any]
"""Something else that the model does, alone."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A sample in the queue, or other work, which has no request."""

    order: Order
    sample: int
    key: Hashable
    request: SampleRequest | None
    work: Work | None = None
    since: float = field(default_factory=time.monotonic)


class Engine:
    """A model in a thread of its own, and what waits for it."""

    def __init__(self, model: Model, queued: int) -> None:
        """queued: entries that may wait."""
        self._model = model
        self._limit = max(queued, model.rows)
        self._waiting: deque[Entry] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._run_seconds = FIRST_RUN_SECONDS
        self._running = 0
        self._failures = 0
        self._thread = threading.Thread(target=self._serve, daemon=True, name="model")
        self._thread.start()

    def submit(self, requests: Sequence[SampleRequest], wake: Callable[[], None]) -> Order:
        """Put samples into the queue, all or none. For `wake` see `Order`.

        Raises:
            GLMImageError: a prompt is empty.
            RefusalError: the queue is full, or the engine closes.
        """
        keys = [self._model.key(request) for request in requests]
        order = Order(len(requests), wake)
        self._put([Entry(order, i, keys[i], request) for i, request in enumerate(requests)])
        return order

    def submit_work(self, work: Work, wake: Callable[[], None]) -> Order:
        """Put other work into the queue; what it returns is the one result.

        Raises:
            RefusalError: as in `submit`.
        """
        order = Order(1, wake)
        self._put([Entry(order, 0, object(), None, work)])
        return order

    def leave(self, order: Order) -> None:
        """Nobody waits for an order any more: its entries leave the queue, and its run may stop."""
        order.leave()
        with self._changed:
            self._waiting = deque(entry for entry in self._waiting if entry.order is not order)

    @property
    def counts(self) -> tuple[int, int]:
        """Entries that wait, and entries in the run."""
        with self._changed:
            return len(self._waiting), self._running

    @property
    def is_healthy(self) -> bool:
        """False once the thread has died, or runs fail again and again as on a broken device."""
        return self._thread.is_alive() and self._failures < MOST_FAILURES

    def close(self) -> None:
        """Refuse what comes, and end the thread after the run that it is in."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for entry in waiting:
            entry.order.put(Failure(_stopping()))
        self._thread.join()

    def _put(self, entries: list[Entry]) -> None:
        with self._changed:
            if self._closed:
                raise _stopping()
            if len(self._waiting) + len(entries) > self._limit:
                raise RefusalError(
                    503,
                    f"{len(self._waiting)} samples are waiting here and {self._limit} may: ask "
                    f"again in {self._retry_seconds():.0f} s.",
                    self._retry_seconds(),
                )
            self._waiting.extend(entries)
            self._changed.notify_all()

    def _retry_seconds(self) -> float:
        """In which half of the queue will be done."""
        runs = 1 + len(self._waiting) / (2 * self._model.rows)
        return max(1.0, min(LONGEST_RETRY, runs * self._run_seconds))

    def _serve(self) -> None:
        torch.set_grad_enabled(False)
        while entries := self._next():
            since = time.monotonic()
            try:
                self._run(entries)
            except AbandonedError:
                pass
            except Exception as error:
                explained = _explained(error)
                self._failures += isinstance(explained, RefusalError)
                for entry in entries:
                    entry.order.put(Failure(explained))
            else:
                self._run_seconds, self._failures = time.monotonic() - since, 0
            with self._changed:
                self._running = 0

    def _next(self) -> list[Entry]:
        """Wait for the first in the queue, then for others of its key; none when closed."""
        with self._changed:
            while not self._closed:
                if not self._waiting:
                    self._changed.wait()
                    continue
                first = self._waiting[0]
                together = [entry for entry in self._waiting if entry.key == first.key]
                remaining = first.since + JOIN_SECONDS - time.monotonic()
                if len(together) >= self._model.rows or first.work or remaining <= 0:
                    return self._take(together[: self._model.rows])
                self._changed.wait(remaining)
        return []

    def _take(self, entries: list[Entry]) -> list[Entry]:
        taken = set(map(id, entries))
        self._waiting = deque(entry for entry in self._waiting if id(entry) not in taken)
        self._running = len(entries)
        return entries

    def _run(self, entries: list[Entry]) -> None:
        watch, (first, *_) = Watch(entries), entries
        if first.work is not None:
            watch.finished(0, first.work(watch))
        else:
            self._model.write([entry.request for entry in entries], watch)


def _stopping() -> RefusalError:
    return RefusalError(503, "This replica is stopping: ask again for another one.", 1)


def _explained(error: Exception) -> Exception:
    """An error as a sentence; the log has what no sentence can tell."""
    if isinstance(error, GLMImageError):
        return error
    if is_out_of_memory(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return LowMemoryError(
            "The service's AR model ran out of memory; use a smaller size, or start the service "
            "with fewer rows."
        )
    log.error("A run failed", exc_info=error)
    return RefusalError(500, "The service failed at this request; its log says more.")
