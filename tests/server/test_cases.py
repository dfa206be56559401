"""Graphs from other people's reports of faults: each paints the right picture or says why not."""

import copy
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from glm_image.scripts.client import PromptError
from graphs import MODEL, add, changed, fresh, relink, the
from PIL import Image
from safetensors.torch import load_file, save_file

Paint = Callable[[dict], list[np.ndarray]]
STEPS = 24
NESTED, SPACED = "zai-org/nested", "ラ ラ ü.safetensors"


@pytest.fixture(scope="module", autouse=True)
def files(base: Path) -> None:
    """A model below a folder of its own, and LoRAs beside those of the session."""
    models = base / "models"
    (models / "glm_image" / NESTED).parent.mkdir()
    (models / "glm_image" / NESTED).symlink_to(models / "glm_image" / MODEL)
    (models / "loras" / "sub").mkdir()
    shutil.copy(models / "loras" / "native.safetensors", models / "loras" / "sub" / SPACED)
    _write_doras(models / "loras")


def _write_doras(loras: Path) -> None:
    """The LoRA with native names as a DoRA: as PEFT saves it, and as ComfyUI reads it."""
    native = load_file(loras / "native.safetensors")
    (up,) = (key for key in native if key.endswith("lora_B.weight"))
    magnitude = torch.rand(len(native[up]), generator=torch.Generator().manual_seed(3)) * 3 + 0.5
    layer = up.removesuffix(".lora_B.weight")
    peft = native | {f"{layer}.lora_magnitude_vector": magnitude}
    peft = {key.replace("diffusion_model", "transformer"): value for key, value in peft.items()}
    save_file(peft, loras / "dora_peft.safetensors")
    comfyui = native | {f"{layer}.dora_scale": magnitude[:, None].clone()}
    save_file(comfyui, loras / "dora_comfyui.safetensors")


@pytest.fixture(scope="module")
def paint(client) -> Paint:
    """Runs a prompt and returns its pictures: each [height, width, 3], 0 to 255."""

    def run(prompt: dict) -> list[np.ndarray]:
        images = client.images(client.run(prompt), the(prompt, "SaveImage"))
        return [np.asarray(Image.open(io.BytesIO(image))).astype(int) for image in images]

    return run


@pytest.fixture(scope="module")
def original() -> dict:
    return fresh(name="text_to_image_ksampler")


@pytest.fixture(scope="module")
def plain(paint, original) -> np.ndarray:
    """The picture that every case starts from."""
    return paint(original)[0]


@pytest.fixture
def prompt(original) -> dict:
    return copy.deepcopy(original)


def with_lora(prompt: dict, name: str, loader: str = "GLMImageLoadLora") -> dict:
    """A copy whose decoder has a LoRA."""
    prompt = copy.deepcopy(prompt)
    decoder = the(prompt, "GLMImageLoadDecoder")
    inputs = {"model": [decoder, 0], "lora_name": name, "strength_model": 1.0}
    if loader == "GLMImageLoadLora":
        inputs["strength_ar"] = 1.0
    lora = add(prompt, loader, **inputs)
    relink(prompt, (decoder, 0), (lora, 0))
    return prompt


# ---- LoRAs ---------------------------------------------------------------------------------------


def test_dora_of_peft(paint, prompt, plain) -> None:
    peft, comfyui, lora = (
        paint(with_lora(prompt, f"{name}.safetensors"))[0]
        for name in ("dora_peft", "dora_comfyui", "native")
    )
    np.testing.assert_array_equal(peft, comfyui)
    assert (peft != lora).any()
    assert (lora != plain).any()


def test_comfyuis_loader_and_names_of_diffusers_or_folders_of_windows(paint, prompt, plain) -> None:
    native = paint(with_lora(prompt, "native.safetensors", "LoraLoaderModelOnly"))[0]
    diffusers = paint(with_lora(prompt, "peft.safetensors", "LoraLoaderModelOnly"))[0]
    windows = paint(with_lora(prompt, f"sub\\{SPACED}"))[0]
    assert (native != plain).any()
    np.testing.assert_array_equal(diffusers, native)
    np.testing.assert_array_equal(windows, native)


def test_what_model_save_writes_loads_again(paint, prompt, plain) -> None:
    prompt = with_lora(prompt, "native.safetensors", "LoraLoaderModelOnly")
    prompt[the(prompt, "SaveImage")]["inputs"]["filename_prefix"] = "saved"
    again = copy.deepcopy(prompt)
    lora = the(prompt, "LoraLoaderModelOnly")
    add(prompt, "ModelSave", model=[lora, 0], filename_prefix="diffusion_models/merged")
    expected = paint(prompt)[0]
    decoder = the(again, "GLMImageLoadDecoder")
    again[decoder]["inputs"]["model_name"] = "merged_00001_.safetensors"
    relink(again, (the(again, "LoraLoaderModelOnly"), 0), (decoder, 0))
    del again[the(again, "LoraLoaderModelOnly")]
    np.testing.assert_array_equal(paint(again)[0], expected)
    assert (expected != plain).any()


