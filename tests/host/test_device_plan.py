"""A plan on the graph, the loaders that follow it, and models split over devices."""

from contextlib import contextmanager

import comfy.cli_args
import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files.weight_dtypes import WEIGHT_DTYPES
from glm_image.glm_core.placement.plan import GIB, Device
from glm_image.glm_core.split import on_device
from glm_image.nodes.host import decoder, devices, plan
from glm_image.nodes.host.ar import load_ar
from glm_image.nodes.host.decoder import load_decoder
from glm_image.nodes.host.devices import Placement
from glm_image.nodes.host.encode import encode_references
from glm_image.nodes.host.glyph import load_glyph_encoder
from glm_image.nodes.host.patchers import (
    LimitedPatcher,
    all_patches,
    make_patcher,
    same_patches,
    with_segments,
)
from glm_image.nodes.host.vae import load_vae
from helpers import planned, same, sampled, stages, written
from torch import Tensor

PROMPT = "a gate with 'EXIT' on it"
SIZE = (64, 96)
CPU = torch.device("cpu")
SPLITS = {"ar_split": "cpu=0-0,cpu=1-1", "decoder_split": "cpu=0-0,cpu=1-1"}


@pytest.fixture(scope="module")
def whole(nodes):
    return stages(nodes, "small", PROMPT, SIZE)


def load(nodes, kind: str, *args):
    return nodes[f"GLMImageLoad{kind}"].execute(*args).result[0]


@pytest.fixture(scope="module")
def split(nodes):
    """AR model and decoder, each in two segments."""
    found, _ = planned(nodes, **SPLITS)
    ar = load(nodes, "AR", "small", "default", found)
    return ar, load(nodes, "Decoder", "small", "default", found)


def decode(nodes, run, model, *, positive=None, cfg: float = 1.5, steps: int = 2) -> Tensor:
    inputs = (model, positive or run.positive, run.negative, run.empty, run.seed, steps, cfg, 1.0)
    return nodes["GLMImageDecode"].execute(*inputs).result[0]["samples"]


# ---- the node ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHT_DTYPES)
def test_planned_bytes_are_those_of_the_loaded_models(nodes, weights: str) -> None:
    found, table = planned(nodes, weight_dtype=weights, references=1)
    ar = load(nodes, "AR", "small", weights, found)
    loaded = {
        "ar": ar.patcher,
        "vision": ar.vision.patcher,
        "decoder": load(nodes, "Decoder", "small", weights, found),
        "glyph": load(nodes, "GlyphEncoder", "small", found).patcher,
        "vae": load(nodes, "VAE", "small", found).patcher,
    }
    for stage, patcher in loaded.items():
        (part,) = found.plan.of_stage(stage)
        weights_bytes = sum(weight.nbytes for weight in patcher.model.parameters())
        assert part.weights == pytest.approx(weights_bytes, rel=0.01), stage
        assert f"\n{stage}" in table


def test_a_planned_vae_has_the_dtype_that_the_user_chose(nodes, monkeypatch) -> None:
    monkeypatch.setattr(comfy.cli_args.args, "bf16_vae", True)
    found, _ = planned(nodes)
    network = load(nodes, "VAE", "small", found).patcher.model
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    (part,) = found.plan.of_stage("vae")
    assert part.weights == sum(weight.nbytes for weight in network.parameters())


