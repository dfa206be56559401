"""When steps are replayed, and when recordings are dropped.

There is no GPU: a tape of operations replaces the CUDA graph.
"""

from dataclasses import replace

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from glm_image.glm_core.ar.choice import StepChoice, candidates, plainly
from glm_image.glm_core.ar.replay import EagerRunner, ReplayRunner
from glm_image.glm_core.decoder.choice import BlockChoice
from glm_image.glm_core.decoder.operations import PLAIN, modulate
from glm_image.nodes.host import ar as ar_module
from glm_image.nodes.host import step_choice, step_graphs
from helpers import same, sampled, stages
from safetensors.torch import save_file
from tape import Recorder

PROMPT = "a cat at the mat"
LAYER = "model.language_model.layers.0.mlp.down_proj"


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    """Every AR model that the test loads records tapes, as it would record graphs on a GPU."""
    recorder = Recorder()
    monkeypatch.setattr("glm_image.nodes.host.ar.CudaGraphs", lambda device: recorder)
    monkeypatch.setattr(step_graphs, "runs_graphs", lambda device: True)
    return recorder


def load(nodes):
    return nodes["GLMImageLoadAR"].execute("small", "default").result[0]


def sample(nodes, ar, seed: int, width: int = 96, batch: int = 1, lookahead: int = 1):
    sampling = (width, 64, seed, 0.9, 0.75, 0, batch)
    node = nodes["GLMImageSampleTokens"]
    return sampled(node, ar, PROMPT, *sampling, lookahead=lookahead)[0].tokens


def test_replayed_tokens_equal_eager_ones_also_after_a_change(nodes, loras, recorder) -> None:
    eager, ar = load(nodes), load(nodes)
    eager.graphs.runner = lambda patcher: EagerRunner()
    rows, columns = ar.patcher.model.get_submodule(LAYER).weight.shape
    down, up = torch.randn(2, columns), torch.randn(rows, 2)
    lora = {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}
    save_file(lora, loras / "graphs.safetensors")

    def with_lora(model):
        load_lora = nodes["GLMImageLoadLora"].execute
        return load_lora("graphs.safetensors", 1.0, 1.0, None, model).result[1]

    adapted, adapted_eager = with_lora(ar), with_lora(eager)
    plain = sample(nodes, ar, 1)
    assert recorder.tapes
    for ours, expected, how in (
        (ar, eager, {"seed": 1}),
        (adapted, adapted_eager, {"seed": 1}),
        (ar, eager, {"seed": 2}),
        (ar, eager, {"seed": 2, "width": 160}),
        (adapted, adapted_eager, {"seed": 3, "batch": 2}),
        (ar, eager, {"seed": 2, "lookahead": 4}),
        (ar, eager, {"seed": 1}),
    ):
        assert same(sample(nodes, ours, **how), sample(nodes, expected, **how))
    assert not same(plain, sample(nodes, adapted, 1))


def test_a_second_prompt_of_a_size_records_nothing(nodes, recorder) -> None:
    ar = load(nodes)
    sample(nodes, ar, 1)
    recorded = len(recorder.tapes)
    assert recorded
    sample(nodes, ar, 2)
    assert len(recorder.tapes) == recorded


def test_unloading_the_model_drops_recordings_and_buffers(nodes, recorder) -> None:
    ar = load(nodes)
    sample(nodes, ar, 1)
    assert ar.graphs._replay._buffers is not None
    comfy.model_management.unload_all_models()
    assert ar.graphs._replay._buffers is None
    assert not recorder.recorded


def test_a_partial_unloading_drops_recordings_and_buffers(nodes, recorder) -> None:
    """The host cannot see the buffers, which may take more than it wants to free."""
    ar = load(nodes)
    expected = sample(nodes, ar, 1)
    assert ar.graphs._replay.nbytes
    ar.patcher.partially_unload(ar.patcher.offload_device, 1)
    assert ar.graphs._replay.nbytes == 0
    assert same(sample(nodes, ar, 1), expected)


