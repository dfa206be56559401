"""Streams and events of a device, simulated: which work is ordered before which.

Operations run at once, and every access to a storage is noted with the stream that it was queued
on and what that stream had waited for. Two accesses of which one writes must be ordered.
"""

from collections import Counter, defaultdict
from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Event:
    def __init__(self, seen: Counter) -> None:
        self.seen = seen
        self.synchronized = False

    def synchronize(self) -> None:
        self.synchronized = True


class Stream:
    """`seen` counts, for each stream, the operations that are done before this one's next."""

    def __init__(self, device: "Device") -> None:
        self.device = device
        self.seen: Counter = Counter()

    def record_event(self) -> Event:
        self.device.events.append(Event(self.seen.copy()))
        return self.device.events[-1]

    def wait_event(self, event: Event) -> None:
        self.seen |= event.seen  # the larger of both counts

    @contextmanager
    def as_context(self, stream: "Stream"):
        before, self.device.current = self.device.current, stream
        yield
        self.device.current = before


class Device(TorchDispatchMode):
    """Notes every access while it is active; `races` are pairs that nothing orders."""

    def __init__(self) -> None:
        super().__init__()
        self.computing, self.copying = Stream(self), Stream(self)
        self.current = self.computing
        self.events: list[Event] = []
        self.races: list[str] = []
        self._accesses = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        stream = self.current
        stream.seen[stream] += 1
        written = {
            id(value)
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        for tensor in tree_leaves((args, kwargs or {})):
            if hasattr(tensor, "untyped_storage"):
                self._note(func, tensor.untyped_storage(), stream, id(tensor) in written)
        return out

    def _note(self, func, storage, stream: Stream, writes: bool) -> None:
        accesses = self._accesses[storage._cdata]
        for other, number, wrote, name, _ in accesses:
            if (writes or wrote) and stream.seen[other] < number:
                self.races.append(f"{name} and {func._schema.name}")
        # The storage is held, so that no other one has its address.
        accesses.append((stream, stream.seen[stream], writes, func._schema.name, storage))
