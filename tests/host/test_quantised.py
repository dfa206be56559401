"""Quantised models under ComfyUI's patcher: loading, LoRAs, partial loading, memory, rebuilding."""

import importlib
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from glm_image.glm_core.ar.cache import BlockPass
from glm_image.glm_core.ar.model import rope_table
from glm_image.glm_core.data.grids import text_positions
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files.conversion import convert
from glm_image.glm_core.files.headers import read_header
from glm_image.glm_core.files.opening import open_component
from glm_image.glm_core.files.quantisation import QUANTISATION
from glm_image.glm_core.quant.linear import PackedLinear
from glm_image.glm_core.quant.packing import FORMATS
from glm_image.nodes.host import step_graphs
from glm_image.nodes.host.ar import load_ar
from glm_image.nodes.host.decoder import load_decoder
from glm_image.nodes.host.devices import Placement
from glm_image.nodes.host.patchers import same_patches, with_segments
from helpers import planned, relative_error, same, stages, written
from safetensors.torch import load_file, save_file
from tape import Recorder
from torch import Tensor

PROMPT = "a door with 'PULL' on it"
SIZE = (64, 96)
AR_LAYER = "model.language_model.layers.0.mlp.down_proj"
DECODER_LAYER = "transformer_blocks.0.ff.net.2"
FILES = {"fp8": "fp8_e4m3fn", "int8": "int8", "int4": "int4"}
ADDED = ".comfy_quant"
"""The end of keys that current hosts add to a state dict: a layer's format, not in our files."""
LIMITS = {"fp8": 0.06, "int8": 0.03, "int4": 0.3}
"""The largest relative error of the small models' output; their widths are 32 to 128."""


@pytest.fixture(scope="module")
def run(nodes):
    return stages(nodes, "small", PROMPT, SIZE)


@pytest.fixture(scope="module")
def files(pipelines, nodes) -> dict[tuple[str, str], str]:
    """Names of converted files, by component and format."""
    models = Path(folder_paths.models_dir)
    names = {}
    for component, folder in (("ar", "text_encoders"), ("decoder", "diffusion_models")):
        folder_paths.add_model_folder_path(folder, str(models / folder))
        source = open_component(models / "glm_image" / "small", component)
        for dtype in FILES:
            file = convert(source, dtype, models / folder, lambda done, total: None)
            names[component, dtype] = file.name
        folder_paths.filename_list_cache.clear()
    return names


def load(nodes, kind: str, name: str, weight_dtype: str = "default"):
    return nodes[f"GLMImageLoad{kind}"].execute(name, weight_dtype).result[0]


def decode(nodes, run, model) -> Tensor:
    execute = nodes["GLMImageDecode"].execute
    return execute(model, run.positive, run.negative, run.empty, 7, 2, 1.5, 1.0).result[0][
        "samples"
    ]


def logits(ar, *, memory: float | None = None) -> Tensor:
    """Teacher-forced logits [L, codebook] of a short sequence; under a memory limit, if given."""
    comfy.model_management.unload_all_models()
    if memory is None:
        comfy.model_management.load_models_gpu(with_segments(ar.patcher))
    else:
        ar.patcher.patch_model(ar.patcher.load_device, lowvram_model_memory=memory)
    try:
        return forward(ar)
    finally:
        if memory is not None:
            ar.patcher.detach()


def forward(ar) -> Tensor:
    model = ar.patcher.model
    ids = torch.arange(20) % model.config.codebook
    rope = rope_table(model.config, text_positions(len(ids)), ar.dtype)
    cache = model.new_cache(1, len(ids), torch.device("cpu"), ar.dtype)
    return model(ids[None], rope, BlockPass(cache, 0), ar.dtype, tail=len(ids))[0].float()


