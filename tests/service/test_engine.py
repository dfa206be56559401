"""A replica's queue and batches, with the tiny model, without Ray."""

import threading
import time
from contextlib import contextmanager

import pytest
import torch
from short_samples import TINY, plain, short
from tape import Recorder

from glm_core.ar.replay import ReplayRunner
from glm_core.ar.requests import write_together
from glm_core.data.tokens import Forced
from glm_core.placement import memory
from service.bounds import Bounds, RefusalError
from service.engine import Engine, Failure, Progress, Result
from service.model import ServedModel

ROWS = 4


class Counting(ServedModel):
    """The model, which notes how many samples each run writes and how often it computes."""

    def __init__(self) -> None:
        super().__init__(TINY, torch.device("cpu"), ROWS, Bounds())
        self.runs: list[int] = []
        self.passes = 0  # of the last run

    def write(self, requests, watch):
        self.runs.append(len(requests))
        self.passes, check = 0, watch.check_interrupt

        def noted() -> None:
            check()
            self.passes += 1

        watch.check_interrupt = noted
        return super().write(requests, watch)


@pytest.fixture(scope="module")
def model():
    return Counting()


@pytest.fixture
def engine(model):
    model.runs.clear()
    engine = Engine(model, queued=8)
    yield engine
    engine.close()


class Client:
    """Someone who waits for an order."""

    def __init__(self, submit, *args) -> None:
        self._news = threading.Event()
        self.order = submit(*args, self._news.set)
        self.events = []

    def wait(self, until=lambda events: False, seconds=60.0) -> list:
        """All events, once `until` holds of them or the order has finished."""
        deadline = time.monotonic() + seconds
        while not self.order.finished and not until(self.events):
            assert self._news.wait(max(0.0, deadline - time.monotonic())), "no event came"
            self._news.clear()
            self.events += self.order.take()
        return self.events

    def results(self) -> dict:
        return {event.sample: event.value for event in self.wait() if isinstance(event, Result)}


@contextmanager
def busy(engine):
    """What is submitted in the block waits until its end, so it is there at the same time."""
    done = threading.Event()
    client = Client(engine.submit_work, lambda watch: done.wait(60))
    try:
        yield
    finally:
        done.set()
        client.wait()


def alone(model, request):
    """What a run of the request alone gives, with the same number of rows."""
    return write_together(
        model._network,
        model.tokenizer,
        [request],
        ROWS,
        device=model.device,
        dtype=model.dtype,
    )[0]


def test_samples_that_come_together_share_a_run_and_equal_single_ones(model, engine) -> None:
    with busy(engine):
        first = Client(engine.submit, [short(seed=1), short("a blue square on the left", seed=2)])
        second = Client(engine.submit, [short("two green triangles", seed=3)])
    written = [*first.results().values(), *second.results().values()]
    assert model.runs == [3]
    requests = [
        short(seed=1),
        short("a blue square on the left", seed=2),
        short("two green triangles", seed=3),
    ]
    for one, request in zip(written, requests, strict=True):
        assert torch.equal(one.preview, alone(model, request).preview)


def test_the_first_of_a_run_waits_for_others(model, engine, monkeypatch) -> None:
    monkeypatch.setattr("service.engine.JOIN_SECONDS", 5)
    clients = [Client(engine.submit, [short(seed=i)]) for i in range(2)]
    assert all(client.results() for client in clients)
    assert model.runs == [2]


def test_other_sizes_and_options_have_runs_of_their_own(model, engine) -> None:
    requests = [short(), plain(side=64), short(lookahead=2), short()]
    found = Client(engine.submit, requests).results()
    assert sorted(model.runs) == [1, 1, 2]
    assert set(found) == {0, 1, 2, 3}
    assert found[1].tokens.shape == (2, 2)


def test_more_samples_than_rows_are_written_in_several_runs(model, engine) -> None:
    assert len(Client(engine.submit, [short(seed=i) for i in range(6)]).results()) == 6
    assert model.runs == [ROWS, 2]


def test_progress_has_the_grids_so_far(engine) -> None:
    client = Client(engine.submit, [plain(), plain(seed=2)])
    events = client.wait()
    told = [event for event in events if isinstance(event, Progress)]
    assert {event.sample for event in told} == {0, 1}
    last = told[-1]
    assert 0 < last.done <= last.total == 48
    preview, tokens = last.grids
    assert (preview.shape, tokens.shape) == ((16, 16), (4, 4))
    locked = 14 * 16
    assert int((preview >= 0).sum() + (tokens >= 0).sum()) == locked + last.done


def started(events) -> bool:
    return bool(events)


def test_a_run_stops_at_once_when_all_have_left(model, engine) -> None:
    with busy(engine):
        clients = [Client(engine.submit, [plain(seed=i, side=1024)]) for i in range(2)]
    for client in clients:
        client.wait(started)
    assert engine.counts == (0, 2)
    for client in clients:
        engine.leave(client.order)
    left = time.monotonic()
    Client(engine.submit, [short()]).results()
    assert model.runs == [2, 1]
    assert time.monotonic() - left < 20  # the run that was left takes minutes


def test_one_that_leaves_a_batch_changes_nothing_for_the_others(model, engine) -> None:
    with busy(engine):
        stays, leaves = (Client(engine.submit, [plain(seed=seed)]) for seed in (1, 2))
    leaves.wait(started)
    engine.leave(leaves.order)
    told = len(leaves.events) + len(leaves.order.take())
    (written,) = stays.results().values()
    assert model.runs == [2]
    assert torch.equal(written.tokens, alone(model, plain(seed=1)).tokens)
    assert len(leaves.events) + len(leaves.order.take()) == told


