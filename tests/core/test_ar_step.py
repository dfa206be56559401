"""The static step: a replayed recording writes the tokens that running the step writes."""

import pytest
import reference
import torch
from ar_pair import CPU_FLOAT32, pair
from glm_image.glm_core.ar.replay import ReplayRunner
from glm_image.glm_core.ar.step import (
    SamplingOptions,
    StepBuffers,
    StepShape,
    set_target,
    step,
)
from glm_image.glm_core.data.grids import preview_grid
from glm_image.glm_core.data.tokens import Forced
from tape import DeviceReadError, Recorder, Tape

PROMPT = "a cat at the mat"
OPTIONS = [
    SamplingOptions(),
    SamplingOptions(temperature=0),
    SamplingOptions(temperature=1.4, top_p=1.0, top_k=7),
]


def forced_half(grid, codebook):
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(codebook, (1, *grid), generator=generator)
    return Forced(values, torch.rand(grid, generator=generator) < 0.5)


def buffers_of(model, batch=1, cells=9, columns=3, length=256, width=1, top_p=0.75):
    options = SamplingOptions(top_p=top_p)
    shape = StepShape(batch, cells, columns, length, options, **CPU_FLOAT32, width=width)
    return StepBuffers.allocate(model, shape)


def all_but(grid, codebook, drawn: int) -> Forced:
    """A preview of which the first and the last `drawn` cells are left to draw."""
    mask = torch.ones(grid, dtype=torch.bool)
    mask.flatten()[:drawn] = mask.flatten()[-drawn:] = False
    return Forced(forced_half(grid, codebook).values, mask)


# Every option with one network, every network with one option; one preview is drawn as a whole.
CASES = [("small", OPTIONS[0], 128), *(("small", options, 20) for options in OPTIONS[1:])]
CASES += [(shape, OPTIONS[0], 20) for shape in reference.SHAPES if shape != "small"]


@pytest.mark.parametrize(("shape", "options", "drawn"), CASES, ids=str)
def test_replayed_steps_write_the_same_tokens(shape, options, drawn):
    both, grid = pair(shape), (6, 9)
    preview = all_but(preview_grid(grid), both.model.config.codebook, drawn)
    how = {"batch": 2, "options": options, "preview": preview}
    eager = {
        (prompt, seed): both.tokens(prompt, grid, seed=seed, **how)
        for prompt, seed in ((PROMPT, 3), ("the heat", 8))
    }
    for lookahead in (1, 4):
        recorder = Recorder()
        runner = ReplayRunner(lambda recorder=recorder: recorder)
        for (prompt, seed), expected in eager.items():
            replayed = both.tokens(
                prompt, grid, seed=seed, runner=runner, lookahead=lookahead, **how
            )
            assert all(map(torch.equal, replayed, expected))
        assert len(recorder.tapes) == 2  # one for each span of 256 positions, for both prompts
        assert recorder.tapes[0].calls


@pytest.mark.parametrize("lookahead", [1, 3])
def test_forced_cells_between_replayed_steps(lookahead):
    both, grid = pair("small"), (5, 8)
    forced = {
        "preview": forced_half(preview_grid(grid), both.model.config.codebook),
        "large": forced_half(grid, both.model.config.codebook),
    }
    how = {"runner": ReplayRunner(Recorder), "lookahead": lookahead}
    replayed = both.tokens(PROMPT, grid, seed=2, **how, **forced)
    for ours, expected in zip(replayed, both.tokens(PROMPT, grid, seed=2, **forced), strict=True):
        assert torch.equal(ours, expected)


def test_another_size_batch_or_option_needs_a_new_recording():
    both, recorder = pair("small"), Recorder()
    runner = ReplayRunner(lambda: recorder)
    changes = [
        {},
        {"batch": 3},
        {"grid": (9, 4)},
        {"options": SamplingOptions(top_k=3)},
        {"lookahead": 3},
        {"options": SamplingOptions(temperature=0)},
    ]
    for count, change in enumerate(changes, 1):
        how = {"grid": (4, 5), "seed": 6, **change}
        grid = how.pop("grid")
        how["preview"] = all_but(preview_grid(grid), both.model.config.codebook, 5)
        ours = both.layout(PROMPT, grid, **how, runner=runner)
        assert torch.equal(ours, both.layout(PROMPT, grid, **how))
        assert len(recorder.tapes) >= count
    recorded = len(recorder.tapes)
    how = {"options": SamplingOptions(0), "preview": all_but(preview_grid((4, 5)), 64, 5)}
    both.layout("another prompt", (4, 5), seed=9, **how, runner=runner)
    assert len(recorder.tapes) == recorded


