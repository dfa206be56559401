"""Choosing operations by a trial on the device, and remembering the choice.

A network does some of its work through functions that have alternatives. Every candidate must agree
with the plain function. Those that make the work faster are kept, one purpose after the other. A
machine takes the same path every time, because the choice is kept in a file, so the same seed gives
the same numbers in bf16 too. What a file remembers is run once before a process goes by it.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import InputError, is_out_of_memory

log = logging.getLogger(__name__)

Candidates = Mapping[str, Mapping[str, Callable]]
"""Functions by the field of a network's `Operations` that they are for, and by name."""
Names = Mapping[str, str]
"""Names of candidates by the field of `Operations`; fields that are not in it are plain."""

GAIN = 0.99  # of the time so far, at most: less is within the noise of a measurement
SECONDS = 3.0
"""No further candidate is begun after so many seconds of a trial, what Triton compiles included."""
REPEATS, REPEATED_SECONDS = 20, 0.2
"""Work is timed over so many runs, or those of so many seconds, at least three."""


class CandidateError(Exception):
    """A candidate does not run on this device."""


class Trial(Protocol):
    """Work of a network on which candidates are compared."""

    tolerance: float
    """The largest relative difference of results."""

    def results(self, operations: Any) -> Sequence[Tensor]:
        """What the work gives with these operations."""

    def milliseconds(self, operations: Any) -> float:
        """The time of the work, after what is done once, such as compiling."""


@dataclass(frozen=True)
class Outcome:
    """The fastest operations, their milliseconds, the plain ones', and what was not tried."""

    names: Names
    milliseconds: float
    plain: float
    untried: Sequence[str]


class Choice:
    """Tries candidates once for each key, and remembers."""

    def __init__(
        self,
        what: str,
        plain: Any,
        found: Candidates,
        path: Path | None = None,
        seconds: float = SECONDS,
    ) -> None:
        """
        Args:
            what: the subject of a sentence, for the log.
            plain: the `Operations` of the plain functions.
            path: the file that remembers; None remembers for this process alone.
            seconds: see `SECONDS`.
        """
        self.plain = plain
        self.found = found
        self.path = path
        self.known: dict[str, Names | None] = {}  # None: remembered, and fails in this process
        self._proven: set[str] = set()
        self._what = what
        self._seconds = seconds

    def key(self, device: torch.device, version: int, *depends_on: str) -> str:
        """What a choice is remembered by: the machine, what it depends on, and the candidates.

        Args:
            version: of the candidates' code.
        """
        return ", ".join(
            [*machine(device), *depends_on, f"kernels {version}: {candidate_names(self.found)}"]
        )

    def choose(
        self, key: str, trial: Trial, check_interrupt: Callable[[], None] = lambda: None
    ) -> Any:
        """What is remembered for a key and still holds, or else the outcome of a trial."""
        names = self._known_to_hold(key, trial)
        if names is None:
            names = self._unless_full(lambda: self._try(trial, key, check_interrupt))
        return operations_of(self.plain, names or {}, self.found)

    def recall(self, key: str, trial: Trial) -> Any:
        """What is remembered and still holds, or else the plain operations."""
        return operations_of(self.plain, self._known_to_hold(key, trial) or {}, self.found)

    def _known_to_hold(self, key: str, trial: Trial) -> Names | None:
        """What is remembered, if it runs in this process and agrees; None if there is nothing.

        A compiler may be gone, or its cache broken, since the file was written.
        """
        names = self._recalled(key)
        if names is None or key in self._proven:
            return names
        holds = self._unless_full(lambda: self._hold(names, trial))
        if holds:
            self._proven.add(key)
            return names
        if holds is False:
            self.known[key] = None
        return None

    def _hold(self, names: Names, trial: Trial) -> bool:
        return not names or self._agrees(trial, trial.results(self.plain), names)

    def _unless_full(self, work: Callable[[], Any]) -> Any:
        """What some work gives; None if the device is full, which says nothing of candidates."""
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.warning("%s stay plain for now: %s", self._what, str(error).splitlines()[0])
            return None

    def _recalled(self, key: str) -> Names | None:
        if key not in self.known:
            self.known = self._read() | self.known
        return self.known.get(key)

    def _try(self, trial: Trial, key: str, check_interrupt: Callable[[], None]) -> Names:
        """The names of a trial, which are kept."""
        outcome = self._fastest(trial, check_interrupt)
        log.info(
            "%s run with %s: %.2f ms, plain %.2f ms (%s)",
            self._what, described(outcome.names), outcome.milliseconds, outcome.plain, key,
        )  # fmt: skip
        self.known[key] = outcome.names
        self._proven.add(key)
        if outcome.untried:
            log.info(
                "%s were tried for %g s, which left out %s; the next start of the program tries "
                "again, since what is compiled is kept.",
                self._what, self._seconds, ", ".join(outcome.untried),
            )  # fmt: skip
        else:
            self._write(key, outcome.names)
        return outcome.names

    def _fastest(self, trial: Trial, check_interrupt: Callable[[], None]) -> Outcome:
        end = time.perf_counter() + self._seconds
        expected = trial.results(self.plain)
        names: dict[str, str] = {}
        plain = best = trial.milliseconds(self.plain)
        untried = []
        for field, name, _ in _each(self.found):
            check_interrupt()
            if time.perf_counter() >= end:
                untried.append(f"{field}={name}")
            elif self._agrees(trial, expected, {field: name}):
                changed = names | {field: name}
                took = trial.milliseconds(operations_of(self.plain, changed, self.found))
                if took <= GAIN * best:
                    names, best = changed, took
        return Outcome(names, best, plain, untried)

    def _agrees(self, trial: Trial, expected: Sequence[Tensor], names: Names) -> bool:
        """Whether candidates run, and the results are the plain ones'."""
        told = {field: _telling(self.found[field][name]) for field, name in names.items()}
        try:
            results = trial.results(replace(self.plain, **told))
        except CandidateError as error:
            log.info("%s run without %s: %s", self._what, described(names), error)
            return False
        differences = list(map(relative_difference, results, expected))
        if all(difference <= trial.tolerance for difference in differences):
            return True
        log.warning(
            "%s run without %s: results differ by %s",
            self._what, described(names), " ".join(map("{:.1e}".format, differences)),
        )  # fmt: skip
        return False

    def _read(self) -> dict[str, Names]:
        """What the file remembers; nothing if it is missing or is not ours."""
        try:
            stored = json.loads(self.path.read_text("utf-8")) if self.path else {}
        except (OSError, ValueError):
            return {}
        if not isinstance(stored, dict):
            return {}
        return {key: names for key, names in stored.items() if self._is_known(names)}

    def _is_known(self, names: Any) -> bool:
        return isinstance(names, dict) and all(
            isinstance(name, str) and name in self.found.get(field, {})
            for field, name in names.items()
        )

    def _write(self, key: str, names: Names) -> None:
        if self.path is None:
            return
        text = json.dumps(self._read() | {key: dict(names)}, indent=1)
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, "utf-8")
            part.replace(self.path)
        except OSError as error:
            log.warning("The choice for %s is not remembered: %s", self._what, error)