def test_locks_of_their_own_share_a_run_in_which_each_is_answered_as_it_ends(model, engine) -> None:
    """And from the row on in which one leaves, no pass is for it."""
    top, bottom = (plain(seed=2, side=512, large=all_but_row(row)) for row in (0, 15))
    with busy(engine):
        whole, first, last = (
            Client(engine.submit, [one]) for one in (plain(side=512), top, bottom)
        )
    (written,) = first.results().values()
    assert engine.counts == (0, 3)  # the others go on
    engine.leave(whole.order)
    assert len(last.results()) == 1
    assert model.runs == [3]
    assert model.passes < 250  # of 32 in the preview, 256, and those that read forced cells
    assert torch.equal(written.tokens, alone(model, top).tokens)


def all_but_row(row: int) -> Forced:
    """Tokens of a picture of 512 x 512, of which one row is free."""
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[row] = False
    return Forced(torch.full((1, 16, 16), 5, dtype=torch.int32), mask)


def test_those_that_leave_the_queue_free_their_places(model, engine) -> None:
    running = Client(engine.submit, [plain(side=1024)])
    running.wait(started)
    waiting = Client(engine.submit, [short(seed=i) for i in range(8)])
    with pytest.raises(RefusalError, match="8 samples are waiting here and 8 may") as refused:
        engine.submit([short()], lambda: None)
    assert refused.value.status == 503
    assert 1 <= refused.value.retry_after <= 60
    engine.leave(waiting.order)
    assert engine.counts == (0, 1)
    after = Client(engine.submit, [short()])
    engine.leave(running.order)
    assert len(after.results()) == 1
    assert model.runs == [1, 1]


def test_a_request_is_queued_whole_or_not_at_all(engine) -> None:
    running = Client(engine.submit, [plain(side=1024)])
    running.wait(started)
    Client(engine.submit, [short(seed=i) for i in range(6)])
    with pytest.raises(RefusalError):
        engine.submit([short(seed=i) for i in range(3)], lambda: None)
    assert engine.counts == (6, 1)
    engine.leave(running.order)


def test_a_failure_is_told_and_harms_nobody_else(engine) -> None:
    def fail(watch):
        raise RuntimeError("broken")

    events = Client(engine.submit_work, fail).wait()
    assert [type(event) for event in events] == [Failure]
    assert "its log says more" in str(events[0].error)
    assert len(Client(engine.submit, [short()]).results()) == 1
    assert engine.is_healthy


def test_failures_in_a_row_make_it_unhealthy(engine) -> None:
    def fail(watch):
        raise RuntimeError("broken")

    for _ in range(3):
        Client(engine.submit_work, fail).wait()
    assert not engine.is_healthy


def test_a_full_device_is_a_sentence(engine) -> None:
    def fail(watch):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    (event,) = Client(engine.submit_work, fail).wait()
    assert "start the service with fewer rows. [GLM-MEMORY]" in str(event.error)


def test_a_closing_engine_refuses_and_tells_those_who_wait(model) -> None:
    engine = Engine(model, queued=8)
    with busy(engine):
        waiting = Client(engine.submit, [short()])
        closing = threading.Thread(target=engine.close)
        closing.start()
        (event,) = waiting.wait()
    closing.join()
    assert event.error.status == 503
    with pytest.raises(RefusalError, match="stopping"):
        engine.submit([short()], lambda: None)


# ---- graphs --------------------------------------------------------------------------------------


def test_steps_are_replayed_until_one_cannot_be_recorded(model, engine, monkeypatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(model, "_graphs", ReplayRunner(lambda: recorder))
    expected = alone(model, short()).preview
    for failed in (False, True):
        monkeypatch.setattr("service.model.captures_failed", lambda failed=failed: failed)
        (written,) = Client(engine.submit, [short()]).results().values()
        assert torch.equal(written.preview, expected)
        assert len(recorder.tapes) == 1


# ---- bounds --------------------------------------------------------------------------------------


def test_memory_decides_the_positions(monkeypatch) -> None:
    def loaded(free):
        monkeypatch.setattr("service.model._free_bytes", lambda device: free)
        return ServedModel(TINY, torch.device("cpu"), ROWS, Bounds()).bounds.positions

    assert loaded(2**40) == Bounds().positions
    assert loaded(2**28) < Bounds().positions
    with pytest.raises(ValueError, match="start the service with fewer rows"):
        loaded(2**20)


def test_the_vision_tower_has_its_memory_before_it_is_loaded(model, monkeypatch) -> None:
    tower = sum(weight.nbytes for weight in model._vision.state_dict().values())
    config, most = model._network.config, Bounds().positions
    cache = config.layers * memory.kv_cache(config, ROWS, most, model.dtype)
    free = tower + cache + memory.ar(config, most, model.dtype)
    for lacking in (0, 1):
        monkeypatch.setattr("service.model._free_bytes", lambda device, n=lacking: free - n)
        assert model._positions(most) == most >> lacking


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (plain("x" * 30_000), "has 30000 characters"),
        (plain(side=16384), "has 262144 cells"),
        (plain(side=8192), "positions together"),
    ],
)
def test_what_is_too_large_is_refused(model, request_, words) -> None:
    with pytest.raises(RefusalError, match=words) as refused:
        model.key(request_)
    assert refused.value.status == 413
