"""Timing in turn, peak memory, and what the machine itself can do: copies and matrix products."""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

Work = Callable[[], object]
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Row:
    """A figure beside its reference's. `ratio` says how many times better ours is.

    `floor` is the least that the machine allows for ours, in `unit`, where that can be said.
    """

    preset: str
    stage: str
    ours: float
    reference: float | None
    ratio: float | None
    unit: str
    floor: float | None

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Bench:
    """Where to measure, and how often."""

    preset: str
    device: torch.device
    rounds: int

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def row(
        self,
        stage: str,
        ours: Work,
        reference: Work | None = None,
        *,
        unit: str = "ms",
        floor_seconds: float | None = None,
        work: float = 1.0,
        reference_work: float | None = None,
        rounds: int | None = None,
    ) -> Row:
        """Median times of two pieces of work, run in turn.

        Args:
            unit: ms (a piece of `work`), or tokens/s.
            floor_seconds: for all of the work.
            work: how many pieces one run does.
            reference_work: how many the reference's run does, where it is not as many.
        """
        runs = [run for run in (ours, reference) if run is not None]
        seconds = self.alternate(*runs, rounds=rounds)
        mine, theirs = seconds[0], None
        if reference is not None:
            theirs = seconds[1] * work / (reference_work or work)
        rate = unit != "ms"

        def show(value: float | None) -> float | None:
            if value is None:
                return None
            return work / value if rate else 1000 * value / work

        return Row(
            self.preset, stage, show(mine), show(theirs), theirs and theirs / mine, unit,
            show(floor_seconds),
        )  # fmt: skip

    def alternate(self, *runs: Work, rounds: int | None = None) -> list[float]:
        """Median seconds of each, after one run of each that is not counted."""
        seconds: list[list[float]] = [[] for _ in runs]
        for round_ in range((rounds or self.rounds) + 1):
            for run, times in zip(runs, seconds, strict=True):
                self.wait()
                since = time.perf_counter()
                run()
                self.wait()
                if round_:
                    times.append(time.perf_counter() - since)
        return [statistics.median(times) for times in seconds]

    def memory(self, stage: str, ours: Work, reference: Work | None = None) -> Row:
        """Peak memory of each beyond what is held before it, weights not counted."""
        mine, theirs = self.peak(ours), (self.peak(reference) if reference else None)
        ratio = theirs / mine if theirs is not None and mine else None
        return Row(self.preset, f"{stage}, peak memory", mine, theirs, ratio, "MiB", None)

    def peak(self, work: Work) -> float:
        """MiB."""
        if self.on_cpu:
            return _peak_of_process(work) / 2**20
        self.wait()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        work()
        self.wait()
        return (torch.accelerator.max_memory_allocated() - before) / 2**20

    def wait(self) -> None:
        if not self.on_cpu:
            torch.accelerator.synchronize()

    def bandwidth(self, nbytes: int = 2**28) -> float:
        """Bytes a second that a sum reads."""
        data = torch.ones(nbytes // 4, device=self.device)
        (seconds,) = self.alternate(data.sum, rounds=5)
        return nbytes / seconds

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """FLOP a second of a product of large square matrices."""
        side = 1024 if self.on_cpu else 8192
        a = torch.ones(side, side, device=self.device, dtype=dtype)
        (seconds,) = self.alternate(lambda: a @ a, rounds=5)
        return 2 * side**3 / seconds


def _peak_of_process(work: Work) -> int:
    """Bytes by which the process grew; Linux resets its mark when told so.

    What the allocator holds in reserve is given back before, or nothing would seem to grow.
    """
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")
    before = _status("VmRSS")
    work()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    (line,) = (x for x in _STATUS.read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
