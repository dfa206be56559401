"""Times of two pieces of work in turn, peak memory, and the machine's own limits."""

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
    """Our figure and the reference's; `ratio` says how many times better ours is.

    `floor` is the best that the machine allows for ours, in `unit`; None if it is unknown.
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
        """A row with the median times of our run and the reference's, run in turn.

        Args:
            unit: ms (for one unit of `work`), or tokens/s.
            floor_seconds: the least time for all of `work`.
            work: units of work that one run does.
            reference_work: units that the reference's run does; None if as many.
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
        """Median seconds of each run, after one round that is not counted."""
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
        """A row with the peak memory of each run beyond what was allocated before it."""
        mine, theirs = self.peak(ours), (self.peak(reference) if reference else None)
        ratio = theirs / mine if theirs is not None and mine else None
        return Row(self.preset, f"{stage}, peak memory", mine, theirs, ratio, "MiB", None)

    def peak(self, work: Work) -> float:
        """MiB that `work` allocates at its peak, beyond what was allocated before."""
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
        """Bytes a second, measured on a sum."""
        data = torch.ones(nbytes // 4, device=self.device)
        (seconds,) = self.alternate(data.sum, rounds=5)
        return nbytes / seconds

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """FLOP a second, measured on a product of large square matrices."""
        side = 1024 if self.on_cpu else 8192
        a = torch.ones(side, side, device=self.device, dtype=dtype)
        (seconds,) = self.alternate(lambda: a @ a, rounds=5)
        return 2 * side**3 / seconds


def _peak_of_process(work: Work) -> int:
    """Bytes by which the process's peak exceeds its size before `work` (Linux).

    The allocator first returns its free memory; otherwise `work` would reuse it and seem free.
    """
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")  # resets the peak, VmHWM
    before = _status("VmRSS")
    work()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