# ---- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FILES)
def test_a_converted_ar_samples_tokens_and_is_near_the_plain_one(nodes, run, files, dtype) -> None:
    ar = load(nodes, "AR", files["ar", dtype])
    tokens, layout = written(ar, PROMPT, *SIZE, 7, 2)
    assert tokens.tokens.shape == (2, 2, 3)
    assert layout.preview.shape[0] == 2
    error = relative_error(logits(ar), logits(run.ar))
    assert 0 < error < LIMITS[dtype] + 0.01  # other weights are bf16 there, float32 here


@pytest.mark.parametrize("dtype", FILES)
def test_a_converted_decoder_is_near_the_plain_one(nodes, run, files, dtype) -> None:
    model = load(nodes, "Decoder", files["decoder", dtype])
    error = relative_error(decode(nodes, run, model), run.latent["samples"])
    assert 0 < error < LIMITS[dtype] + 0.01


@pytest.mark.parametrize("name", FORMATS)
def test_quantising_on_loading_gives_the_files_layers(nodes, run, files, name) -> None:
    for kind, component, root in (("AR", "ar", ""), ("Decoder", "decoder", "diffusion_model.")):
        loaded = load(nodes, kind, "small", name)
        patcher = loaded.patcher if kind == "AR" else loaded
        stored = load_file(open_component(models_file(files[component, name]), component).path)
        packed = {
            key.removeprefix(root): value
            for key, value in patcher.model.state_dict().items()
            if value.dtype == torch.uint8
        }
        assert packed.keys() == {k for k, value in stored.items() if value.dtype == torch.uint8}
        assert all(same(value.flatten(), stored[key]) for key, value in packed.items())
    ar = load(nodes, "AR", "small", name)
    assert relative_error(logits(ar), logits(run.ar)) < LIMITS[name]


def models_file(name: str) -> Path:
    (file,) = Path(folder_paths.models_dir).rglob(name)
    return file


@pytest.mark.parametrize("dtype", FILES)
def test_a_file_is_mapped_and_not_copied(nodes, files, dtype) -> None:
    """Layers that no kernel lays out are views of the file."""
    model = load(nodes, "Decoder", files["decoder", dtype]).model
    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if files["decoder", dtype] in line]
    ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in mapped]
    for key, weight in model.diffusion_model.state_dict().items():
        if key.endswith((ADDED, ".weight_scale")):  # of 4 bytes, which current hosts copy
            continue
        numbers = getattr(weight, "_qdata", weight)  # of a tensor that the host has wrapped
        assert any(start <= numbers.data_ptr() < end for start, end in ranges)


def test_memory_is_that_of_the_files_weights(nodes, run, files) -> None:
    for dtype in FILES:
        ar = load(nodes, "AR", files["ar", dtype])
        header = open_component(models_file(files["ar", dtype]), "ar").tensors
        expected = sum(t.nbytes for k, t in header.items() if not k.startswith("model.v"))
        added = sum(t.nbytes for k, t in ar.patcher.model.state_dict().items() if k.endswith(ADDED))
        size = ar.patcher.model_size() - added
        # 0.3.75 does not count the scale of an fp8 matrix, of 4 bytes.
        assert size == pytest.approx(expected, rel=1e-3 if dtype == "fp8" else 0)
    int8, int4 = (load(nodes, "AR", files["ar", name]).patcher.model_size() for name in FORMATS)
    assert int4 < int8 < 0.6 * run.ar.patcher.model_size()


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_ar_has_an_unquantised_vision_tower(nodes, run, files, name) -> None:
    """A file's vision tower is in bf16, so a picture's tokens are those of bf16 weights."""
    images = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    expected = load(nodes, "AR", "small", "bf16").vision.encode(images)
    assert same(load(nodes, "AR", files["ar", name]).vision.encode(images), expected)
    plain = run.ar.vision.encode(images)
    assert same(load(nodes, "AR", "small", name).vision.encode(images), plain)


def test_another_format_than_the_files_is_refused(nodes, files) -> None:
    with pytest.raises(GLMImageError, match="in int8, which cannot be turned into bf16"):
        load(nodes, "AR", files["ar", "int8"], "bf16")
    load(nodes, "AR", files["ar", "int8"], "int8")


