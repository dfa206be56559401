"""Rows of the report: said by a part as it measures, printed and written by the runner."""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

MARK = "ROW\t"
"""Begins a line that is for the runner; other lines go into the log."""
WARM_UP = 2
SECONDS = 2.0
"""A row takes no more runs than these allow."""


@dataclass(frozen=True)
class Report:
    """What a part says of itself."""

    part: str
    device: torch.device

    def row(
        self, name: str, value: float | str, unit: str = "", beside: float | None = None
    ) -> None:
        """beside: what is measured beside it, in the same unit, as the name says."""
        self._say(name, value, unit, beside, None)

    def require(self, name: str, fulfilled: bool, found: str = "") -> None:
        """A row that says whether something holds, and what was found."""
        why = None if fulfilled else f"does not hold: {found}"
        self._say(name, f"holds {found}".strip() if fulfilled else None, "", None, why)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Goes on after a failure in the block, with its traceback in the report."""
        try:
            yield
        except Exception:
            self._say(name, None, "", None, traceback.format_exc())

    def milliseconds(
        self, name: str, work: Callable[[], object], times: int, beside: float | None = None
    ) -> float:
        """A row with the mean time of some runs after a warm-up, fewer if they take long.

        On a CPU, whose figures mean nothing, it is one run.
        """
        if self.device.type == "cpu":
            mean = 1000 * self._seconds(work, 1)
        else:
            for _ in range(WARM_UP):
                work()
            once = self._seconds(work, 1)
            mean = 1000 * self._seconds(work, max(1, min(times, int(SECONDS / once))))
        self.row(name, mean, "ms", beside)
        return mean

    def _seconds(self, work: Callable[[], object], times: int) -> float:
        """The mean of so many runs, on a GPU between events of the device."""
        if self.device.type == "cpu":
            since = time.perf_counter()
            for _ in range(times):
                work()
            return (time.perf_counter() - since) / times
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / times

    def _say(self, name: str, value, unit: str, beside, failed: str | None) -> None:
        say({"part": self.part, "name": name, "value": value, "unit": unit, "beside": beside,
             "failed": failed})  # fmt: skip


def say(found: dict) -> None:
    print(f"{MARK}{json.dumps(found)}", flush=True)


def heading(machine: dict[str, str]) -> str:
    names = ", ".join(f"{name} {value}".strip() for name, value in machine.items())
    return f"{names}\n\n| part | | value | beside |\n|---|---|---|---|"


def table_line(row: dict) -> str:
    def show(value) -> str:
        if value is None:
            return ""
        return value if isinstance(value, str) else f"{value:.4g} {row['unit']}".strip()

    failed = row["failed"]
    value = f"FAILED: {failed.strip().splitlines()[-1]}" if failed else show(row["value"])
    return f"| {row['part']} | {row['name']} | {value} | {show(row['beside'])} |"


def table(report: dict) -> str:
    """The report as Markdown, with the tracebacks after the rows."""
    lines = [heading(report["machine"]), *map(table_line, report["rows"])]
    for row in report["rows"]:
        if row["failed"]:
            lines += ["", f"{row['part']}, {row['name']}:", "", "```", row["failed"].strip(), "```"]
    return "\n".join(lines) + "\n"