def test_train_lora(base, client, paint, original, prompt, plain) -> None:
    """Two latents one by one; hosts differ in the node's inputs and outputs."""
    train = client.object_info()["TrainLoraNode"]
    given = {**train["input"]["required"], **train["input"].get("optional", {})}
    inputs = {name: kind[1]["default"] for name, kind in given.items() if "default" in kind[-1]}
    sampler = the(prompt, "KSampler")
    other = add(prompt, "KSampler", **prompt[sampler]["inputs"] | {"seed": 77})
    both = add(prompt, "LatentBatch", samples1=[sampler, 0], samples2=[other, 0])
    single = add(prompt, "RebatchLatents", latents=[both, 0], batch_size=1)
    inputs |= {
        "model": [the(prompt, "GLMImageLoadDecoder"), 0],
        "latents": [single, 0],
        "positive": [the(prompt, "GLMImageApplyTokens"), 0],
        "steps": STEPS,
        "learning_rate": 0.01,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "gradient_checkpointing": False,
        "existing_lora": "[None]",
    }
    node = add(prompt, "TrainLoraNode", **inputs)
    lora, losses = ([node, train["output"].index(kind)] for kind in ("LORA_MODEL", "LOSS_MAP"))
    add(prompt, "SaveLoRA", lora=lora, prefix="loras/trained", steps=0)
    shown = add(prompt, "PreviewAny", source=losses)
    run = client.run(prompt)
    values = json.loads(run.outputs[shown]["text"][0])["loss"]
    assert len(values) == STEPS
    assert sum(values[-8:]) < 0.95 * sum(values[:8])
    (file,) = (base / "output" / "loras").glob("trained_0*.safetensors")
    assert (paint(with_lora(original, file.name))[0] != plain).any()


# ---- batches, sizes, negatives -------------------------------------------------------------------


def test_latents_of_a_repeated_batch_keep_their_tokens(paint, prompt) -> None:
    changed(prompt, batch_size=2)
    apply = the(prompt, "GLMImageApplyTokens")
    two = paint(prompt)
    repeated = add(prompt, "RepeatLatentBatch", samples=[apply, 2], amount=2)
    prompt[the(prompt, "KSampler")]["inputs"]["latent_image"] = [repeated, 0]
    four = paint(prompt)
    part = add(prompt, "LatentFromBatch", samples=[repeated, 0], batch_index=1, length=2)
    prompt[the(prompt, "KSampler")]["inputs"]["latent_image"] = [part, 0]
    # A batch sums in another order, so a value between two of the 256 levels may round otherwise.
    np.testing.assert_allclose(four[:2], two, atol=1)
    np.testing.assert_allclose(paint(prompt), four[1:3], atol=1)


def test_a_zeroed_positive_is_a_negative_without_tokens(paint, prompt, plain) -> None:
    zeroed = add(
        prompt, "ConditioningZeroOut", conditioning=[the(prompt, "GLMImageApplyTokens"), 0]
    )
    prompt[the(prompt, "KSampler")]["inputs"]["negative"] = [zeroed, 0]
    np.testing.assert_array_equal(paint(prompt)[0], plain)


def test_renorm_cfg(paint, prompt, plain) -> None:
    """A factor of 0 leaves guidance as it is."""
    sampling = the(prompt, "GLMImageModelSampling")
    inputs = {"model": [sampling, 0], "cfg_trunc": 100.0}
    renorm = add(prompt, "RenormCFG", **inputs, renorm_cfg=0.0)
    prompt[the(prompt, "KSampler")]["inputs"] |= {"model": [renorm, 0], "cfg": 3.0}
    unchanged = paint(prompt)[0]
    prompt[renorm]["inputs"]["renorm_cfg"] = 1.0
    renormed = paint(prompt)[0]
    prompt[the(prompt, "KSampler")]["inputs"]["model"] = [sampling, 0]
    guided = paint(prompt)[0]
    np.testing.assert_array_equal(unchanged, guided)
    assert (guided != plain).any()
    assert (renormed != guided).any()


def test_a_picture_of_500_x_333(client, prompt) -> None:
    changed(prompt, width=500, height=333)
    loaded = add(prompt, "LoadImage", image="example.png")
    size = {"width": 500, "height": 333, "crop": "center", "upscale_method": "lanczos"}
    scaled = add(prompt, "ImageScale", image=[loaded, 0], **size)
    encoded = add(prompt, "VAEEncode", pixels=[scaled, 0], vae=[the(prompt, "GLMImageLoadVAE"), 0])
    prompt[the(prompt, "KSampler")]["inputs"] |= {"latent_image": [encoded, 0], "denoise": 0.5}
    with pytest.raises(PromptError, match=r"500x333 .* Use 512x352, and crop") as refusal:
        client.run(prompt)
    assert refusal.value.node_id == the(prompt, "GLMImageSampleTokens")


# ---- names ---------------------------------------------------------------------------------------


def test_a_model_in_a_nested_folder(paint, prompt, plain) -> None:
    np.testing.assert_array_equal(paint(changed(prompt, model_name=NESTED))[0], plain)


def test_a_models_name_is_a_number(client, prompt) -> None:
    with pytest.raises(PromptError, match=r"model_name is 3 and not a name.*\."):
        client.run(changed(prompt, model_name=3))
