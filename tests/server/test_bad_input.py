"""Every bad input gives one clear sentence at the right node, and the next prompt works."""

import re
from contextlib import contextmanager

import pytest
from glm_image.scripts.client import PromptError
from graphs import add, changed, fresh, relink, the


@pytest.fixture
def refused(client, picture):
    """Runs a prompt that must fail at `node_type` with `sentence`, then one that must work."""

    def check(prompt, node_type, sentence):
        with pytest.raises(PromptError, match=sentence) as refusal:
            client.run(prompt)
        message = str(refusal.value)
        assert refusal.value.node_id == the(prompt, node_type), message
        assert "Traceback" not in message
        assert re.search(r"\.( \[GLM-[A-Z]+\])?\s*$", message)
        assert picture(fresh()).std() > 1

    return check


@pytest.mark.parametrize(
    ("width", "height", "sentence"),
    [
        (1000, 1024, "1000.*32"),
        (1024, 1000, "1000.*32"),
        (32, 8224, "8224"),
        (8256, 32, "8256"),
    ],
)
def test_size(refused, width, height, sentence):
    refused(fresh(width=width, height=height), "GLMImageSampleTokens", sentence)


@pytest.mark.parametrize("text", ["", " \n "])
def test_empty_prompt(refused, text):
    refused(fresh(prompt=text), "GLMImageSampleTokens", "prompt is empty")


@pytest.mark.parametrize("text", ["", " \n "])
def test_empty_prompt_typed_into_the_node(refused, text):
    prompt = fresh()
    prompt[the(prompt, "GLMImageSampleTokens")]["inputs"]["prompt"] = text
    refused(prompt, "GLMImageSampleTokens", "prompt is empty")


@pytest.mark.parametrize(
    "loader",
    ["GLMImageLoadAR", "GLMImageLoadDecoder", "GLMImageLoadGlyphEncoder", "GLMImageLoadVAE"],
)
def test_unknown_model(refused, loader):
    prompt = fresh()
    prompt[the(prompt, loader)]["inputs"]["model_name"] = "No Such Model"
    refused(prompt, loader, r"'No Such Model'.*models/glm_image")


@pytest.mark.parametrize(
    ("node_type", "name", "value", "sentence"),
    [
        ("GLMImageSampleTokens", "ar", "x", 'ar is "x" and not an AR model; connect'),
        ("GLMImageApplyTokens", "tokens", {"a": 1}, "and not semantic tokens; connect"),
        ("GLMImageDecode", "latent", None, "latent is null and not a LATENT; connect"),
    ],
)
def test_a_value_of_another_type(refused, node_type, name, value, sentence):
    prompt = fresh()
    prompt[the(prompt, node_type)]["inputs"][name] = value
    refused(prompt, node_type, sentence)


@contextmanager
def _moved_away(folder):
    elsewhere = folder.with_name("elsewhere")
    folder.rename(elsewhere)
    try:
        yield
    finally:
        elsewhere.rename(folder)


def test_no_model_installed(base, client, picture):
    sentence = r"No .* is called 'GLM-Image'.*put a snapshot .* into models/glm_image"
    with (
        _moved_away(base / "models" / "glm_image"),
        pytest.raises(PromptError, match=sentence),
    ):
        client.run(fresh())
    assert picture(fresh()).std() > 1


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("No-Decoder", "transformer"),
        ("Truncated", "(?i)truncated|incomplete|bytes"),
        ("wan.safetensors", "not a GLM-Image"),
    ],
)
def test_broken_model(refused, model, sentence):
    prompt = fresh()
    prompt[the(prompt, "GLMImageLoadDecoder")]["inputs"]["model_name"] = model
    refused(prompt, "GLMImageLoadDecoder", sentence)


@pytest.mark.parametrize("loader", ["GLMImageLoadAR", "GLMImageLoadDecoder"])
def test_a_weight_dtype_that_is_not_offered(client, loader):
    """The pack or a current host refuses it; a wrong model does not blame the dtype."""
    prompt = fresh()
    prompt[the(prompt, loader)]["inputs"]["weight_dtype"] = "fp16"
    with pytest.raises(PromptError, match=r"weight_dtype.*'fp16'.*default"):
        client.run(prompt)
    prompt[the(prompt, loader)]["inputs"] = {"model_name": "None", "weight_dtype": "default"}
    with pytest.raises(PromptError, match="called 'None'") as refusal:
        client.run(prompt)
    assert "weight_dtype" not in str(refusal.value)