def operations_of(plain: Any, names: Names, found: Candidates) -> Any:
    """`plain` with candidates in place of some of its functions.

    Raises:
        InputError: there is no candidate of a name.
    """
    for field, name in names.items():
        if name not in found.get(field, {}):
            raise InputError(
                f"There is no {name!r} for {field!r} among the candidates; there are "
                + ", ".join(f"{f}={n}" for f, n, _ in _each(found))
                + "."
            )
    return replace(plain, **{field: found[field][name] for field, name in names.items()})


def described(names: Names) -> str:
    return " ".join(f"{field}={name}" for field, name in sorted(names.items())) or "plain"


def named(text: str) -> dict[str, str]:
    """The opposite of `described`: "attend=split gate=triton", or "plain"."""
    return {} if text == "plain" else dict(part.split("=") for part in text.split())


def relative_difference(ours: Tensor, expected: Tensor) -> float:
    """The norm of the difference by that of what was expected; NaN if ours has one."""
    ours, expected = ours.float(), expected.float()
    return float((ours - expected).norm() / expected.norm())


def mean_milliseconds(run: Callable[[int], object]) -> float:
    """Milliseconds of some work.

    Args:
        run: does the work so many times, and waits for the device.
    """

    def seconds(times: int) -> float:
        since = time.perf_counter()
        run(times)
        return time.perf_counter() - since

    run(2)  # the first warms up, the second may record
    times = int(REPEATED_SECONDS / max(seconds(1), 1e-6))
    times = max(3, min(REPEATS, times))
    return 1000 * seconds(times) / times


def machine(device: torch.device) -> list[str]:
    """The device's name, and the versions of what compiles and runs kernels on it."""
    backend = getattr(torch, device.type, None)
    name = getattr(backend, "get_device_name", None)
    driver = getattr(torch._C, "_cuda_getDriverVersion", None)
    return [
        name(device) if name else device.type,
        f"driver {driver() if driver and device.type == 'cuda' else None}",
        f"torch {torch.__version__}",
        f"triton {triton_version()}",
    ]


def triton_version() -> str | None:
    """None where Triton is missing, or was installed for another torch or Python, which fails in
    many ways."""
    try:
        import triton
    except Exception:
        return None
    return triton.__version__


def candidate_names(found: Candidates) -> str:
    return " ".join(sorted(f"{field}={name}" for field, name, _ in _each(found)))


def _each(found: Candidates) -> Iterator[tuple[str, str, Callable]]:
    return (
        (field, name, function)
        for field, functions in found.items()
        for name, function in functions.items()
    )


def _telling(function: Callable) -> Callable:
    """A candidate whose errors are told from those of the work around it, such as interrupts."""

    def run(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            text = f"{type(error).__name__}: {error}".strip()
            raise CandidateError(text.splitlines()[0]) from error

    return run
