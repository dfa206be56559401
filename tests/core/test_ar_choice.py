"""Choosing a step's operations by whole steps, which leaves no trace in the buffers."""

import copy
from dataclasses import replace

import pytest
import torch
from ar_pair import CPU_FLOAT32, pair
from glm_image.glm_core import choice
from glm_image.glm_core.ar import choice as ar_choice
from glm_image.glm_core.ar.choice import TOLERANCE, StepChoice, candidates, fixed, plainly
from glm_image.glm_core.ar.model import ARModel, rope_table
from glm_image.glm_core.ar.operations import PLAIN, gate
from glm_image.glm_core.ar.replay import EagerRunner, ReplayRunner
from glm_image.glm_core.ar.step import (
    SamplingOptions,
    StepBuffers,
    StepShape,
    next_logits,
    set_target,
    step,
)
from glm_image.glm_core.choice import named, operations_of, relative_difference
from glm_image.glm_core.data.grids import preview_grid
from glm_image.glm_core.data.tokens import Forced
from tape import Recorder

PROMPT = "a cat at the mat"
FOUND = candidates()
PRODUCTS = candidates(triton=False)
EVERY = "add_norm=triton attend=split gate=triton project=triton rotate_write=triton"


def buffers_of(model, batch=1, width=1) -> StepBuffers:
    """In the middle of a sequence whose keys and values are not zero."""
    shape = StepShape(batch, 9, 3, 512, SamplingOptions(), **CPU_FLOAT32, width=width)
    buffers = StepBuffers.allocate(model, shape)
    positions = torch.arange(shape.length).expand(3, -1)
    buffers.rope.copy_(rope_table(model.config, positions, shape.dtype))
    generator = torch.Generator().manual_seed(0)
    for layer in buffers.cache.layers:
        layer[..., :40, :].normal_(generator=generator)
    buffers.cell.copy_(buffers.offsets + 4)
    buffers.position.copy_(buffers.offsets + 40)
    buffers.remaining.fill_(width)
    buffers.tokens.random_(model.config.codebook, generator=generator)
    return buffers


def few_cells(choose=plainly, shape="small", **how):
    """Tokens of a preview of which a few cells are drawn, before and after position 256."""
    grid = (4, 4)
    mask = torch.ones(preview_grid(grid), dtype=torch.bool)
    mask.flatten()[:2] = mask.flatten()[-2:] = False
    forced = Forced(torch.full((1, *mask.shape), 7), mask)
    return pair(shape).layout(PROMPT, grid, preview=forced, choose=choose, **how)


# ---- the same tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"shape": "wide", "options": SamplingOptions(0)},
        {"shape": "small", "options": SamplingOptions(), "lookahead": 3},
    ],
)
def test_every_candidate_at_once_writes_the_plain_tokens(how) -> None:
    how = {"seed": 3, **how}
    ours = few_cells(fixed(operations_of(PLAIN, named(EVERY), FOUND)), **how)
    assert torch.equal(ours, few_cells(**how))


def test_a_trial_within_the_sampler_changes_no_token() -> None:
    """With tapes in place of graphs; what a trial recorded is forgotten."""
    recorder = Recorder()
    runner = ReplayRunner(lambda: recorder)
    step_choice = StepChoice(None, PRODUCTS)
    for seed in (3, 4):
        ours = few_cells(step_choice.choose, runner=runner, seed=seed)
        assert torch.equal(ours, few_cells(seed=seed))
    assert len(step_choice.choice.known) == 1
    assert len(recorder.tapes) == 2 + 2  # of the trial, and one for each span


# ---- the trial ---------------------------------------------------------------------------------


def test_a_trial_leaves_the_buffers_as_they_were() -> None:
    model = pair("small").model
    buffers, untouched = (buffers_of(model, batch=2, width=3) for _ in range(2))
    StepChoice(None, PRODUCTS).choose(model, buffers, EagerRunner(), lambda: None)
    for name in ("tokens", "position", "cell", "column", "remaining", "final"):
        assert torch.equal(getattr(buffers, name), getattr(untouched, name))
    for each in (buffers, untouched):
        step(model, each, 256)
    assert torch.equal(buffers.tokens, untouched.tokens)


def test_so_does_a_trial_that_is_interrupted() -> None:
    def interrupt() -> None:
        assert not torch.equal(buffers.position, position)  # it is under way
        raise KeyboardInterrupt

    model = pair("small").model
    buffers = buffers_of(model)
    position = buffers.position.clone()
    with pytest.raises(KeyboardInterrupt):
        StepChoice(None, PRODUCTS).choose(model, buffers, EagerRunner(), interrupt)
    assert torch.equal(buffers.position, position)


def test_what_is_remembered_forgets_no_recording() -> None:
    model, runner = pair("small").model, ReplayRunner(Recorder)
    step_choice, forgotten = StepChoice(None, PRODUCTS), []
    runner.forget = lambda: forgotten.append(1)
    for _ in range(2):
        buffers = runner.buffers(model, buffers_of(model).shape)
        set_target(buffers, 4, 1, 40, remaining=1)
        step_choice.choose(model, buffers, runner, lambda: None)
        assert len(forgotten) == 1 + 1  # of new buffers, and of the trial


def test_another_device_version_or_set_of_candidates_is_another_choice(monkeypatch) -> None:
    model, buffers = pair("small").model, buffers_of(pair("small").model)
    keys = {StepChoice(None, found).key(model, buffers) for found in (FOUND, {}, candidates())}
    assert len(keys) == 2
    monkeypatch.setattr(ar_choice, "VERSION", -1)
    keys.add(StepChoice(None, FOUND).key(model, buffers))
    monkeypatch.setattr(choice, "triton_version", lambda: "0")
    keys.add(StepChoice(None, FOUND).key(model, buffers))
    assert len(keys) == 4


def test_the_candidates() -> None:
    assert [*PRODUCTS["attend"]] == ["products"]
    assert "gate" not in PRODUCTS
    assert [*FOUND["attend"]] == ["split", "products"]
    assert "run" not in FOUND
    assert [*candidates(compiled=True)["attend"]] == ["split", "products", "flex"]


# ---- tolerance ---------------------------------------------------------------------------------


def test_the_tolerance_is_above_rounding_and_below_a_wrong_operation() -> None:
    """Over 40 layers, as many as the hub's model has."""
    config = replace(pair("wide").model.config, layers=40)
    model = ARModel(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameter.data.normal_(generator=generator).mul_(scale)
    rounded = copy.deepcopy(model).bfloat16()
    exact_buffers = buffers_of(model)
    shape = replace(exact_buffers.shape, dtype=torch.bfloat16)
    buffers = StepBuffers.allocate(rounded, shape)
    for name in ("tokens", "rope", "cell", "position", "remaining"):
        getattr(buffers, name).copy_(getattr(exact_buffers, name))
    for layer, exact in zip(buffers.cache.layers, exact_buffers.cache.layers, strict=True):
        layer.copy_(exact)
    expected = next_logits(model, exact_buffers, 256)
    plain = next_logits(rounded, buffers, 256).float()
    products = operations_of(PLAIN, named("attend=products"), FOUND)
    ours = next_logits(rounded, buffers, 256, products).float()
    faulty = replace(PLAIN, gate=lambda x: gate(x).roll(1, dims=-1))
    wrong = next_logits(rounded, buffers, 256, faulty).float()
    assert 0 < relative_difference(plain, expected) < TOLERANCE[torch.bfloat16] / 2
    assert relative_difference(ours, plain) < TOLERANCE[torch.bfloat16]
    assert relative_difference(wrong, plain) > TOLERANCE[torch.bfloat16]