def test_memory_is_requested_only_for_what_is_not_allocated_yet(
    nodes, recorder, monkeypatch
) -> None:
    ar, asked = load(nodes), []
    load_models = comfy.model_management.load_models_gpu

    def spied(models, memory_required=0, **how):
        asked.append((memory_required, ar.graphs._replay.nbytes))
        return load_models(models, memory_required=memory_required, **how)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", spied)
    for batch in (1, 1, 3):
        sample(nodes, ar, 1, batch=batch)
    (first, none), (again, held), (larger, gone) = asked
    assert none == gone == 0
    assert held > 0
    assert again == max(first - held, 0)
    assert larger > first


def test_weights_that_fit_the_device_get_a_patcher_that_leaves_them_in_place(
    nodes, monkeypatch
) -> None:
    """Also on hosts that stream weights: streamed weights cannot be recorded."""

    class Dynamic(comfy.model_patcher.ModelPatcher):
        pass

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Dynamic, raising=False)
    assert isinstance(load(nodes).patcher, Dynamic)
    monkeypatch.setattr(ar_module, "runs_graphs", lambda device: True)
    assert not isinstance(load(nodes).patcher, Dynamic)
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_: 2**10)
    assert isinstance(load(nodes).patcher, Dynamic)


def test_only_resident_weights_are_recorded(nodes, recorder) -> None:
    ar = load(nodes)
    comfy.model_management.load_models_gpu([ar.patcher])
    assert isinstance(ar.graphs.runner(ar.patcher), ReplayRunner)
    layer = ar.patcher.model.get_submodule(LAYER)
    layer.weight_function = [lambda weight: weight]  # as the host patches what it streams
    try:
        assert isinstance(ar.graphs.runner(ar.patcher), EagerRunner)
    finally:
        layer.weight_function = []
    weight = layer.weight
    layer.weight = torch.nn.Parameter(weight.to("meta"), requires_grad=False)  # another device
    try:
        assert isinstance(ar.graphs.runner(ar.patcher), EagerRunner)
    finally:
        layer.weight = weight


def test_a_dynamic_patcher_is_not_recorded(nodes, recorder, monkeypatch) -> None:
    ar = load(nodes)
    comfy.model_management.load_models_gpu([ar.patcher])
    monkeypatch.setattr(type(ar.patcher), "is_dynamic", lambda self: True, raising=False)
    assert isinstance(ar.graphs.runner(ar.patcher), EagerRunner)


def test_the_hosts_flag_and_a_failed_capture_forbid_graphs(nodes, monkeypatch) -> None:
    management, device = comfy.model_management, torch.device("cuda", 0)
    monkeypatch.setattr(management, "is_nvidia", lambda: True)
    assert step_graphs.runs_graphs(device)
    monkeypatch.setattr(step_graphs.args, "disable_cuda_graphs", True, raising=False)
    assert not step_graphs.runs_graphs(device)
    monkeypatch.setattr(step_graphs.args, "disable_cuda_graphs", False, raising=False)
    monkeypatch.setattr(step_graphs, "captures_failed", lambda: True)
    assert not step_graphs.runs_graphs(device)


def test_a_cpu_records_nothing(nodes) -> None:
    ar = load(nodes)
    comfy.model_management.load_models_gpu([ar.patcher])
    assert step_graphs.is_resident(ar.patcher)
    assert isinstance(ar.graphs.runner(ar.patcher), EagerRunner)


# ---- the operations of a step ------------------------------------------------------------------


@pytest.fixture
def step_choices(monkeypatch, tmp_path) -> StepChoice:
    """Every AR model's steps are timed, as on a GPU; torch's operations are the candidates."""
    choice = StepChoice(tmp_path / "steps.json", candidates(triton=False))
    monkeypatch.setattr(step_choice, "is_trusted", lambda device: True)
    monkeypatch.setattr(step_choice, "_step_choice", lambda: choice)
    return choice


