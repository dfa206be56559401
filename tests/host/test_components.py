"""Loaders: native VAE and CLIP objects, weight dtypes, LoRAs, and rebuilding on another device."""

import logging
from copy import copy

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import latent_preview
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.model_patcher import ModelPatcher
from glm_image.glm_core.ar import row_linear
from glm_image.glm_core.errors import GLMImageError
from glm_image.nodes.host import vae
from glm_image.nodes.host.patchers import NotifyingPatcher
from helpers import relative_error, same, sampled, stages, written
from safetensors.torch import save_file
from tape import Tape

from nodes import CLIPTextEncode

PROMPT = "a door with 'PULL' on it"
SIZE = (64, 96)
DECODER_LAYER = "transformer_blocks.0.ff.net.2"
AR_LAYER = "model.language_model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def run(nodes):
    return stages(nodes, "small", PROMPT, SIZE)


def load(nodes, kind: str, *args):
    return nodes[f"GLMImageLoad{kind}"].execute(*args).result[0]


# ---- VAE ----------------------------------------------------------------------------------------


def test_vae_encodes_the_posteriors_mode(pipelines, run) -> None:
    pixels = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    expected = pipelines["small"].vae.encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert relative_error(run.vae.encode(pixels), expected) < 1e-4


def test_vae_decodes_in_tiles(run) -> None:
    latent = torch.randn(1, 16, 48, 48, generator=torch.Generator().manual_seed(0))
    whole = run.vae.decode(latent)
    tiled = run.vae.decode_tiled(latent, tile_x=32, tile_y=32, overlap=8)
    assert tiled.shape == whole.shape == (1, 384, 384, 3)
    assert relative_error(tiled, whole) < 0.05  # a group norm sees only its tile


@pytest.mark.parametrize(("able", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_vae_is_not_run_in_fp16(nodes, run, monkeypatch, caplog, able, dtype) -> None:
    monkeypatch.setattr(args, "fp16_vae", True)
    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda *_, **__: able)
    loaded = load(nodes, "VAE", "small")
    assert loaded.vae_dtype == dtype
    assert {weight.dtype for weight in loaded.first_stage_model.parameters()} == {dtype}
    assert f"GLM-Image's VAE overflows in fp16 and runs in {dtype} instead." in caplog.messages
    assert relative_error(loaded.decode(run.latent["samples"]), run.image) < 0.05


def test_vae_falls_back_to_tiles_when_memory_is_short(run, monkeypatch) -> None:
    network = run.vae.first_stage_model
    decode, sizes = network.decode, []

    def short_of_memory(latents):
        sizes.append(tuple(latents.shape[-2:]))
        if latents.shape[-1] * latents.shape[-2] > 64 * 64:
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return decode(latents)

    monkeypatch.setattr(network, "decode", short_of_memory)
    assert run.vae.decode(torch.randn(1, 16, 80, 80)).shape == (1, 640, 640, 3)
    assert sizes[0] == (80, 80)
    assert len(sizes) > 1


def test_colours_of_previews_are_fitted_after_a_picture(run, monkeypatch, tmp_path) -> None:
    """Nothing is loaded for it, and the next picture is the same."""
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.NoPreviews)
    latent, file = run.latent["samples"], tmp_path / "__glm_image" / "latent_rgb"
    before = run.vae.decode(latent)
    assert not file.exists()  # previews are off

    latents = run.model.model.latent_format
    assert latents.latent_rgb_factors is latents.latent_rgb_factors_bias is None
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    loads = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management,
        "load_models_gpu",
        lambda models, *rest, **kw: loads.append(models) or load(models, *rest, **kw),
    )
    assert same(run.vae.decode(latent), before)
    assert loads == [[run.vae.patcher]]
    assert torch.tensor(latents.latent_rgb_factors).shape == (16, 3)
    assert len(latents.latent_rgb_factors_bias) == 3
    assert latent_preview.get_previewer(torch.device("cpu"), latents) is not None
    assert same(run.vae.decode(latent), before)

    (kept,) = file.iterdir()
    kept.write_text('{"factors": [], "bias": "red"}')
    assert latents.latent_rgb_factors is None
    run.vae.decode(latent)  # fitted again
    assert latents.latent_rgb_factors is not None


