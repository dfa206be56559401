"""Choosing operations: by agreement and time, once for each key, kept in a file."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from glm_image.glm_core import choice
from glm_image.glm_core.choice import (
    Choice,
    candidate_names,
    described,
    mean_milliseconds,
    named,
    operations_of,
    relative_difference,
)
from glm_image.glm_core.errors import GLMImageError
from torch import Tensor

WHAT = "The steps"
X = torch.arange(12.0)
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Operations:
    gate: Function = torch.sin
    norm: Function = torch.cos


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """A clock that stands still but for the operations that move it."""
    now = [0.0]
    monkeypatch.setattr(choice.time, "perf_counter", lambda: now[0])
    return now


@dataclass
class Timed:
    """A function that takes some seconds on the clock, the first time more; it may be faulty."""

    now: list[float]
    seconds: float
    function: Function = torch.sin
    compiling: float = 0.0
    error: Exception | None = None
    calls: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.now[0] += self.seconds + self.compiling
        self.compiling = 0.0
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.function(x)


@dataclass
class Work:
    """Both operations on a few numbers."""

    tolerance: float = 1e-5
    before: Callable[[], None] = field(default=lambda: None)

    def results(self, operations: Operations) -> list[Tensor]:
        self.before()
        return [operations.gate(X), operations.norm(X)]

    def milliseconds(self, operations: Operations) -> float:
        return mean_milliseconds(lambda times: [self.results(operations) for _ in range(times)])


def made(now, found, path=None, seconds=3.0) -> Choice:
    plain = Operations(gate=Timed(now, 0.010))
    return Choice(WHAT, plain, found, path, seconds)


def chosen(now, found, key="a shape", path=None) -> Operations:
    return made(now, found, path).choose(key, Work())


def test_the_fastest_is_chosen(now, caplog) -> None:
    caplog.set_level("INFO")
    slow, fast, faster = (Timed(now, seconds) for seconds in (0.012, 0.008, 0.005))
    operations = chosen(now, {"gate": {"slow": slow, "fast": fast, "faster": faster}})
    assert operations.gate is faster
    assert operations.norm is torch.cos
    assert "The steps run with gate=faster: 5.00 ms, plain 10.00 ms (a shape)" in caplog.text


def test_gains_of_several_purposes_add_up(now) -> None:
    gate, norm = Timed(now, 0.008), Timed(now, 0.001, torch.cos)
    plain = Operations(gate=Timed(now, 0.010), norm=Timed(now, 0.010, torch.cos))
    found = {"gate": {"fast": gate}, "norm": {"fast": norm}}
    operations = Choice(WHAT, plain, found).choose("a shape", Work())
    assert (operations.gate, operations.norm) == (gate, norm)


def test_a_gain_within_the_noise_is_none(now) -> None:
    steps = made(now, {"gate": {"same": Timed(now, 0.00995)}})
    assert steps.choose("a shape", Work()) == steps.plain


@pytest.mark.parametrize("change", [lambda x: x.sin().roll(1), lambda x: x * torch.nan])
def test_an_operation_that_disagrees_is_never_chosen(now, caplog, change) -> None:
    wrong = Timed(now, 0.001, change)
    steps = made(now, {"gate": {"wrong": wrong}})
    assert steps.choose("a shape", Work()) == steps.plain
    assert wrong.calls
    assert "without gate=wrong: results differ" in caplog.text


def test_an_operation_that_does_not_run_is_left_out(now, caplog) -> None:
    caplog.set_level("INFO")
    broken = Timed(now, 0.001, error=OSError("no C compiler\nin PATH"))
    steps = made(now, {"gate": {"broken": broken}})
    assert steps.choose("a shape", Work()) == steps.plain
    assert "without gate=broken: OSError: no C compiler" in caplog.text


def test_an_error_of_the_work_around_it_is_no_fault_of_the_candidate(now) -> None:
    class InterruptionError(Exception):
        pass

    def interrupt() -> None:
        if other.calls:
            raise InterruptionError

    other = Timed(now, 0.001)
    steps = made(now, {"gate": {"other": other}})
    with pytest.raises(InterruptionError):
        steps.choose("a shape", Work(before=interrupt))
    assert not steps.known


def test_an_interrupt_ends_a_trial(now) -> None:
    def check() -> None:
        raise KeyboardInterrupt

    steps = made(now, {"gate": {"other": Timed(now, 0.001)}})
    with pytest.raises(KeyboardInterrupt):
        steps.choose("a shape", Work(), check)
    assert not steps.known


def test_no_candidate_is_begun_after_the_time_is_over(now, tmp_path, caplog) -> None:
    """What was found in time holds for this process, and the next one tries all."""
    caplog.set_level("INFO")
    path = tmp_path / "steps.json"
    early, late = Timed(now, 0.008, compiling=4.0), Timed(now, 0.001)
    steps = made(now, {"gate": {"early": early, "late": late}}, path)
    for _ in range(2):
        assert steps.choose("a shape", Work()).gate is early
    assert not late.calls
    assert "tried for 3 s, which left out gate=late" in caplog.text
    assert not path.exists()
    assert chosen(now, {"gate": {"early": early, "late": late}}, path=path).gate is late
    assert path.exists()


def test_a_full_device_leaves_the_plain_operations_for_now(now, tmp_path, caplog) -> None:
    path = tmp_path / "steps.json"
    other = Timed(now, 0.001, error=torch.OutOfMemoryError("no room\nat all"))
    steps = made(now, {"gate": {"other": other}}, path)
    assert steps.choose("a shape", Work()) == steps.plain
    assert not path.exists()
    assert "plain for now: no room" in caplog.text
    other.error = None
    assert steps.choose("a shape", Work()).gate is other
    assert path.exists()


def test_a_choice_is_kept_in_the_file(now, tmp_path) -> None:
    path, fast = tmp_path / "user" / "steps.json", Timed(now, 0.001)
    found = {"gate": {"fast": fast}}
    assert chosen(now, found, path=path).gate is fast
    tried = fast.calls
    again = made(now, found, path)
    assert again.choose("a shape", Work()).gate is again.recall("a shape", Work()).gate is fast
    assert again.recall("another", Work()) == again.plain
    assert fast.calls == tried + 1  # it is run once in a process that finds it in the file
    assert [*path.parent.iterdir()] == [path]
    chosen(now, found, "another", path)
    assert fast.calls > tried
    assert len(json.loads(path.read_text())) == 2


def gone(now: list[float]) -> Timed:
    return Timed(now, 0.001, error=RuntimeError("no compiler"))


def wrong(now: list[float]) -> Timed:
    return Timed(now, 0.001, torch.cos)


@pytest.mark.parametrize("broken", [gone, wrong])
def test_what_is_remembered_and_fails_now_is_chosen_anew(now, tmp_path, broken) -> None:
    path, other = tmp_path / "steps.json", Timed(now, 0.005)
    chosen(now, {"gate": {"fast": Timed(now, 0.001), "other": other}}, path=path)
    later = made(now, {"gate": {"fast": broken(now), "other": other}}, path)
    assert later.recall("a shape", Work()) == later.plain
    assert later.choose("a shape", Work()).gate is other
    assert json.loads(path.read_text())["a shape"] == {"gate": "other"}


def test_a_full_device_says_nothing_of_what_is_remembered(now, tmp_path) -> None:
    path, fast = tmp_path / "steps.json", Timed(now, 0.001)
    chosen(now, {"gate": {"fast": fast}}, path=path)
    later = made(now, {"gate": {"fast": fast}}, path)
    fast.error = torch.OutOfMemoryError("no room")
    assert later.recall("a shape", Work()) == later.plain
    fast.error = None
    assert later.recall("a shape", Work()).gate is fast
    assert json.loads(path.read_text())["a shape"] == {"gate": "fast"}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"x": 3}', '{"KEY": {"gate": "gone"}}', '{"KEY": {"gate": []}}']
)
def test_a_file_that_is_not_ours_is_no_choice(now, tmp_path, text) -> None:
    path = tmp_path / "steps.json"
    path.write_text(text.replace("KEY", "a shape"))
    steps = made(now, {"gate": {"fast": Timed(now, 0.001)}}, path)
    assert steps.recall("a shape", Work()) == steps.plain
    steps.choose("a shape", Work())
    assert json.loads(path.read_text())["a shape"] == {"gate": "fast"}


def test_candidates_by_name() -> None:
    found = {"gate": {"fast": torch.tan}, "norm": {"other": torch.exp}}
    text = candidate_names(found)
    assert text == described(named(text)) == "gate=fast norm=other"
    plain = Operations()
    assert operations_of(plain, named("plain"), found) == plain
    assert operations_of(plain, named("norm=other"), found) == replace(plain, norm=torch.exp)
    with pytest.raises(GLMImageError, match=r"no 'slow' for 'gate'.*gate=fast, norm=other"):
        operations_of(plain, {"gate": "slow"}, found)


def test_the_difference_of_what_has_no_number_is_none() -> None:
    x = torch.ones(3)
    assert relative_difference(1.5 * x, x) == pytest.approx(0.5)
    assert not relative_difference(x * torch.nan, x) <= 1.0
