"""Text to image through a real server: which stages run, their progress, their images."""

import json

import numpy as np
import pytest
from glm_image.scripts.client import Client, Prompt, PromptError
from graphs import add, changed, fresh, relink, the, upstream
from pictures import first_image, pixels
from PIL import Image

AR_STAGES = ("GLMImageLoadAR", "GLMImageSampleTokens", "GLMImageGlyphEncode", "GLMImageApplyTokens")


@pytest.mark.parametrize("name", ["text_to_image", "text_to_image_ksampler"])
def test_writes_a_png_of_the_size_asked_for(client, name):
    prompt = fresh(name=name, width=160, height=96)
    run = client.run(prompt)
    image = first_image(client, run, prompt)
    assert image.shape == (96, 160, 3)
    assert image.std() > 1
    assert {the(prompt, "GLMImageSampleTokens"), the(prompt, "SaveImage")} <= set(run.executed)


def test_a_new_decoder_seed_runs_only_the_decoder(client):
    prompt = fresh()
    before = first_image(client, client.run(prompt), prompt)
    decode = the(prompt, "GLMImageDecode")
    prompt[decode]["inputs"]["seed"] += 1
    run = client.run(prompt)
    rerun = {decode, the(prompt, "VAEDecode"), the(prompt, "SaveImage")}
    assert set(run.executed) == rerun
    assert {the(prompt, stage) for stage in AR_STAGES} <= run.cached
    assert (first_image(client, run, prompt) != before).any()


def test_the_same_prompt_runs_nothing(client):
    prompt = fresh()
    client.run(prompt)
    run = client.run(prompt)
    assert run.executed == []
    assert run.cached == set(upstream(prompt, the(prompt, "SaveImage")))


def test_the_same_seeds_give_the_same_picture(client, picture):
    prompt = fresh()
    before = picture(prompt)
    client.post("/free", {"unload_models": True, "free_memory": True})
    run = client.run(prompt)
    assert the(prompt, "GLMImageSampleTokens") in run.executed
    np.testing.assert_array_equal(first_image(client, run, prompt), before)


def test_progress_counts_the_tokens(client):
    prompt = fresh(width=1024, height=768)
    sampler = the(prompt, "GLMImageSampleTokens")
    seen = []

    def note(event):
        if event["type"] == "progress" and event["data"]["node"] == sampler:
            seen.append((event["data"]["value"], event["data"]["max"]))

    client.run(prompt, note)
    total = int((24 / 32) ** 0.5 * 16) * int((32 / 24) ** 0.5 * 16) + 24 * 32
    assert {maximum for _, maximum in seen} == {total}
    counts = [done for done, _ in seen]
    assert counts == sorted(counts)
    assert len(set(counts)) >= 5
    assert counts[-1] == total


def test_the_first_of_a_batch_is_the_single_picture(client, picture):
    prompt = fresh(batch_size=2)
    run = client.run(prompt)
    assert len(client.images(run, the(prompt, "SaveImage"))) == 2
    both = first_image(client, run, prompt)
    # A batch sums in another order, so a value between two of the 256 levels may round otherwise.
    np.testing.assert_allclose(picture(changed(prompt, batch_size=1)), both, atol=1)


def test_a_split_batch_is_the_same_pictures(client):
    prompt = fresh(batch_size=2)
    save = the(prompt, "SaveImage")
    together = client.images(client.run(prompt), save)
    apply = the(prompt, "GLMImageApplyTokens")
    outputs = {"positive": 0, "negative": 1, "latent": 2}
    split = add(prompt, "GLMImageSplitBatch", **{name: [apply, i] for name, i in outputs.items()})
    for i in outputs.values():
        relink(prompt, (apply, i), (split, i))
    run = client.run(prompt)
    assert the(prompt, "GLMImageSampleTokens") in run.cached
    for alone, one in zip(client.images(run, save), together, strict=True):
        np.testing.assert_allclose(pixels(alone), pixels(one), atol=1)
    assert abs(pixels(together[0]) - pixels(together[1])).max() > 1


@pytest.fixture
def from_image(base):
    """The KSampler workflow on a picture that is scaled to (width, height)."""
    image = Image.linear_gradient("L").convert("RGB")
    image.save(base / "input" / "gradient.png")

    def prompt(tokens_of: tuple[int, int], scaled_to: tuple[int, int]) -> Prompt:
        prompt = fresh(name="text_to_image_ksampler", denoise=0.5)
        (sampler, vae) = the(prompt, "GLMImageSampleTokens"), the(prompt, "GLMImageLoadVAE")
        prompt[sampler]["inputs"].update(zip(("width", "height"), tokens_of, strict=True))
        image = add(prompt, "LoadImage", image="gradient.png")
        width, height = scaled_to
        size = {"width": width, "height": height, "crop": "center"}
        scaled = add(prompt, "ImageScale", image=[image, 0], upscale_method="lanczos", **size)
        encoded = add(prompt, "VAEEncode", pixels=[scaled, 0], vae=[vae, 0])
        prompt[the(prompt, "KSampler")]["inputs"]["latent_image"] = [encoded, 0]
        return prompt

    return prompt


