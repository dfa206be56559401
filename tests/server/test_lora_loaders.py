"""LoRAs through the native loader and through ours."""

import shutil

import numpy as np
import pytest
from graphs import add, fresh, relink, the


def _with_native(prompt, strength):
    decoder = the(prompt, "GLMImageLoadDecoder")
    lora = add(
        prompt,
        "LoraLoaderModelOnly",
        model=[decoder, 0],
        lora_name="native.safetensors",
        strength_model=strength,
    )
    relink(prompt, (decoder, 0), (lora, 0))
    return lora


def _with_ours(prompt, lora_name, strength_model=1.0, strength_ar=1.0):
    decoder, ar = the(prompt, "GLMImageLoadDecoder"), the(prompt, "GLMImageLoadAR")
    lora = add(
        prompt,
        "GLMImageLoadLora",
        lora_name=lora_name,
        strength_model=strength_model,
        strength_ar=strength_ar,
        model=[decoder, 0],
        ar=[ar, 0],
    )
    relink(prompt, (decoder, 0), (lora, 0))
    relink(prompt, (ar, 0), (lora, 1))
    return lora


def test_the_native_loader_changes_the_picture_and_its_removal_restores_it(picture):
    plain = fresh()
    before = picture(plain)
    adapted = {key: {**node, "inputs": dict(node["inputs"])} for key, node in plain.items()}
    lora = _with_native(adapted, 1.0)
    assert (picture(adapted) != before).any()
    adapted[lora]["inputs"]["strength_model"] = 0.5
    assert (picture(adapted) != before).any()
    other_seed = fresh()
    picture(other_seed)
    plain[the(plain, "SaveImage")]["inputs"]["filename_prefix"] = "again"
    np.testing.assert_array_equal(picture(plain), before)


@pytest.mark.parametrize("lora_name", ["native.safetensors", "peft.safetensors"])
def test_ours_reads_the_same_weights_under_other_names(picture, lora_name):
    native = fresh()
    ours = {key: {**node, "inputs": dict(node["inputs"])} for key, node in native.items()}
    _with_native(native, 0.7)
    _with_ours(ours, lora_name, strength_model=0.7)
    np.testing.assert_array_equal(picture(ours), picture(native))


def test_a_lora_of_the_ar_model_changes_the_tokens_alone(client, picture):
    prompt = fresh()
    before = picture(prompt)
    lora = _with_ours(prompt, "ar.safetensors")
    assert (picture(prompt) != before).any()
    prompt[lora]["inputs"]["strength_ar"] = 0.0
    np.testing.assert_array_equal(picture(prompt), before)


def test_a_file_that_was_trained_further_is_read_again(base, client, picture):
    loras = base / "models" / "loras"
    shutil.copy(loras / "native.safetensors", loras / "trained.safetensors")
    prompt = fresh()
    lora = _with_ours(prompt, "trained.safetensors")
    before = picture(prompt)
    assert lora in client.run(prompt).cached
    shutil.copy(loras / "ar.safetensors", loras / "trained.safetensors")
    assert lora in client.run(prompt).executed
    assert (picture(prompt) != before).any()