def test_int4_of_an_odd_width_is_refused(nodes) -> None:
    with pytest.raises(GLMImageError, match="width 72; choose int8"):
        load(nodes, "AR", "deep", "int4")
    written(load(nodes, "AR", "deep", "int8"), PROMPT, *SIZE, 7, 1)


@pytest.mark.parametrize("name", FORMATS)
def test_packed_models_have_the_patcher_that_serves_them(nodes, files, name) -> None:
    for patcher in (
        load(nodes, "AR", files["ar", name]).patcher,
        load(nodes, "Decoder", files["decoder", name]),
    ):
        assert not getattr(patcher, "is_dynamic", lambda: False)()
        factory, arguments = patcher.cached_patcher_init
        rebuilt = factory(*arguments, disable_dynamic=True)
        ours, theirs = (p.model.state_dict() for p in (patcher, rebuilt))
        assert ours.keys() == theirs.keys()
        assert all(same(ours[k].flatten(), theirs[k].flatten()) for k in ours)


# ---- LoRAs -------------------------------------------------------------------------------------


def write_lora(run, block: int) -> str:
    """The name of a LoRA of one layer in each model, in that block, as large as its weight."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for root, network, layer in (
        ("transformer", run.model.model.diffusion_model, DECODER_LAYER),
        ("vision_language_encoder", run.ar.patcher.model, AR_LAYER),
    ):
        layer = layer.replace(".0.", f".{block}.")
        rows, columns = network.get_submodule(layer).weight.shape
        for name, shape in (("lora_A", (2, columns)), ("lora_B", (rows, 2))):
            values = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            tensors[f"{root}.{layer}.{name}.weight"] = values
    name = f"quantised {block}.safetensors"
    save_file(tensors, Path(folder_paths.models_dir) / "loras" / name)
    return name


@pytest.fixture(scope="module")
def lora_file(run) -> str:
    return write_lora(run, block=0)


def with_lora(nodes, name: str, model, ar):
    return nodes["GLMImageLoadLora"].execute(name, 1.0, 1.0, model, ar).result


@pytest.mark.parametrize("dtype", FILES)
def test_a_lora_changes_a_quantised_model_as_it_does_the_plain_one(
    nodes, run, files, lora_file, dtype
) -> None:
    plain_model, plain_ar = with_lora(nodes, lora_file, run.model, run.ar)
    ar = load(nodes, "AR", files["ar", dtype])
    model = load(nodes, "Decoder", files["decoder", dtype])
    before = logits(ar), decode(nodes, run, model)
    patched_model, patched_ar = with_lora(nodes, lora_file, model, ar)
    for ours, plain, original in (
        (logits(patched_ar), logits(plain_ar), logits(run.ar)),
        (decode(nodes, run, patched_model), decode(nodes, run, plain_model), run.latent["samples"]),
    ):
        moved = relative_error(plain, original)
        assert moved > 0.05
        assert relative_error(ours, plain) < LIMITS[dtype] + 0.02
    # Without the LoRA the model is what it was, bit for bit.
    assert same(logits(ar), before[0])
    assert same(decode(nodes, run, model), before[1])


@pytest.mark.parametrize("dtype", FILES)
def test_the_native_loader_adds_diffusers_names_as_ours_does(
    nodes, files, lora_file, dtype
) -> None:
    model = load(nodes, "Decoder", files["decoder", dtype])
    tensors = load_file(Path(folder_paths.models_dir) / "loras" / lora_file)
    native, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    ours, _ = with_lora(nodes, lora_file, model, None)
    assert native.patches
    assert same_patches(native.patches, ours.patches)
    with pytest.raises(GLMImageError, match="use GLM-Image Load LoRA"):
        comfy.sd.load_lora_for_models(model, None, {"alien.diff": torch.ones(1)}, 1.0, 0.0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_lora_larger_than_the_weights_does_not_clip(nodes, files, name) -> None:
    """The patched weights get new scales."""
    ar = load(nodes, "AR", files["ar", name])
    key = f"{AR_LAYER}.weight"
    layer = ar.patcher.model.get_submodule(AR_LAYER)
    weight = layer.convert_weight(layer.weight)
    change = 20 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    clone = ar.patcher.clone()
    clone.add_patches({key: ("diff", (change,))}, 1.0)
    comfy.model_management.unload_all_models()
    comfy.model_management.load_models_gpu([clone], force_patch_weights=True)
    patched = layer.convert_weight(layer.weight)
    assert relative_error(patched, weight + change) < {"int8": 0.01, "int4": 0.1}[name]
    comfy.model_management.unload_all_models()
    assert same(layer.convert_weight(layer.weight), weight)


@pytest.mark.parametrize("name", FORMATS)
def test_lora_hooks_change_a_packed_decoder_and_leave_it_as_it_was(
    nodes, run, files, lora_file, name
) -> None:
    model = load(nodes, "Decoder", files["decoder", name])
    tensors = load_file(Path(folder_paths.models_dir) / "loras" / lora_file)
    lora = {
        key.replace("transformer.", "diffusion_model.", 1): value
        for key, value in tensors.items()
        if key.startswith("transformer.")
    }
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    plain = decode(nodes, run, model)
    states, values = run.positive[0]
    hooked = nodes["GLMImageDecode"].execute(
        model, [[states, {**values, "hooks": hooks}]], run.negative, run.empty, 7, 2, 1.5, 1.0
    )
    assert relative_error(hooked.result[0]["samples"], plain) > 0.01
    assert same(decode(nodes, run, model), plain)


# ---- partial loading ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FILES)
@pytest.mark.parametrize("share", [1e-6, 0.5])
def test_partly_loaded_is_as_wholly_loaded(nodes, files, dtype, share) -> None:
    ar = load(nodes, "AR", files["ar", dtype])
    whole = logits(ar)
    memory = share * ar.patcher.model_size()
    assert same(logits(ar, memory=memory), whole)


@pytest.mark.parametrize("dtype", FILES)
def test_partly_loaded_a_lora_is_added_to_streamed_weights(nodes, files, lora_file, dtype) -> None:
    ar = load(nodes, "AR", files["ar", dtype])
    _, patched = with_lora(nodes, lora_file, None, ar)
    whole, plain = logits(patched), logits(ar)
    streamed = logits(patched, memory=1)
    assert relative_error(whole, plain) > 0.05
    assert relative_error(streamed, whole) < LIMITS[dtype]  # current hosts do not quantise the sum
    assert same(logits(ar), plain)


@pytest.mark.parametrize("name", FORMATS)
def test_a_kernels_layout_survives_offloading_and_loading_again(nodes, files, name) -> None:
    ar = load(nodes, "AR", files["ar", name])
    comfy.model_management.load_models_gpu([ar.patcher])
    layers = [m for m in ar.patcher.model.modules() if isinstance(m, PackedLinear)]
    laid_out = [layer.weight.ndim == 2 for layer in layers]
    assert any(laid_out)
    first = forward(ar)
    ar.patcher.partially_unload(torch.device("cpu"), 1e9)
    assert same(forward(ar), first)
    comfy.model_management.unload_all_models()
    comfy.model_management.load_models_gpu([ar.patcher])
    assert [layer.weight.ndim == 2 for layer in layers] == laid_out
    assert same(forward(ar), first)


# ---- the host's own format ---------------------------------------------------------------------


def test_fp8_layers_are_the_hosts(nodes, files) -> None:
    """ComfyUI's quantised tensor."""
    model = load(nodes, "Decoder", files["decoder", "fp8"]).model.diffusion_model
    layer = model.get_submodule(DECODER_LAYER)
    assert type(layer.weight.data).__name__ == "QuantizedTensor"
    assert "FP8" in str(layer.layout_type)
    metadata = read_header(models_file(files["decoder", "fp8"]))[1]
    assert DECODER_LAYER in json.loads(metadata[QUANTISATION])["layers"]


