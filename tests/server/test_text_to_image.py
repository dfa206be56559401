"""Text to image through a real server: which stages run, their progress, their images."""

import numpy as np
import pytest
from glm_image.scripts.client import Client
from graphs import add, changed, fresh, relink, the, upstream
from pictures import first_image

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