def test_moved_weights_need_a_new_recording():
    """A LoRA or an unloading leaves weights at another address, with other values."""
    both, recorder = pair("small"), Recorder()
    runner, how = ReplayRunner(lambda: recorder), {"seed": 4}
    both.layout(PROMPT, (4, 4), **how, runner=runner)
    layer = both.model.model["language_model"].layers[0].mlp.down_proj
    before = layer.weight
    try:
        layer.weight = torch.nn.Parameter(-before.clone(), requires_grad=False)
        ours = both.layout(PROMPT, (4, 4), **how, runner=runner)
        assert torch.equal(ours, both.layout(PROMPT, (4, 4), **how))
    finally:
        layer.weight = before
    assert len(recorder.tapes) == 4  # two spans, before and after


def test_drop_frees_buffers_and_recordings():
    runner = ReplayRunner(Recorder)
    both = pair("small")
    both.layout(PROMPT, (4, 4), runner=runner)
    assert runner.nbytes == runner._buffers.cache.nbytes > 0
    runner.drop()
    assert runner._buffers is None
    assert runner.nbytes == 0
    assert runner._recorder is None


def test_each_drop_asks_for_a_new_recorder():
    """The memory of a recorder's graphs is freed with the last of them."""
    recorders: list[Recorder] = []

    def new_recorder() -> Recorder:
        recorders.append(Recorder())
        return recorders[-1]

    runner, both = ReplayRunner(new_recorder), pair("small")
    for grid in ((4, 4), (4, 4), (4, 6)):
        both.layout(PROMPT, grid, runner=runner)
    assert [len(recorder.tapes) for recorder in recorders] == [2, 2]


@pytest.mark.parametrize("width", [1, 3])
def test_a_step_that_reads_the_device_is_caught(width):
    """A test of the tape: a step that reads its position from the device fails on it."""
    model = pair("small").model
    buffers = buffers_of(model, width=width)

    with pytest.raises(DeviceReadError), Tape():
        int(buffers.position[0])
    set_target(buffers, 4, 1, 20, remaining=1)
    with Tape():
        step(model, buffers, 256)


@pytest.mark.parametrize("batch", [1, 3])
def test_running_a_step_twice_changes_nothing(batch):
    model = pair("wide").model
    buffers = buffers_of(model, batch)
    buffers.noise.uniform_()
    set_target(buffers, 4, 1, 20, remaining=1)
    step(model, buffers, 256)
    tokens, cache = buffers.tokens.clone(), torch.stack(buffers.cache.layers)
    step(model, buffers, 256)
    assert torch.equal(tokens, buffers.tokens)
    assert torch.equal(cache, torch.stack(buffers.cache.layers))


def test_a_step_writes_no_more_cells_than_remain():
    """The cells after them are forced, of the next row, or beyond the grid."""
    model = pair("wide").model
    buffers = buffers_of(model, width=5, top_p=1.0)
    buffers.tokens.fill_(1)
    buffers.noise[..., 2] = 1e4  # every draw is 2
    set_target(buffers, 3, 0, 20, remaining=2)
    step(model, buffers, 256)
    assert buffers.tokens.tolist() == [[1, 1, 1, 2, 2, *[1] * 8]]
    assert int(buffers.final) == 1
    step(model, buffers, 256)
    assert int(buffers.final) == 2  # the second was guessed right now, and no third one remains


@pytest.mark.parametrize("width", [1, 4])
def test_no_shape_depends_on_the_position(width):
    model = pair("small").model
    buffers = buffers_of(model, cells=300, columns=16, length=512, width=width)
    shapes = []
    for position, remaining in ((257, 9), (400, 2), (508, 1)):
        set_target(buffers, position - 230, 2, position, remaining)
        tape = Tape()
        with tape:
            step(model, buffers, 512)
        shapes.append([tuple(o.shape) for call in tape.calls for o in call[3]])
    assert shapes[0] == shapes[1] == shapes[2]


def test_tokens_do_not_depend_on_what_an_earlier_run_left_in_the_buffers():
    both, runner = pair("small"), ReplayRunner(Recorder)
    first = both.tokens(PROMPT, (4, 4), seed=1, runner=runner)
    both.tokens("quite another prompt of another length", (4, 4), seed=2, runner=runner)
    again = both.tokens(PROMPT, (4, 4), seed=1, runner=runner)
    assert torch.equal(first[0], again[0])
