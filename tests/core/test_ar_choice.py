"""Choosing a step's operations: by agreement and time, once for each shape, kept in a file."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from ar_pair import CPU_FLOAT32, pair
from glm_image.glm_core.ar import choice
from glm_image.glm_core.ar.choice import (
    AGREEMENT,
    StepChoice,
    candidates,
    described,
    fixed,
    named,
    operations_of,
    relative_difference,
)
from glm_image.glm_core.ar.model import ARModel, rope_table
from glm_image.glm_core.ar.operations import PLAIN, attend, gate
from glm_image.glm_core.ar.replay import EagerRunner, ReplayRunner
from glm_image.glm_core.ar.step import SamplingOptions, StepBuffers, StepShape, next_logits, step
from glm_image.glm_core.data.grids import preview_grid
from glm_image.glm_core.data.tokens import Forced
from glm_image.glm_core.errors import GLMImageError
from tape import Recorder

PROMPT = "a cat at the mat"
FOUND = candidates()
EVERY = "add_norm=triton attend=split gate=triton rotate_write=triton"


class Gate:
    """The plain gate, or a faulty one; it counts its calls."""

    def __init__(self, error=None, change=lambda out: out):
        self.error, self.change = error, change
        self.calls = 0

    def __call__(self, gate_up):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.change(gate(gate_up))


@pytest.fixture
def clock(monkeypatch):
    """Time passes only in gates: 10 ms in the plain one, their own in others."""
    now = [0.0]
    monkeypatch.setattr(choice.time, "perf_counter", lambda: now[0])

    def timed(function, seconds):
        def run(gate_up):
            now[0] += seconds
            return function(gate_up)

        return run

    monkeypatch.setattr(choice, "PLAIN", replace(PLAIN, gate=timed(gate, 0.010)))
    return timed


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


def chosen(found, path=None, model=None, buffers=None, check=lambda: None, runner=None):
    model = model or pair("small").model
    buffers = buffers or buffers_of(model)
    return StepChoice(path, found).choose(model, buffers, runner or EagerRunner(), check)


def few_cells(choose=choice.plainly, shape="small", **how):
    """Tokens of a preview of which a few cells are drawn, before and after position 256."""
    grid = (4, 4)
    mask = torch.ones(preview_grid(grid), dtype=torch.bool)
    mask.flatten()[:3] = mask.flatten()[-2:] = False
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
    ours = few_cells(fixed(operations_of(named(EVERY), FOUND)), **how)
    assert torch.equal(ours, few_cells(**how))


def test_a_trial_within_the_sampler_changes_no_token() -> None:
    """With tapes in place of graphs; what a trial recorded is forgotten."""
    recorder = Recorder()
    runner = ReplayRunner(lambda: recorder)
    step_choice = StepChoice(None, {"attend": {"products": FOUND["attend"]["products"]}})
    for seed in (3, 4):
        ours = few_cells(step_choice.choose, runner=runner, seed=seed)
        assert torch.equal(ours, few_cells(seed=seed))
    assert len(step_choice._known) == 1
    assert len(recorder.tapes) == 2 + 2  # of the trial, and one for each span


# ---- the choice --------------------------------------------------------------------------------


def test_the_fastest_is_chosen(clock) -> None:
    slow, fast, faster = (clock(gate, seconds) for seconds in (0.012, 0.008, 0.005))
    operations = chosen({"gate": {"slow": slow, "fast": fast, "faster": faster}})
    assert operations.gate is faster
    assert operations.attend is attend


def test_a_gain_within_the_noise_is_none(clock) -> None:
    assert chosen({"gate": {"same": clock(gate, 0.00995)}}) == choice.PLAIN


@pytest.mark.parametrize("change", [lambda out: out.roll(1, -1), lambda out: out * torch.nan])
def test_an_operation_that_disagrees_is_never_chosen(clock, caplog, change) -> None:
    wrong = Gate(change=change)
    assert chosen({"gate": {"wrong": clock(wrong, 0.001)}}) == choice.PLAIN
    assert wrong.calls
    assert "gate=wrong: its logits differ" in caplog.text


def test_an_operation_that_does_not_run_is_left_out(caplog) -> None:
    caplog.set_level("INFO")
    broken = Gate(error=OSError("no C compiler\nin PATH"))
    assert chosen({"gate": {"broken": broken}}) == PLAIN
    assert "without gate=broken: OSError: no C compiler" in caplog.text


def test_a_trial_leaves_the_buffers_as_they_were() -> None:
    model = pair("small").model
    buffers, untouched = (buffers_of(model, batch=2, width=3) for _ in range(2))
    chosen(candidates(triton=False), model=model, buffers=buffers)
    for name in ("tokens", "position", "cell", "column", "remaining", "final"):
        assert torch.equal(getattr(buffers, name), getattr(untouched, name))
    for each in (buffers, untouched):
        step(model, each, 256)
    assert torch.equal(buffers.tokens, untouched.tokens)


def test_an_interrupt_ends_a_trial() -> None:
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt

    model = pair("small").model
    buffers, step_choice = buffers_of(model), StepChoice(None, {"gate": {"other": Gate()}})
    position = buffers.position.clone()
    with pytest.raises(KeyboardInterrupt):
        step_choice.choose(model, buffers, EagerRunner(), check)
    assert torch.equal(buffers.position, position)
    assert not step_choice._known


def test_a_hosts_interrupt_within_a_layer_is_no_fault_of_the_candidate() -> None:
    class InterruptionError(Exception):
        pass

    model = copy.deepcopy(pair("small").model)
    forward = model.lm_head.forward
    calls = []

    def interrupting(hidden):
        calls.append(1)
        if len(calls) == 2:  # the first is the plain step's
            raise InterruptionError
        return forward(hidden)

    model.lm_head.forward = interrupting
    with pytest.raises(InterruptionError):
        chosen({"gate": {"other": Gate()}}, model=model)


def test_a_full_device_leaves_the_plain_step_for_now(tmp_path, caplog) -> None:
    model, other = pair("small").model, Gate(error=torch.OutOfMemoryError("no room\nat all"))
    step_choice = StepChoice(tmp_path / "steps.json", {"gate": {"other": other}})
    arguments = model, buffers_of(model), EagerRunner(), lambda: None
    assert step_choice.choose(*arguments) == PLAIN
    assert not (tmp_path / "steps.json").exists()
    assert "plain for now: no room" in caplog.text
    other.error = None
    step_choice.choose(*arguments)
    assert (tmp_path / "steps.json").exists()


# ---- remembering -------------------------------------------------------------------------------


def test_a_choice_is_kept_in_the_file(tmp_path, clock, caplog) -> None:
    caplog.set_level("INFO")
    path, fast = tmp_path / "user" / "steps.json", Gate()
    found = {"gate": {"fast": clock(fast, 0.001)}}
    model = pair("small").model
    assert chosen(found, path).gate is found["gate"]["fast"]
    assert "run with gate=fast: 2.00 ms a step, plain 20.00 ms" in caplog.text  # of two layers
    tried = fast.calls
    for choose in (StepChoice(path, found).choose, StepChoice(path, found).recall):
        operations = choose(model, buffers_of(model), EagerRunner(), lambda: None)
        assert operations.gate is found["gate"]["fast"]
    assert fast.calls == tried
    assert [*path.parent.iterdir()] == [path]
    chosen(found, path, buffers=buffers_of(model, batch=2))
    assert fast.calls > tried
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"x": 3}', '{"KEY": {"gate": "gone"}}', '{"KEY": {"gate": []}}']
)
def test_a_file_that_is_not_ours_is_no_choice(tmp_path, text) -> None:
    path, found = tmp_path / "steps.json", {"gate": {"fast": Gate()}}
    model = pair("small").model
    step_choice = StepChoice(path, found)
    key = step_choice._key(model, buffers_of(model))
    path.write_text(text.replace("KEY", key))
    assert step_choice.recall(model, buffers_of(model)) == PLAIN
    chosen(found, path)
    assert key in json.loads(path.read_text())


def test_another_device_version_or_set_of_candidates_is_another_choice(monkeypatch) -> None:
    model, buffers = pair("small").model, buffers_of(pair("small").model)
    keys = {StepChoice(None, found)._key(model, buffers) for found in (FOUND, {}, candidates())}
    assert len(keys) == 2
    for name, other in (("VERSION", -1), ("_triton_version", lambda: "0")):
        monkeypatch.setattr(choice, name, other)
        keys.add(StepChoice(None, FOUND)._key(model, buffers))
    assert len(keys) == 4


def test_candidates_by_name() -> None:
    assert described(named(EVERY)) == EVERY
    assert operations_of(named("plain"), FOUND) == PLAIN
    assert "attend" in candidates(triton=False)
    assert "gate" not in candidates(triton=False)
    with pytest.raises(GLMImageError, match=r"no 'fast' for 'gate'.*attend=products"):
        operations_of({"gate": "fast"}, FOUND)


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
    products = operations_of(named("attend=products"), FOUND)
    ours = next_logits(rounded, buffers, 256, products).float()
    rolled = partial(torch.roll, shifts=1, dims=-1)
    wrong = next_logits(rounded, buffers, 256, replace(PLAIN, gate=Gate(change=rolled))).float()
    assert 0 < relative_difference(plain, expected) < AGREEMENT[torch.bfloat16] / 2
    assert relative_difference(ours, plain) < AGREEMENT[torch.bfloat16]
    assert relative_difference(wrong, plain) > AGREEMENT[torch.bfloat16]