@pytest.mark.parametrize("dtype", FILES)
def test_a_quantised_patcher_can_be_cloned_and_counted(nodes, files, dtype) -> None:
    patcher = load(nodes, "Decoder", files["decoder", dtype])
    assert isinstance(patcher.clone(), ModelPatcher)
    assert patcher.clone().model_size() == patcher.model_size()


if hasattr(ModelPatcher, "deepclone_multigpu"):  # not in ComfyUI 0.3.75

    @pytest.mark.parametrize("dtype", FILES)
    def test_a_deep_clone_computes_the_same(nodes, run, files, dtype) -> None:
        model = load(nodes, "Decoder", files["decoder", dtype])
        clone = model.deepclone_multigpu(new_load_device=torch.device("cpu"))
        assert clone.model is not model.model
        assert same(decode(nodes, run, clone), decode(nodes, run, model))


if find_spec("comfy.memory_management"):  # not in ComfyUI 0.3.75

    @pytest.mark.parametrize("kind", ["AR", "Decoder"])
    @pytest.mark.parametrize("dtype", FILES)
    def test_layers_that_the_host_makes_lazily_are_loaded_too(
        nodes, files, monkeypatch, kind, dtype
    ) -> None:
        """The host does so with dynamic VRAM, its default on many GPUs."""

        def state() -> dict:
            model = load(nodes, kind, files[STAGES[kind], dtype])
            return getattr(model, "patcher", model).model.state_dict()

        expected = state()
        memory = importlib.import_module("comfy.memory_management")
        monkeypatch.setattr(memory, "aimdo_enabled", True)
        lazily = state()
        assert lazily.keys() == expected.keys()
        assert all(same(lazily[key], expected[key]) for key in expected)