def test_loading_hides_the_warning_of_an_empty_vae_alone(nodes, monkeypatch, caplog) -> None:
    initialise = comfy.sd.VAE.__init__
    others = ["another warning of the root logger", "a warning of another logger"]

    def with_other_warnings(self, *args, **kwargs):
        for name, message in zip((None, "elsewhere"), others, strict=True):
            logging.getLogger(name).warning(message)
        initialise(self, *args, **kwargs)

    monkeypatch.setattr(comfy.sd.VAE, "__init__", with_other_warnings)
    with caplog.at_level(logging.WARNING):
        load(nodes, "VAE", "small")
        assert caplog.messages == others
        caplog.clear()
        comfy.sd.VAE(sd={})
        assert caplog.messages[:2] == others
        assert vae.EMPTY_VAE_WARNING in caplog.messages[2]


# ---- CLIP ---------------------------------------------------------------------------------------


def test_clip_text_encode_is_glyph_encode_without_overrides(nodes, run) -> None:
    ((states, values),) = CLIPTextEncode().encode(run.clip, PROMPT)[0]
    glyphs, found = nodes["GLMImageGlyphEncode"].execute(run.clip, PROMPT).result
    assert found == "PULL"
    assert same(states, glyphs[0][0])
    assert same(values["glm_glyph_empty"], glyphs[0][1]["glm_glyph_empty"])


def test_listed_texts_replace_the_quoted_ones(nodes, pipelines, run) -> None:
    encode = nodes["GLMImageGlyphEncode"].execute
    glyphs, found = encode(run.clip, "it's a dog's life", "SIT\n\n STAY \n").result
    assert found == "SIT\nSTAY"
    expected = pipelines["small"]._get_glyph_embeds("'SIT' 'STAY'")
    assert relative_error(glyphs[0][0], expected) < 1e-5
    assert encode(run.clip, "it's a dog's life").result[1] == "s a dog"


def test_a_text_that_is_cut_is_logged(run, caplog) -> None:
    run.clip.tokenize(f"'{'n' * 2047}'")
    assert not caplog.messages
    run.clip.tokenize(f"'{'n' * 2048}'")
    assert "The end of the text 'nnn" in caplog.text
    assert "is cut: 2047 bytes fit" in caplog.text


def test_texts_beyond_what_fits_are_left_out_and_logged(nodes, run, caplog) -> None:
    glyphs, found = nodes["GLMImageGlyphEncode"].execute(run.clip, "'a" * 10**4).result
    assert found == "\n".join(["a"] * 256)
    assert glyphs[0][0].shape[1] == 256 * 3  # an even number: a pad, the byte and eos
    assert caplog.messages[0] == (
        "The last 4744 of 5000 texts are left out: at most 256 texts fit, of 16384 bytes together."
    )


def test_another_clip_is_refused(nodes) -> None:
    with pytest.raises(GLMImageError, match="not GLM-Image's glyph encoder"):
        nodes["GLMImageGlyphEncode"].execute(object(), PROMPT)


# ---- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight_dtype", "limit"), [("bf16", 0.03), ("fp8_e4m3fn", 0.2)])
def test_narrow_weights_come_close_to_float32(nodes, run, weight_dtype: str, limit: float) -> None:
    model = load(nodes, "Decoder", "small", weight_dtype)
    decode = nodes["GLMImageDecode"].execute
    (latent,) = decode(model, run.positive, run.negative, run.empty, 7, 2, 1.5, 1.0).result
    assert 0 < relative_error(latent["samples"], run.latent["samples"]) < limit

    ar = load(nodes, "AR", "small", weight_dtype)
    dtypes = {key: value.dtype for key, value in ar.patcher.model.state_dict().items()}
    narrow = {"bf16": torch.bfloat16, "fp8_e4m3fn": torch.float8_e4m3fn}[weight_dtype]
    assert dtypes[f"{AR_LAYER}.weight"] == narrow
    assert (dtypes["lm_head.weight"] == narrow) == (weight_dtype == "bf16")
    assert ar.patcher.model_size() < 0.8 * run.ar.patcher.model_size()
    tokens, _ = written(ar, PROMPT, *SIZE, 7, 1)
    assert tokens.tokens.shape == run.tokens.tokens.shape