@pytest.mark.parametrize(
    ("tokens_of", "scaled_to", "node"),
    [
        ((500, 333), (500, 333), "GLMImageSampleTokens"),
        ((512, 352), (500, 333), "KSampler"),
    ],
)
def test_a_size_between_multiples_is_refused(client, from_image, tokens_of, scaled_to, node):
    prompt = from_image(tokens_of, scaled_to)
    with pytest.raises(PromptError, match=r"512 ?x ?352.* GLM-Image Crop To Size") as refusal:
        client.run(prompt)
    assert refusal.value.node_id == the(prompt, node)


def test_a_size_between_multiples_is_cropped_from_the_next(client, picture, from_image):
    prompt = from_image((512, 352), (512, 352))
    whole = picture(prompt)
    decoded = the(prompt, "VAEDecode")
    crop = add(prompt, "GLMImageCropToSize", image=[decoded, 0], width=500, height=333)
    relink(prompt, (decoded, 0), (crop, 0))
    np.testing.assert_array_equal(picture(prompt), whole[9:342, 6:506])
    prompt[crop]["inputs"]["height"] = 360
    with pytest.raises(PromptError, match="512x352 pixels cannot be cropped to 500x360") as refusal:
        client.run(prompt)
    assert refusal.value.node_id == crop


def test_sampler_custom_advanced_gives_the_same_picture(picture):
    prompt = fresh(steps=4)
    expected = picture(prompt)
    decode = prompt[the(prompt, "GLMImageDecode")]["inputs"]
    model, latent = decode["model"], decode["latent"]
    noise = add(prompt, "RandomNoise", noise_seed=decode["seed"])
    guider = add(
        prompt,
        "CFGGuider",
        model=model,
        positive=decode["positive"],
        negative=decode["negative"],
        cfg=decode["cfg"],
    )
    sampler = add(prompt, "KSamplerSelect", sampler_name="euler")
    sigmas = add(
        prompt, "GLMImageScheduler", model=model, latent=latent, steps=decode["steps"], denoise=1.0
    )
    custom = add(
        prompt,
        "SamplerCustomAdvanced",
        noise=[noise, 0],
        guider=[guider, 0],
        sampler=[sampler, 0],
        sigmas=[sigmas, 0],
        latent_image=latent,
    )
    relink(prompt, (the(prompt, "GLMImageDecode"), 0), (custom, 0))
    np.testing.assert_array_equal(picture(prompt), expected)


def test_the_words_in_quotes_change_the_picture(picture):
    prompt = fresh(prompt='a sign that reads "OPEN"')
    texts = the(prompt, "GLMImageGlyphEncode")
    before = picture(prompt)
    prompt[texts]["inputs"]["texts"] = "SHUT"
    assert (picture(prompt) != before).any()
    prompt[texts]["inputs"]["texts"] = "OPEN"
    np.testing.assert_array_equal(picture(prompt), before)


def test_what_is_rendered_stays_at_the_node(client, base):
    prompt = fresh(value="It's a cat's sign, «OPEN»")
    glyphs, tokens = the(prompt, "GLMImageGlyphEncode"), the(prompt, "GLMImageSampleTokens")
    run = client.run(prompt)
    history = json.loads(client.get(f"/history/{run.prompt_id}"))[run.prompt_id]["outputs"]
    title, rendered, apostrophe, quotes = history[glyphs]["text"]
    assert (title, rendered) == ("Text to render:", "s a cat")
    assert apostrophe.startswith("The apostrophe in It's, cat's counts as a quote")
    assert quotes.startswith("«OPEN» will not be rendered")
    (size,) = history[tokens]["text"]
    assert size.startswith("The image is 96x64, and GLM-Image was trained")
    log = (base / "server.log").read_text()
    assert all(sentence in log for sentence in (apostrophe, quotes, size))


def test_clip_text_encode_works_on_the_glyph_encoder(picture):
    prompt = fresh(prompt='a sign that reads "OPEN"')
    expected = picture(prompt)
    glyphs = the(prompt, "GLMImageGlyphEncode")
    inputs = prompt[glyphs]["inputs"]
    native = add(prompt, "CLIPTextEncode", clip=inputs["clip"], text=inputs["prompt"])
    relink(prompt, (glyphs, 0), (native, 0))
    np.testing.assert_array_equal(picture(prompt), expected)


def test_tiled_decode(client: Client, picture):
    prompt = fresh(width=640, height=64)
    whole = picture(prompt)
    decode = prompt[the(prompt, "VAEDecode")]
    decode["class_type"] = "VAEDecodeTiled"
    decode["inputs"] |= {
        "tile_size": 512,
        "overlap": 64,
        "temporal_size": 64,
        "temporal_overlap": 8,
    }
    tiled = picture(prompt)
    assert tiled.shape == whole.shape
    # Convolutions end at a tile's edge and group norms differ by tile: alike, not equal.
    assert np.corrcoef(tiled.ravel(), whole.ravel())[0, 1] > 0.9