# ---- split over devices -------------------------------------------------------------------------

CPU, META = torch.device("cpu"), torch.device("meta")
STAGES = {"AR": "ar", "Decoder": "decoder"}


SPLIT = "cpu=0-0,cpu=1-1"


def split_plan(nodes, name: str):
    """A plan that splits both models, which have two blocks, into two segments."""
    return planned(nodes, name, ar_split=SPLIT, decoder_split=SPLIT, reserve_gb=0.0)[0]


def load_split(nodes, kind: str, name: str):
    return nodes[f"GLMImageLoad{kind}"].execute(name, "default", split_plan(nodes, name)).result[0]


def patcher_of(model):
    return getattr(model, "patcher", model)


def output(nodes, run, model) -> Tensor:
    """The logits of the AR model, or the decoder's latents."""
    return decode(nodes, run, model) if patcher_of(model) is model else logits(model)


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("dtype", FILES)
def test_a_split_file_is_the_whole_one(nodes, run, files, dtype, kind) -> None:
    name = files[STAGES[kind], dtype]
    whole, split = load(nodes, kind, name), load_split(nodes, kind, name)
    assert len(with_segments(patcher_of(split))) == 2
    assert same(output(nodes, run, split), output(nodes, run, whole))
    if kind == "AR":
        ours, theirs = (written(ar, PROMPT, *SIZE, 7, 2)[0] for ar in (split, whole))
        assert same(ours.tokens, theirs.tokens)


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("dtype", FILES)
def test_a_plan_counts_each_segments_bytes_in_the_file(nodes, files, dtype, kind) -> None:
    name = files[STAGES[kind], dtype]
    parts = split_plan(nodes, name).plan.of_stage(STAGES[kind])
    patchers = with_segments(patcher_of(load_split(nodes, kind, name)))
    for part, patcher in zip(parts, patchers, strict=True):
        held = sum(weight.nbytes for weight in patcher.model.parameters())
        assert part.weights == pytest.approx(held, rel=1e-3 if dtype == "fp8" else 0)  # its scales
    narrow = [part.weights for part in parts]
    plain = split_plan(nodes, "small").plan.of_stage(STAGES[kind])
    assert all(ours < 0.6 * part.weights for ours, part in zip(narrow, plain, strict=True))


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("dtype", FILES)
def test_a_lora_of_a_later_segment_is_as_on_the_whole_model(
    nodes, run, files, dtype, kind, limit
) -> None:
    """Also with every layer streamed; the LoRA is then added after the layer is fetched."""
    lora, name = write_lora(run, block=1), files[STAGES[kind], dtype]
    placement = Placement(CPU, CPU, limit)
    split = replace(placement, segments=((range(1, 2), placement),))
    outputs = []
    for each in (placement, split):
        model = {"AR": load_ar, "Decoder": load_decoder}[kind](name, placement=each)
        plain = output(nodes, run, model)
        if kind == "AR":
            _, patched = with_lora(nodes, lora, None, model)
        else:
            patched, _ = with_lora(nodes, lora, model, None)
        outputs.append(output(nodes, run, patched))
        assert relative_error(outputs[-1], plain) > 0.02
        assert same(output(nodes, run, model), plain)
    assert same(*outputs)
    layers = {"AR": AR_LAYER, "Decoder": f"diffusion_model.{DECODER_LAYER}"}
    changed = [list(part.patches) for part in with_segments(patcher_of(patched))]
    assert changed == [[], [layers[kind].replace(".0.", ".1.") + ".weight"]]