def test_weights_are_views_of_the_file(nodes) -> None:
    """Mapped pages are shared with the page cache; a copy would be anonymous memory."""
    model = load(nodes, "Decoder", "small", "default")
    weight = model.model.diffusion_model.proj_out.weight
    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if "small/transformer" in line]
    ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in mapped]
    assert any(start <= weight.data_ptr() < end for start, end in ranges)


def test_a_model_is_loaded_by_comfyuis_memory_management(nodes, run) -> None:
    comfy.model_management.unload_all_models()
    written(run.ar, PROMPT, *SIZE, 7, 1)
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert any(model.is_clone(run.ar.patcher) for model in loaded)


# ---- LoRA ---------------------------------------------------------------------------------------


@pytest.fixture
def lora_file(loras, nodes, run):
    """A rank-2 LoRA for one layer of the decoder and one of the AR, in diffusers' names."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for root, network, layer in (
        ("transformer", run.model.model.diffusion_model, DECODER_LAYER),
        ("vision_language_encoder", run.ar.patcher.model, AR_LAYER),
    ):
        rows, columns = network.get_submodule(layer).weight.shape
        for name, shape in (("lora_A", (2, columns)), ("lora_B", (rows, 2))):
            tensors[f"{root}.{layer}.{name}.weight"] = torch.randn(shape, generator=generator)
    save_file(tensors, loras / "both.safetensors")
    return tensors


def merged(lora: dict, root: str, layer: str) -> torch.Tensor:
    return lora[f"{root}.{layer}.lora_B.weight"] @ lora[f"{root}.{layer}.lora_A.weight"]


def patched_weight(patcher, key: str) -> torch.Tensor:
    comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
    return comfy.utils.get_attr(patcher.model, key).clone()


def test_lora_adds_its_product_to_the_decoder_and_the_ar(nodes, run, lora_file) -> None:
    model, ar = (
        nodes["GLMImageLoadLora"].execute("both.safetensors", 0.5, 2.0, run.model, run.ar).result
    )
    decoder = ("transformer", DECODER_LAYER)
    text = ("vision_language_encoder", AR_LAYER)
    for patcher, original, prefix, (root, layer), strength in (
        (model, run.model, "diffusion_model.", decoder, 0.5),
        (ar.patcher, run.ar.patcher, "", text, 2.0),
    ):
        key = f"{prefix}{layer}.weight"
        plain = patched_weight(original, key)
        expected = plain + strength * merged(lora_file, root, layer)
        torch.testing.assert_close(patched_weight(patcher, key), expected)
        torch.testing.assert_close(patched_weight(original, key), plain)


def test_lora_of_no_strength_leaves_the_models_as_they_are(nodes, run, lora_file) -> None:
    """Any patch would make a reference cache invalid."""
    load_lora = nodes["GLMImageLoadLora"].execute
    model, ar = load_lora("both.safetensors", 0.0, 0.0, run.model, run.ar).result
    assert model is run.model
    assert ar.patcher is run.ar.patcher
    model, ar = load_lora("both.safetensors", 0.0, 1.0, run.model, run.ar).result
    assert model is run.model
    assert ar.patcher.patches_uuid != run.ar.patcher.patches_uuid


def test_native_loader_takes_diffusion_model_keys(nodes, run, lora_file, loras) -> None:
    native = {
        key.replace("transformer.", "diffusion_model.", 1): value
        for key, value in lora_file.items()
        if key.startswith("transformer.")
    }
    model, _ = comfy.sd.load_lora_for_models(run.model, None, native, 1.0, 0.0)
    key = f"diffusion_model.{DECODER_LAYER}.weight"
    expected = patched_weight(run.model, key) + merged(lora_file, "transformer", DECODER_LAYER)
    torch.testing.assert_close(patched_weight(model, key), expected)


def test_lora_that_matches_nothing_is_refused(nodes, run, loras) -> None:
    save_file({"unet.alien.lora_A.weight": torch.zeros(2, 2)}, loras / "alien.safetensors")
    with pytest.raises(GLMImageError, match="None of the 1 keys"):
        nodes["GLMImageLoadLora"].execute("alien.safetensors", 1.0, 1.0, run.model, run.ar)


def test_lora_of_half_pairs_is_refused(nodes, run, loras) -> None:
    half = {f"transformer.{DECODER_LAYER}.lora_A.weight": torch.randn(2, 128)}
    save_file(half, loras / "half.safetensors")
    with pytest.raises(GLMImageError, match="holds no whole pair of matrices"):
        nodes["GLMImageLoadLora"].execute("half.safetensors", 1.0, 1.0, run.model, run.ar)


@pytest.mark.parametrize(
    ("up", "down"), [((7, 2), (2, 0)), ((0, 2), (2, 7)), ((0, 2), (3, 0))], ids=str
)
def test_lora_of_other_sizes_is_refused(nodes, run, loras, up, down) -> None:
    """Wrong in rows, in columns, in rank. 0 stands for the layer's own size."""
    rows, columns = run.ar.patcher.model.get_submodule(AR_LAYER).weight.shape
    lora = {
        f"{AR_LAYER}.lora_B.weight": torch.randn(up[0] or rows, up[1]),
        f"{AR_LAYER}.lora_A.weight": torch.randn(down[0], down[1] or columns),
    }
    save_file(lora, loras / "other.safetensors")
    with pytest.raises(GLMImageError, match=f"{rows} x {columns}: it is a LoRA of another model"):
        nodes["GLMImageLoadLora"].execute("other.safetensors", 1.0, 1.0, None, run.ar)