def test_a_trial_changes_no_token_and_is_remembered(nodes, recorder, step_choices) -> None:
    ar = load(nodes)
    tokens = sample(nodes, ar, 1)
    assert len(step_choices.choice.known) == 1
    assert step_choices.choice.path.exists()
    recorded = len(recorder.tapes)
    assert same(sample(nodes, ar, 1), tokens)
    assert len(recorder.tapes) == recorded
    eager = load(nodes)
    eager.graphs.runner = lambda patcher: EagerRunner()
    assert same(sample(nodes, eager, 1), tokens)


def test_steps_that_fetch_weights_are_not_timed(nodes, step_choices) -> None:
    ar = load(nodes)
    comfy.model_management.load_models_gpu([ar.patcher])
    assert step_choice.chooser(ar.patcher) == step_choices.choose
    layer = ar.patcher.model.get_submodule(LAYER)
    layer.weight_function = [lambda weight: weight]
    try:
        assert step_choice.chooser(ar.patcher) == step_choices.recall
    finally:
        layer.weight_function = []


def test_the_plain_step_can_be_pinned(nodes, step_choices, monkeypatch) -> None:
    ar = load(nodes)
    comfy.model_management.load_models_gpu([ar.patcher])
    monkeypatch.setenv(step_choice.PLAIN_STEP, "1")
    assert step_choice.chooser(ar.patcher) is plainly
    monkeypatch.delenv(step_choice.PLAIN_STEP)
    monkeypatch.setattr(step_choice.args, "deterministic", True)
    assert step_choice.chooser(ar.patcher) is plainly
    monkeypatch.setattr(step_choice.args, "deterministic", False)
    monkeypatch.setattr(step_choice, "is_trusted", step_graphs.is_trusted)
    assert step_choice.chooser(ar.patcher) is plainly  # on a CPU


def test_the_hosts_flag_against_triton_leaves_torchs_own_operations(monkeypatch) -> None:
    for disabled in (True, False):
        monkeypatch.setattr(step_choice.args, "disable_triton_backend", disabled, raising=False)
        clear_choices()
        found = step_choice._step_choice().choice.found
        assert "products" in found["attend"]
        assert ("gate" in found) != disabled
        assert bool(step_choice._block_choice().choice.found) != disabled
    clear_choices()


def test_compiled_candidates_are_there_if_they_are_asked_for(monkeypatch) -> None:
    monkeypatch.setenv(step_choice.COMPILED_STEP, "1")
    clear_choices()
    assert "run" in step_choice._step_choice().choice.found
    monkeypatch.delenv(step_choice.COMPILED_STEP)
    clear_choices()
    assert "run" not in step_choice._step_choice().choice.found


def clear_choices() -> None:
    step_choice._step_choice.cache_clear()
    step_choice._block_choice.cache_clear()


# ---- the operations of the decoder's blocks ----------------------------------------------------


def test_blocks_run_with_what_was_chosen(nodes, monkeypatch) -> None:
    """On a CPU with the plain ones; where they are chosen, under another node's patches too."""
    ran = []

    def counted(*args):
        ran.append(1)
        return modulate(*args)

    choice = BlockChoice(None, {"modulate": {"counted": counted}})
    choice.choose = lambda *_: replace(PLAIN, modulate=counted)
    monkeypatch.setattr(step_choice, "_block_choice", lambda: choice)
    run = stages(nodes, "small", "the word 'OPEN'", (64, 64), steps=1)
    inputs = (run.positive, run.negative, run.empty, run.seed, 1, 1.5, 1.0)

    def decode(model):
        return nodes["GLMImageDecode"].execute(model, *inputs).result[0]["samples"]

    model = nodes["GLMImageLoadDecoder"].execute("small", "default").result[0]
    expected = decode(model)
    assert not ran
    monkeypatch.setattr(step_choice, "is_trusted", lambda device: True)
    assert same(decode(model), expected)
    blocks = model.model.diffusion_model.config.num_layers
    assert len(ran) == 2 * blocks
    patched = model.clone()
    patched.set_model_patch_replace(
        lambda args, extra: extra["original_block"](args), "dit", "double_block", 0
    )
    assert same(decode(patched), expected)
    assert len(ran) == 4 * blocks
    monkeypatch.setenv(step_choice.PLAIN_STEP, "1")
    decode(model)
    assert len(ran) == 4 * blocks
