"""Recording steps as CUDA graphs: what a failure or an interrupt leaves behind.

There is no GPU: `simulated_cuda.py` stands in for torch.cuda.
"""

import pytest
import torch
from ar_pair import pair
from glm_image.glm_core.ar import graphs
from glm_image.glm_core.ar.graphs import CaptureError, CudaGraphs, captures_failed
from glm_image.glm_core.ar.replay import ReplayRunner
from glm_image.glm_core.data.grids import preview_grid
from glm_image.glm_core.data.tokens import Forced
from simulated_cuda import SimulatedCuda

PROMPT = "a cat at the mat"
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    cuda = SimulatedCuda()
    monkeypatch.setattr(graphs, "cuda", cuda)
    monkeypatch.setattr(graphs, "_failed", [])
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocate_to_pool)
    graphs.capture_stream.cache_clear()
    yield cuda
    graphs.capture_stream.cache_clear()


def new_runner() -> ReplayRunner:
    return ReplayRunner(lambda: CudaGraphs(DEVICE))


def layout(runner=None, seed=3, grid=(4, 4)):
    """A preview of which a few cells are drawn, before and after position 256."""
    how = {} if runner is None else {"runner": runner}
    mask = torch.ones(preview_grid(grid), dtype=torch.bool)
    mask.flatten()[:5] = mask.flatten()[-5:] = False
    forced = Forced(torch.full((1, *mask.shape), 7), mask)
    return pair("small").layout(PROMPT, grid, seed=seed, preview=forced, **how)


class Interrupting:
    """A step that raises when it is recorded, after some of its work."""

    def __init__(self, cuda, error):
        self.cuda = cuda
        self.error = error
        self.ran = 0

    def __call__(self):
        self.ran += 1
        torch.zeros(2).add_(1)
        if self.cuda.in_capture_mode:
            raise self.error


def test_all_recordings_of_a_device_have_one_stream(cuda):
    runner = new_runner()
    for grid in ((4, 4), (4, 4), (5, 4)):
        assert torch.equal(layout(runner, grid=grid), layout(grid=grid))
    runner.drop()
    other = new_runner()
    assert torch.equal(layout(other), layout())
    assert len(cuda.streams) == 1
    assert cuda.default in cuda.streams[0].waited_for
    assert cuda.streams[0] in cuda.default.waited_for


def test_dropped_recordings_are_reset(cuda):
    runner = new_runner()
    layout(runner)
    assert len(cuda.alive) == 2  # one for each span of 256 positions
    runner.drop()
    assert not cuda.alive
    assert runner.nbytes == 0


def test_a_second_models_recordings_drop_the_firsts(cuda):
    """Dropping any graph frees what all graphs of its stream address."""
    first, second = new_runner(), new_runner()
    for seed in (1, 2):
        for runner in (first, second):
            assert torch.equal(layout(runner, seed), layout(seed=seed))
            assert len(cuda.alive) == 2
    first.drop()
    assert len(cuda.alive) == 2
    assert torch.equal(layout(second, 5), layout(seed=5))


@pytest.mark.parametrize("where", ["begin", "end"])
def test_after_a_failed_capture_no_other_is_tried(cuda, caplog, where):
    runner = new_runner()
    layout(runner)
    cuda.fail = where
    assert torch.equal(layout(runner, grid=(5, 4)), layout(grid=(5, 4)))
    assert captures_failed()
    assert not cuda.alive
    assert runner.nbytes == 0
    tried, cuda.fail = cuda.captures, None
    assert torch.equal(layout(runner), layout())
    assert torch.equal(layout(new_runner()), layout())
    assert cuda.captures == tried == 3
    (warning,) = caplog.messages
    assert "without graphs" in warning
    assert warning.endswith(f"RuntimeError: {where}: " + {
        "begin": "operation not permitted", "end": "capture invalidated"
    }[where])  # fmt: skip


def test_a_capture_that_ends_badly_leaves_the_allocators_capture_mode(cuda):
    cuda.fail = "end"
    layout(new_runner())
    assert captures_failed()
    assert not cuda.in_capture_mode


def test_an_error_of_the_device_within_a_step_is_a_failed_capture(cuda, caplog):
    runner, step = new_runner(), Interrupting(cuda, RuntimeError("no sync in a capture"))
    for _ in range(3):
        runner.run(step, "work")
    assert captures_failed()
    assert step.ran == 1 + 1 + 1 + 1  # to warm up, in the capture, in its place, and later
    assert "no sync in a capture" in caplog.text
    assert cuda.captures == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("interrupted")])
@pytest.mark.parametrize("ends_well", [True, False])
def test_an_interrupt_within_a_capture_drops_everything(cuda, error, ends_well):
    runner = new_runner()
    layout(runner)
    assert len(cuda.alive) == 2
    assert runner.nbytes
    step = Interrupting(cuda, error)
    runner.run(step, "work")
    cuda.fail = None if ends_well else "end"
    with pytest.raises(type(error)):
        runner.run(step, "work")
    assert not cuda.alive
    assert runner.nbytes == 0
    assert cuda.current is cuda.default
    assert not cuda.in_capture_mode
    assert captures_failed() != ends_well
    cuda.fail = None
    assert torch.equal(layout(runner), layout())
    assert len(cuda.alive) == (2 if ends_well else 0)


def test_an_error_before_the_capture_is_the_runs_own(cuda, monkeypatch):
    """What an earlier kernel did shows when the device is waited for."""

    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="illegal memory"):
        layout(new_runner())
    assert not captures_failed()
    assert cuda.captures == 0


def test_a_recorder_refuses_after_a_failure(cuda):
    cuda.fail = "end"
    recorder = CudaGraphs(DEVICE)
    for _ in range(2):
        with pytest.raises(CaptureError):
            recorder.record("work", lambda: None)
    assert cuda.captures == 1
    assert not recorder.replay("work")