@pytest.mark.parametrize(
    ("node_type", "name", "sentence"),
    [
        ("GLMImageEncodeReference", "batch", "choose one of references, one per sample"),
        ("GLMImageReferenceCache", "store", "choose one of auto, gpu, cpu"),
        ("GLMImageReferenceCache", "precision", "choose one of model, fp8"),
    ],
)
def test_a_choice_of_references_that_is_not_offered(refused, node_type, name, sentence):
    prompt = fresh(name="style_transfer")
    prompt[the(prompt, node_type)]["inputs"][name] = "other"
    refused(prompt, node_type, f"{name} is 'other'; {sentence}")


def test_foreign_clip(refused):
    prompt = fresh()
    glyphs = the(prompt, "GLMImageGlyphEncode")
    clip = add(prompt, "CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion")
    prompt[glyphs]["inputs"]["clip"] = [clip, 0]
    refused(prompt, "GLMImageGlyphEncode", "(?i)glyph encoder")


def test_conditioning_of_a_foreign_clip(refused):
    prompt = fresh()
    clip = add(prompt, "CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion")
    text = add(prompt, "CLIPTextEncode", clip=[clip, 0], text="a cat")
    prompt[the(prompt, "GLMImageApplyTokens")]["inputs"]["positive"] = [text, 0]
    refused(prompt, "GLMImageApplyTokens", "(?i)glyph encoder")


@pytest.mark.parametrize(
    ("name", "node_type"),
    [
        ("text_to_image", "GLMImageDecode"),
        ("text_to_image_ksampler", "GLMImageModelSampling"),
    ],
)
def test_foreign_model(refused, name, node_type):
    prompt = fresh(name=name)
    wan = add(prompt, "UNETLoader", unet_name="wan.safetensors", weight_dtype="default")
    prompt[the(prompt, node_type)]["inputs"]["model"] = [wan, 0]
    refused(prompt, node_type, "WAN21.*GLM-Image Load Decoder")


SAMPLERS = pytest.mark.parametrize(
    ("name", "sampler", "latent"),
    [
        ("text_to_image", "GLMImageDecode", "latent"),
        ("text_to_image_ksampler", "KSampler", "latent_image"),
    ],
)


@SAMPLERS
def test_tokens_of_another_codebook(refused, name, sampler, latent):
    prompt = fresh(name=name)
    prompt[the(prompt, "GLMImageLoadAR")]["inputs"]["model_name"] = "Wide"
    refused(prompt, sampler, "codebook of 96.*64")


@SAMPLERS
def test_conditioning_without_tokens(refused, name, sampler, latent):
    prompt = fresh(name=name)
    glyphs = the(prompt, "GLMImageGlyphEncode")
    relink(prompt, (the(prompt, "GLMImageApplyTokens"), 0), (glyphs, 0))
    refused(prompt, sampler, "no semantic tokens.*Apply Tokens")


@SAMPLERS
def test_tokens_that_do_not_fit_the_latent(refused, name, sampler, latent):
    prompt = fresh(name=name)
    empty = add(prompt, "EmptySD3LatentImage", width=128, height=64, batch_size=1)
    prompt[the(prompt, sampler)]["inputs"][latent] = [empty, 0]
    refused(prompt, sampler, "96 x 64.*128 x 64")


@SAMPLERS
def test_a_latent_batch_that_is_no_multiple(refused, name, sampler, latent):
    prompt = changed(fresh(name=name), batch_size=2)
    empty = add(prompt, "EmptySD3LatentImage", width=96, height=64, batch_size=3)
    prompt[the(prompt, sampler)]["inputs"][latent] = [empty, 0]
    refused(prompt, sampler, "3 images.*2")


def test_a_batch_index_beyond_the_batch(refused):
    refused(fresh(batch_index=1), "GLMImageApplyTokens", "hold one image; use 0")


def test_a_lora_that_matches_nothing(refused):
    prompt = fresh()
    decoder = the(prompt, "GLMImageLoadDecoder")
    lora = add(
        prompt,
        "GLMImageLoadLora",
        lora_name="alien.safetensors",
        strength_model=1.0,
        strength_ar=1.0,
        model=[decoder, 0],
    )
    relink(prompt, (decoder, 0), (lora, 0))
    refused(prompt, "GLMImageLoadLora", "None of the .*keys")