# ---- rebuilding ---------------------------------------------------------------------------------


def patchers(run) -> dict:
    return {
        "ar": run.ar.patcher,
        "decoder": run.model,
        "glyph": run.clip.patcher,
        "vae": run.vae.patcher,
    }


@pytest.mark.parametrize("component", ["ar", "decoder", "glyph", "vae"])
def test_every_patcher_can_be_rebuilt_from_its_factory(run, component: str) -> None:
    comfy.model_management.unload_all_models()  # removes the patches of other tests
    patcher = patchers(run)[component]
    factory, arguments = patcher.cached_patcher_init
    rebuilt = factory(*arguments, disable_dynamic=True)
    assert type(rebuilt) in (ModelPatcher, NotifyingPatcher)  # neither is dynamic
    assert rebuilt.model is not patcher.model
    ours, theirs = patcher.model.state_dict(), rebuilt.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(same(ours[key], theirs[key]) for key in ours)


def copied(patcher):
    """As ComfyUI's device nodes copy it. 0.3.75 has none; their first step stands in for them."""
    if hasattr(patcher, "deepclone_multigpu"):
        return patcher.deepclone_multigpu(new_load_device=torch.device("cpu"))
    factory, arguments = patcher.cached_patcher_init
    return factory(*arguments)


@pytest.mark.parametrize("component", ["ar", "decoder", "glyph", "vae"])
def test_a_copy_for_another_device_computes_the_same(nodes, run, component: str) -> None:
    patcher = patchers(run)[component]
    clone = copied(patcher)
    assert clone.model is not patcher.model
    assert clone.load_device == torch.device("cpu")
    if component == "ar":
        tokens, _ = written(run.ar.with_patcher(clone), PROMPT, *SIZE, 7, 1)
        assert same(tokens.tokens, run.tokens.tokens)
    elif component == "decoder":
        decode = nodes["GLMImageDecode"].execute
        (latent,) = decode(clone, run.positive, run.negative, run.empty, 7, 2, 1.5, 1.0).result
        assert same(latent["samples"], run.latent["samples"])
    elif component == "glyph":
        clip = run.clip.clone()
        clip.patcher, clip.cond_stage_model = clone, clone.model
        glyphs, _ = nodes["GLMImageGlyphEncode"].execute(clip, PROMPT).result
        assert same(glyphs[0][0], run.positive[0][0])
    else:
        vae = copy(run.vae)
        vae.patcher, vae.first_stage_model = clone, clone.model
        assert same(vae.decode(run.latent["samples"]), run.image)