def test_without_a_gpu_everything_is_on_the_cpu(nodes) -> None:
    found, table = planned(nodes, decoder="gpu:1", ar_split="gpu:0=0-0,gpu:1=1-1")
    assert {part.device for part in found.plan.parts} == {"cpu"}
    assert "ar asks for gpu:0 and gpu:1, which this machine does not have" in table
    assert "decoder asks for gpu:1, which this machine does not have" in table
    assert found.placement("ar") == Placement(CPU, CPU)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that lists two accelerators, the second the larger."""
    monkeypatch.setattr(
        devices, "_accelerators", lambda current: [torch.device("meta", i) for i in range(2)]
    )
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    rooms = [Device("gpu:0", 2**20), Device("gpu:1", 2**30), Device("cpu", 2**40)]
    monkeypatch.setattr(plan, "rooms", lambda reserve: rooms)


def test_stages_go_to_the_devices_of_the_plan(nodes, two_gpus) -> None:
    names = [
        entry.options
        for entry in nodes["GLMImageDevicePlan"].define_schema().inputs
        if entry.id in ("ar", "decoder", "glyph", "vae")
    ]
    assert names == [["auto", "cpu", "gpu:0", "gpu:1"]] * 4
    found, _ = planned(nodes, vae="cpu", glyph="gpu:1", decoder_split="gpu:1=0-0,gpu:0=1-1")
    first, second = (torch.device("meta", i) for i in range(2))
    assert found.placement("vae").load == CPU
    assert found.placement("glyph").load == second
    decoder = found.placement("decoder")
    assert decoder.load == second
    assert [(numbers, segment.load) for numbers, segment in decoder.segments] == [
        (range(1, 2), first)
    ]


def test_what_comfyui_can_evict_counts_as_free(monkeypatch, whole) -> None:
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 5 * GIB)
    device = torch.device("meta", 0)
    monkeypatch.setattr(devices, "machine", lambda: {"gpu:0": device, "cpu": CPU})
    assert devices.rooms(GIB) == [Device("gpu:0", 4 * GIB), Device("cpu", 5 * GIB)]
    patcher = ModelPatcher(torch.nn.Linear(8, 8), device, CPU)
    patcher.model.model_loaded_weight_memory = 3 * GIB
    entry = comfy.model_management.LoadedModel(patcher)
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", [entry])
    assert devices.rooms(GIB)[0] == Device("gpu:0", 7 * GIB)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"model_name": "nowhere"}, "No model is called 'nowhere'"),
        ({"weight_dtype": "fp16"}, "weight_dtype is 'fp16'; choose one of default, bf16, fp32"),
        ({"strategy": "slowest"}, "strategy is 'slowest'; choose one of auto, fastest, least"),
        ({"ar": "cuda:0"}, "ar is set to 'cuda:0'; devices are called auto, cpu, gpu:0"),
    ],
)
def test_bad_inputs_are_one_sentence(nodes, inputs: dict, sentence: str) -> None:
    assert sentence in nodes["GLMImageDevicePlan"].validate_inputs(**inputs)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"decoder_split": "gpu:0"}, "decoder_split holds 'gpu:0', which is not of the form"),
        ({"ar_split": "gpu:0=1-2"}, "ar_split gives gpu:0 the layers from 1 on where 0 is next"),
        ({"reserve_gb": float("nan")}, "reserve_gb is nan; use a value from 0.0 to 1024.0."),
        ({"weight_dtype": "fp16"}, "weight_dtype is 'fp16'; choose one of"),
        ({"strategy": "slowest"}, "strategy is 'slowest'; choose one of"),
    ],
)
def test_a_run_refuses_bad_inputs_in_one_sentence(nodes, inputs: dict, sentence: str) -> None:
    with pytest.raises(GLMImageError, match=sentence):
        planned(nodes, **inputs)


def test_another_machines_devices_pass_validation(nodes) -> None:
    assert nodes["GLMImageDevicePlan"].validate_inputs(model_name="small", ar="gpu:7") is True


def test_a_split_of_other_layers_is_refused(nodes) -> None:
    with pytest.raises(GLMImageError, match="ends at layer 2 and the model's last one is 1"):
        planned(nodes, decoder_split="cpu=0-2")
    found, _ = planned(nodes, "wide", decoder_split="cpu=0-0,cpu=1-2")
    with pytest.raises(GLMImageError, match="splits 3 layers and this diffusion decoder has 2"):
        load(nodes, "Decoder", "small", "default", found)


# ---- split models --------------------------------------------------------------------------------


def test_split_equals_unsplit_bit_for_bit(nodes, whole, split) -> None:
    ar, model = split
    tokens, layout = written(ar, PROMPT, *SIZE, whole.seed, 1)
    assert same(tokens.tokens, whole.tokens.tokens)
    assert same(layout.preview, whole.layout.preview)
    assert same(decode(nodes, whole, model), whole.latent["samples"])


@pytest.mark.parametrize("weights", ["bf16", "fp8_e4m3fn", "int8", "int4"])
def test_split_equals_unsplit_in_narrow_weights(nodes, whole, weights: str) -> None:
    found, _ = planned(nodes, weight_dtype=weights, **SPLITS)
    tokens, samples = [], []
    for choice in (None, found):
        ar = load(nodes, "AR", "small", weights, choice)
        tokens.append(written(ar, PROMPT, *SIZE, 3, 1)[0].tokens)
        model = load(nodes, "Decoder", "small", weights, choice)
        samples.append(decode(nodes, whole, model))
    assert same(*tokens)
    assert same(*samples)


@pytest.mark.parametrize("store", ["gpu", "cpu"])
def test_references_are_cached_beside_their_blocks(nodes, whole, split, store: str) -> None:
    image = torch.rand(1, 512, 512, 3, generator=torch.Generator().manual_seed(0))
    references, _ = encode_references(whole.ar, whole.vae, image, None, False)
    samples = []
    for model in (whole.model, split[1]):
        (cache,) = nodes["GLMImageReferenceCache"].execute(model, references, store, "model").result
        positive, _, _ = (
            nodes["GLMImageApplyTokens"]
            .execute(whole.positive, whole.tokens, -1, None, cache)
            .result
        )
        samples.append(decode(nodes, whole, model, positive=positive))
    assert same(*samples)
    assert [len(patcher.model.blocks) for patcher in cache.patchers] == [1, 1]
    assert positive[0][1]["additional_models"] == cache.patchers
    with pytest.raises(GLMImageError, match="whose layers are split over devices otherwise"):
        decode(nodes, whole, whole.model, positive=positive)


def test_every_segment_is_loaded_and_freed_by_comfyui(nodes, whole, split) -> None:
    comfy.model_management.unload_all_models()
    decode(nodes, whole, split[1], steps=1)
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    parts = with_segments(split[1])
    assert len(parts) == 2
    assert all(any(part.is_clone(other) for other in loaded) for part in parts)
    sizes = [part.loaded_size() for part in parts]
    assert sizes == [part.model_size() for part in parts]
    assert sum(sizes) == whole.model.model_size()
    comfy.model_management.unload_all_models()
    assert [part.loaded_size() for part in parts] == [0, 0]


def test_a_clone_has_clones_of_the_segments(split) -> None:
    for patcher in (split[0].patcher, split[1]):
        (part,), (cloned,) = with_segments(patcher)[1:], with_segments(patcher.clone())[1:]
        assert cloned is not part
        assert cloned.model is part.model


def test_the_models_state_dict_lists_every_layer(whole, split) -> None:
    for ours, theirs in (
        (split[1].model, whole.model.model),
        (split[0].patcher.model, whole.ar.patcher.model),
    ):
        state, expected = ours.state_dict(), theirs.state_dict()
        assert state.keys() == expected.keys()
        weights = {key for key in state if not key.startswith("model_sampling")}  # of a run's size
        assert all(same(state[key], expected[key]) for key in weights)
    patches = split[1].get_key_patches("diffusion_model.")
    assert patches.keys() == whole.model.get_key_patches("diffusion_model.").keys()


@pytest.fixture
def native_lora(whole) -> dict[str, Tensor]:
    """Rank 2, for a layer of each segment of the decoder."""
    generator = torch.Generator().manual_seed(3)
    lora = {}
    for i in range(2):
        name = f"transformer_blocks.{i}.ff.net.2"
        rows, columns = whole.model.model.diffusion_model.get_submodule(name).weight.shape
        for part, shape in (("lora_A", (2, columns)), ("lora_B", (rows, 2))):
            values = torch.randn(shape, generator=generator)
            lora[f"diffusion_model.{name}.{part}.weight"] = values
    return lora


def test_the_native_lora_loader_reaches_every_segment(nodes, whole, split, native_lora) -> None:
    model, expected_model = (
        comfy.sd.load_lora_for_models(patcher, None, native_lora, 1.0, 0.0)[0]
        for patcher in (split[1], whole.model)
    )
    own, (part,) = model.patches, with_segments(model)[1:]
    assert list(own) == ["diffusion_model.transformer_blocks.0.ff.net.2.weight"]
    assert list(part.patches) == ["diffusion_model.transformer_blocks.1.ff.net.2.weight"]
    assert not with_segments(split[1])[1].patches
    expected = decode(nodes, whole, expected_model)
    assert not same(expected, whole.latent["samples"])
    assert same(decode(nodes, whole, model), expected)
    assert same(decode(nodes, whole, split[1]), whole.latent["samples"])


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_the_native_lora_loader_knows_diffusers_names_of_segments(
    split, native_lora, prefix
) -> None:
    renamed = {key.replace("diffusion_model.", prefix): value for key, value in native_lora.items()}
    expected, model = (
        comfy.sd.load_lora_for_models(split[1], None, lora, 1.0, 0.0)[0]
        for lora in (native_lora, renamed)
    )
    assert same_patches(all_patches(model), all_patches(expected))
    assert len(all_patches(model)) == 2
    with pytest.raises(GLMImageError, match="use GLM-Image Load LoRA"):
        comfy.sd.load_lora_for_models(split[1], None, {"alien.diff": torch.ones(1)}, 1.0, 0.0)


def test_a_cache_made_with_other_loras_of_a_segment_is_refused(
    nodes, whole, split, native_lora
) -> None:
    image = torch.rand(1, 512, 512, 3, generator=torch.Generator().manual_seed(0))
    references, _ = encode_references(whole.ar, whole.vae, image, None, False)
    (cache,) = nodes["GLMImageReferenceCache"].execute(split[1], references, "cpu", "model").result
    last = {key: value for key, value in native_lora.items() if "blocks.1." in key}
    model, _ = comfy.sd.load_lora_for_models(split[1], None, last, 1.0, 0.0)
    applied = nodes["GLMImageApplyTokens"].execute(whole.positive, whole.tokens, -1, None, cache)
    with pytest.raises(GLMImageError, match="made with another decoder or with other LoRAs"):
        decode(nodes, whole, model, positive=applied.result[0])


def test_our_lora_loader_reaches_every_segment_of_the_ar_model(whole, split) -> None:
    from glm_image.glm_core.files.lora import lora_key_map

    model = split[0].patcher.clone()
    weights = lora_key_map(model.model.state_dict(), "ar").values()
    added = model.add_patches({key: ("diff", (torch.ones(1),)) for key in weights})
    assert sorted(added) == sorted(set(weights))
    numbers = [
        {key.split("layers.")[1].split(".")[0] for key in part.patches if "layers." in key}
        for part in with_segments(model)
    ]
    assert numbers == [{"0"}, {"1"}]


def test_what_a_split_model_cannot_do_is_refused_in_a_sentence(
    nodes, whole, split, native_lora
) -> None:
    with pytest.raises(GLMImageError, match="remove MultiGPU CFG Split or Select Device"):
        split[1].deepclone_multigpu(new_load_device=CPU)
    hooks = comfy.hooks.create_hook_lora(native_lora, 1.0, 0.0)
    states, values = whole.positive[0]
    with pytest.raises(GLMImageError, match="LoRA hooks cannot change a model that a device plan"):
        decode(nodes, whole, split[1], positive=[[states, {**values, "hooks": hooks}]])
    with pytest.raises(GLMImageError, match="not reach all layers of a model that a device plan"):
        split[1].clone().set_injections("bypass", [])
    with pytest.raises(GLMImageError, match="that a device plan has split cannot be saved"):
        comfy.sd.save_checkpoint("split.safetensors", split[1])


@pytest.mark.parametrize("part", ["ar", "decoder"])
def test_a_split_model_is_rebuilt_split_from_its_factory(split, part: str) -> None:
    patcher = {"ar": split[0].patcher, "decoder": split[1]}[part]
    factory, arguments = patcher.cached_patcher_init
    rebuilt = factory(*arguments, disable_dynamic=True)
    assert type(rebuilt) is type(patcher)
    assert len(with_segments(rebuilt)) == 2


# ---- least memory --------------------------------------------------------------------------------


def test_a_limited_patcher_leaves_the_rest_in_host_memory(nodes, whole) -> None:
    patcher = load(nodes, "Decoder", "small", "default")
    limit = patcher.model_size() // 2
    limited = make_patcher(patcher.model, Placement(CPU, CPU, limit))
    assert type(limited) is LimitedPatcher
    for _ in range(2):  # and no more of it the second time
        limited.clone().partially_load(CPU, 1e32)
        assert 0 < limited.loaded_size() <= limit
    limited.detach()


def run_all(nodes, whole, placement: Placement | None) -> list:
    """Run every stage with the placement, check its output, and return the patchers."""
    ar = load_ar("small", placement=placement)
    tokens, _ = written(ar, PROMPT, *SIZE, whole.seed, 1)
    assert same(tokens.tokens, whole.tokens.tokens)
    clip = load_glyph_encoder("small", placement)
    glyphs, _ = nodes["GLMImageGlyphEncode"].execute(clip, PROMPT).result
    assert same(glyphs[0][0], whole.positive[0][0])
    model = load_decoder("small", placement=placement)
    assert same(decode(nodes, whole, model), whole.latent["samples"])
    vae = load_vae("small", placement)
    assert same(vae.decode(whole.latent["samples"]), whole.image)
    return [ar.patcher, clip.patcher, model, vae.patcher]


@pytest.mark.parametrize("limit", [0, 20_000])
def test_stages_with_few_weights_on_the_device(nodes, whole, limit: int) -> None:
    ar, _, model, vae = run_all(nodes, whole, Placement(CPU, CPU, limit))
    assert all(patcher.loaded_size() <= limit for patcher in (ar, model, vae))


@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM"])
def test_stages_under_lowvram_and_novram(nodes, whole, monkeypatch, state: str) -> None:
    """The states that --lowvram and --novram set, on a full device that counts as no CPU."""
    management = comfy.model_management
    management.unload_all_models()
    monkeypatch.setattr(management, "vram_state", management.VRAMState[state])
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    free = GIB // 2  # less than the host reserves for itself
    monkeypatch.setattr(
        management, "get_free_memory", lambda _=None, both=False: (free, free) if both else free
    )
    patchers = run_all(nodes, whole, None)
    assert all(patcher.loaded_size() < patcher.model_size() for patcher in patchers)
    monkeypatch.undo()
    management.unload_all_models()


def test_least_memory_gives_the_same_picture(nodes, whole, monkeypatch) -> None:
    rooms = [Device("gpu:0", GIB), Device("cpu", GIB)]
    monkeypatch.setattr(plan, "rooms", lambda reserve: rooms)
    monkeypatch.setattr(plan, "machine", lambda: {"gpu:0": CPU, "cpu": CPU})
    found, _ = planned(nodes, strategy="least memory")
    ar = load(nodes, "AR", "small", "default", found)
    model = load(nodes, "Decoder", "small", "default", found)
    tokens, _ = written(ar, PROMPT, *SIZE, whole.seed, 1)
    assert same(tokens.tokens, whole.tokens.tokens)
    assert same(decode(nodes, whole, model), whole.latent["samples"])
    for stage, patcher in (("ar", ar.patcher), ("decoder", model)):
        (part,) = found.plan.of_stage(stage)
        assert 0 < part.offloaded < part.weights
        assert patcher.loaded_size() <= part.resident


# ---- the current device --------------------------------------------------------------------------


@pytest.fixture
def entered(monkeypatch) -> list[torch.device]:
    """The devices made current, the innermost last: `torch.cpu` is given the `device` context of
    accelerators, and `cpu:0` is a device with a number."""
    stack: list[torch.device] = []

    @contextmanager
    def device(which: torch.device):
        stack.append(which)
        try:
            yield
        finally:
            stack.pop()

    monkeypatch.setattr(torch.cpu, "device", device, raising=False)
    return stack


def layers_of(ar, model, clip) -> dict[str, torch.nn.Module]:
    return {
        "ar": ar.patcher.model.lm_head,
        "vision": next(m for m in ar.vision.patcher.model.modules() if not [*m.children()]),
        "decoder": model.model.diffusion_model.proj_out,
        "glyph": clip.cond_stage_model.transformer.shared,
    }


def test_each_stage_makes_its_device_the_current_one(nodes, whole, entered, monkeypatch) -> None:
    """Graphs, streams and Triton use the current device, whatever their tensors' device."""
    numbered = torch.device("cpu", 0)
    # A latent on the CPU loses the number that it would have on an accelerator.
    monkeypatch.setattr(
        decoder, "on_device", lambda device: on_device(torch.device(device.type, 0))
    )
    placement = Placement(numbered, CPU)
    ar, model = load_ar("small", placement=placement), load_decoder("small", placement=placement)
    clip, seen = load_glyph_encoder("small", placement=placement), {}
    handles = [
        layer.register_forward_pre_hook(lambda *_, n=name: seen.update({n: [*entered]}))
        for name, layer in layers_of(ar, model, clip).items()
    ]
    image = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    try:
        sampled(nodes["GLMImageSampleTokens"], ar, PROMPT, 96, 64, 7, 0.9, 0.75, 0, 1)
        nodes["GLMImageEncodeTokens"].execute(ar, image, 96, 64)
        nodes["GLMImageGlyphEncode"].execute(clip, PROMPT)
        decode(nodes, whole, model)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {stage: [numbered] for stage in ("ar", "vision", "glyph", "decoder")}
    assert entered == []


def test_a_segments_device_is_the_current_one_while_its_layers_run(nodes, whole, entered) -> None:
    numbered, seen = torch.device("cpu", 0), []
    placement = Placement(CPU, CPU, segments=((range(1, 2), Placement(numbered, CPU)),))
    ar, model = load_ar("small", placement=placement), load_decoder("small", placement=placement)
    layers = [with_segments(patcher)[1].model.layers[0] for patcher in (ar.patcher, model)]
    for layer in (*layers, ar.patcher.model.lm_head, model.model.diffusion_model.proj_out):
        layer.register_forward_pre_hook(lambda *_, a=layer in layers: seen.append((a, [*entered])))
    sampled(nodes["GLMImageSampleTokens"], ar, PROMPT, 96, 64, 7, 0.9, 0.75, 0, 1)
    decode(nodes, whole, model)
    assert all(devices == ([numbered] if away else []) for away, devices in seen)
    assert {away for away, _ in seen} == {True, False}
