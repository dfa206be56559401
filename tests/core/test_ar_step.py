"""The static step: recorded once and replayed, it writes what running it anew writes."""

import pytest
import reference
import torch
from ar_pair import PLACE, pair
from glm_image.glm_core.ar_sampler import Forced
from glm_image.glm_core.ar_step import ReplayRunner, StepBuffers, StepShape
from glm_image.glm_core.grids import preview_grid
from glm_image.glm_core.logits import SamplingOptions
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


@pytest.mark.parametrize("shape", reference.SHAPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_replayed_steps_write_the_same_tokens(shape, options):
    both, grid, recorder = pair(shape), (6, 9), Recorder()
    runner = ReplayRunner(recorder)
    for prompt, seed in ((PROMPT, 3), ("the heat", 8)):
        replayed = both.tokens(prompt, grid, seed=seed, batch=2, options=options, runner=runner)
        eager = both.tokens(prompt, grid, seed=seed, batch=2, options=options)
        for ours, expected in zip(replayed, eager, strict=True):
            assert torch.equal(ours, expected)
    assert len(recorder.tapes) == 2  # one for each span of 256 positions, for both prompts
    assert recorder.tapes[0].calls


def test_forced_cells_between_replayed_steps():
    both, grid = pair("small"), (5, 8)
    forced = {
        "preview": forced_half(preview_grid(grid), both.model.config.codebook),
        "large": forced_half(grid, both.model.config.codebook),
    }
    replayed = both.tokens(PROMPT, grid, seed=2, runner=ReplayRunner(Recorder()), **forced)
    for ours, expected in zip(replayed, both.tokens(PROMPT, grid, seed=2, **forced), strict=True):
        assert torch.equal(ours, expected)


def test_another_size_batch_or_option_is_recorded_anew():
    both, recorder = pair("small"), Recorder()
    runner = ReplayRunner(recorder)
    changes = [
        {},
        {"batch": 3},
        {"grid": (9, 4)},
        {"options": SamplingOptions(top_k=3)},
        {"options": SamplingOptions(temperature=0)},
    ]
    for count, change in enumerate(changes, 1):
        how = {"grid": (4, 5), "seed": 6, **change}
        grid = how.pop("grid")
        ours = both.layout(PROMPT, grid, **how, runner=runner)
        assert torch.equal(ours, both.layout(PROMPT, grid, **how))
        assert len(recorder.tapes) >= count
    recorded = len(recorder.tapes)
    both.layout("another prompt", (4, 5), seed=9, options=SamplingOptions(0), runner=runner)
    assert len(recorder.tapes) == recorded


def test_weights_that_moved_are_recorded_anew():
    """As a LoRA or an unloading leaves them: at another address, with other values."""
    both, recorder = pair("small"), Recorder()
    runner, how = ReplayRunner(recorder), {"seed": 4}
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


def test_what_is_dropped_is_freed():
    runner = ReplayRunner(Recorder())
    both = pair("small")
    both.layout(PROMPT, (4, 4), runner=runner)
    assert runner._buffers is not None
    runner.drop()
    assert runner._buffers is None
    assert not runner._recorded


def test_a_step_that_reads_the_device_is_caught():
    """The guard itself: a step that asks the device for its position fails on the tape."""
    model = pair("small").model
    options = SamplingOptions()
    buffers = StepBuffers(model, StepShape(1, 9, 3, 256, options, PLACE["device"], PLACE["dtype"]))

    with pytest.raises(DeviceReadError), Tape():
        int(buffers.position)
    buffers.aim(4, 1, 20)
    with Tape():
        buffers.step(model, 256)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_run_again_of_a_step_changes_nothing(batch):
    model = pair("wide").model
    buffers = StepBuffers(
        model, StepShape(batch, 9, 3, 256, SamplingOptions(), PLACE["device"], PLACE["dtype"])
    )
    buffers.noise.uniform_()
    buffers.aim(4, 1, 20)
    buffers.step(model, 256)
    tokens, cache = buffers.tokens.clone(), torch.stack(buffers.cache.layers)
    buffers.step(model, 256)
    assert torch.equal(tokens, buffers.tokens)
    assert torch.equal(cache, torch.stack(buffers.cache.layers))


def test_no_shape_depends_on_the_position():
    model = pair("small").model
    buffers = StepBuffers(
        model, StepShape(1, 300, 16, 512, SamplingOptions(), PLACE["device"], PLACE["dtype"])
    )
    shapes = []
    for position in (257, 400, 511):
        buffers.aim(position - 230, 2, position)
        tape = Tape()
        with tape:
            buffers.step(model, 512)
        shapes.append([tuple(o.shape) for call in tape.calls for o in call[3]])
    assert shapes[0] == shapes[1] == shapes[2]


def test_what_an_earlier_run_left_in_the_buffers_does_not_show():
    both, runner = pair("small"), ReplayRunner(Recorder())
    first = both.tokens(PROMPT, (4, 4), seed=1, runner=runner)
    both.tokens("quite another prompt of another length", (4, 4), seed=2, runner=runner)
    again = both.tokens(PROMPT, (4, 4), seed=1, runner=runner)
    assert torch.equal(first[0], again[0])