def test_model_names_are_folders_with_the_component_and_files(nodes, pipelines) -> None:
    names = nodes["GLMImageLoadDecoder"].define_schema().inputs[0].options
    assert [name for name in names if "." not in name] == sorted(pipelines)


def test_a_cpu_computes_a_bf16_ar_model_without_casting(nodes) -> None:
    ar = load(nodes, "AR", "small", "bf16")
    assert ar.dtype == torch.bfloat16
    layer = ar.patcher.model.get_submodule(AR_LAYER)
    assert not layer.comfy_cast_weights
    tokens, _ = sampled(nodes["GLMImageSampleTokens"], ar, PROMPT, 96, 64, 3, 0.9, 0.75, 0, 1)
    assert len(tokens.tokens.unique()) > 2
    assert load(nodes, "AR", "small", "default").dtype == torch.float32


@pytest.mark.parametrize(("able", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_a_cpu_with_bf16_instructions_multiplies_matrices_in_bf16(
    nodes, monkeypatch, able: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(row_linear, "cpu_has", lambda *_: able)
    assert load(nodes, "AR", "small", "bf16").vision.dtype == dtype
    decoder = load(nodes, "Decoder", "small", "bf16")
    assert decoder.model.compute_dtype == dtype
    layer = decoder.get_model_object(f"diffusion_model.{DECODER_LAYER}")
    assert layer.comfy_cast_weights == (not able)
    assert load(nodes, "Decoder", "small", "default").model.compute_dtype == torch.float32


def test_a_picture_decoded_in_bf16_differs_from_float32_by_rounding(
    nodes, run, monkeypatch
) -> None:
    pictures = []
    for able in (False, True):
        monkeypatch.setattr(row_linear, "cpu_has", lambda *_, able=able: able)
        model = load(nodes, "Decoder", "small", "bf16")
        inputs = (model, run.positive, run.negative, run.empty, 7, 3, 1.5, 1.0)
        pictures.append(nodes["GLMImageDecode"].execute(*inputs).result[0]["samples"])
    exact, rounded = pictures
    assert not torch.equal(rounded, exact)
    assert relative_error(rounded, exact) < 0.03


def test_the_hosts_force_fp32_holds_on_a_cpu(nodes, monkeypatch) -> None:
    monkeypatch.setattr(row_linear, "cpu_has", lambda *_: True)
    monkeypatch.setattr(comfy.model_management, "FORCE_FP32", True)
    assert load(nodes, "AR", "small", "bf16").dtype == torch.float32
    decoder = load(nodes, "Decoder", "small", "bf16")
    assert decoder.model.compute_dtype == torch.float32


def test_a_step_uses_the_vector_kernel_for_layers_that_the_host_does_not_patch(
    nodes, monkeypatch
) -> None:
    monkeypatch.setattr(row_linear, "_is_faster", lambda x: True)
    layer = load(nodes, "AR", "small", "bf16").patcher.model.get_submodule(AR_LAYER)
    row = torch.randn(1, 1, layer.in_features).bfloat16()
    with Tape() as plain:
        product = layer(row)
    assert "aten::mv" in plain.operations
    layer.weight_function = [lambda weight: 2 * weight]  # as the host patches streamed layers
    with Tape() as patched:
        doubled = layer(row)
    assert "aten::mv" not in patched.operations
    assert relative_error(doubled, 2 * product) < 2**-7