def scale_of(weight: Tensor) -> Tensor:
    """The scale of one of the host's tensors: in 0.3.75, and later."""
    if hasattr(weight, "_layout_params"):
        return weight._layout_params["scale"]
    return weight.params.scale


@pytest.mark.parametrize("kind", STAGES)
def test_scales_are_on_the_device_of_their_segment(nodes, files, kind) -> None:
    """fp8 scales are beside the numbers in the host's tensor; ours are among the packed bytes."""
    own, part = with_segments(patcher_of(load_split(nodes, kind, files[STAGES[kind], "fp8"])))
    part.patch_model(META)
    found = [
        {
            (weight.device, scale_of(weight).device)
            for weight in patcher.model.parameters()
            if hasattr(weight, "_qdata")
        }
        for patcher in (own, part)
    ]
    assert found == [{(CPU, CPU)}, {(META, META)}]


@pytest.mark.parametrize("kind", STAGES)
def test_inputs_of_fp8_layers_are_not_rounded(nodes, files, monkeypatch, kind) -> None:
    """Also where the device multiplies in fp8: the host would cut inputs off at 448."""
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)
    split = load_split(nodes, kind, files[STAGES[kind], "fp8"])
    for patcher in with_segments(patcher_of(split)):
        layers = [m for m in patcher.model.modules() if getattr(m, "layout_type", None)]
        assert layers
        for layer in layers:
            weight = layer.weight.dequantize()
            x = torch.full((1, weight.shape[1]), 5000.0).to(weight.dtype)
            x[:, ::2] = 1e-4
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            expected = torch.nn.functional.linear(x, weight, bias)
            torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.5)


def test_a_converted_file_says_that_products_are_exact(files) -> None:
    for component in ("ar", "decoder"):
        metadata = read_header(models_file(files[component, "fp8"]))[1]
        layers = json.loads(metadata[QUANTISATION])["layers"].values()
        assert all(layer["full_precision_matrix_mult"] is True for layer in layers)


# ---- replayed steps ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_packed_steps_can_be_replayed(nodes, files, name, monkeypatch) -> None:
    """Recorded as a tape of operations, in place of a CUDA graph."""
    recorder = Recorder()
    monkeypatch.setattr("glm_image.nodes.host.ar.CudaGraphs", lambda device: recorder)
    monkeypatch.setattr(step_graphs, "runs_graphs", lambda device: True)
    replayed = load(nodes, "AR", files["ar", name])
    tokens = written(replayed, PROMPT, *SIZE, 7, 1)[0].tokens
    assert recorder.tapes
    monkeypatch.setattr(step_graphs, "runs_graphs", lambda device: False)
    eager = load(nodes, "AR", files["ar", name])
    assert same(written(eager, PROMPT, *SIZE, 7, 1)[0].tokens, tokens)
