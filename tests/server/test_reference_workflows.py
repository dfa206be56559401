"""Reference workflows through a real server: images, caching, refusals."""

import itertools
import json

import numpy as np
import pytest
from glm_image.scripts.client import PromptError
from graphs import WORKFLOWS, add, changed, fresh, relink, the
from pictures import first_image
from PIL import Image

_seeds = itertools.count(50_000)
ONCE = ("GLMImageEncodeReference", "GLMImageReferenceCache")
LINKED_SIZE = "edit_image"  # takes the size of its picture; the others get a small one


def reference_workflow(name, image="small.png"):
    """A stored workflow on a picture of 512 pixels, with two steps and unused seeds."""
    prompt = json.loads((WORKFLOWS / f"{name}.json").read_text())
    size = {} if name == LINKED_SIZE else {"width": 96, "height": 64}
    return changed(prompt, steps=2, seed=next(_seeds), image=image, **size)


@pytest.fixture(scope="module", autouse=True)
def pictures(base):
    """Pictures for Load Image: gradients, so that a changed reference shows."""
    rows, columns = np.mgrid[:512, :512] // 2
    gradient = np.stack([rows, columns, 255 - rows], axis=-1).astype(np.uint8)
    for name, pixels in (
        ("small.png", gradient),
        ("other.png", gradient[::-1].copy()),
        ("tiny.png", gradient[:20, :40]),
        ("strip.png", gradient[:100]),
    ):
        Image.fromarray(pixels).save(base / "input" / name)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (LINKED_SIZE, (512, 512, 3)),
        ("style_transfer", (64, 96, 3)),
        ("two_references", (64, 96, 3)),
        ("layout_from_sketch", (64, 96, 3)),
    ],
)
def test_stored_workflow_paints(client, name, shape):
    prompt = reference_workflow(name)
    image = first_image(client, client.run(prompt), prompt)
    assert image.shape == shape
    assert image.std() > 1


def test_the_size_that_was_read_stays_at_the_node(client):
    prompt = reference_workflow("style_transfer")
    outputs = client.run(prompt).outputs
    text = outputs[the(prompt, "GLMImageEncodeReference")]["text"]
    assert text == ["512 x 512 read as it is; 1 reference a sample"]


def test_a_second_prompt_and_seed_encode_and_cache_nothing(client):
    prompt = reference_workflow("style_transfer")
    client.run(prompt)
    changed(prompt, prompt="another prompt", seed=next(_seeds))
    run = client.run(prompt)
    assert {the(prompt, node) for node in ONCE} <= run.cached
    assert the(prompt, "GLMImageSampleTokens") in run.executed


def test_another_lora_caches_again(client):
    prompt = reference_workflow("style_transfer")
    client.run(prompt)
    decoder = the(prompt, "GLMImageLoadDecoder")
    lora = add(
        prompt,
        "LoraLoaderModelOnly",
        model=[decoder, 0],
        lora_name="native.safetensors",
        strength_model=1.0,
    )
    relink(prompt, (decoder, 0), (lora, 0))
    run = client.run(prompt)
    assert the(prompt, "GLMImageEncodeReference") in run.cached
    assert the(prompt, "GLMImageReferenceCache") in run.executed


def test_another_reference_changes_the_picture(client):
    prompt = reference_workflow("style_transfer")
    before = first_image(client, client.run(prompt), prompt)
    changed(prompt, image="other.png")
    assert (first_image(client, client.run(prompt), prompt) != before).any()


@pytest.mark.parametrize(
    ("image", "sentence"),
    [("tiny.png", "40x20 pixels.*at least 32"), ("strip.png", "512x100.*aspect of 5.12.*crop")],
)
def test_pictures_that_cannot_be_references(client, picture, image, sentence):
    prompt = reference_workflow("style_transfer", image=image)
    with pytest.raises(PromptError, match=sentence) as refusal:
        client.run(prompt)
    assert refusal.value.node_id == the(prompt, "GLMImageEncodeReference")
    assert picture(fresh()).std() > 1


def test_references_and_a_layout(client, picture):
    prompt = reference_workflow("style_transfer")
    sampler = the(prompt, "GLMImageSampleTokens")
    layout = add(prompt, "GLMImageSampleLayout")
    shared = {k: v for k, v in prompt[sampler]["inputs"].items() if k != "references"}
    prompt[layout]["inputs"] = shared
    prompt[sampler]["inputs"]["layout"] = [layout, 0]
    with pytest.raises(PromptError, match="cannot be used together") as refusal:
        client.run(prompt)
    assert refusal.value.node_id == sampler
    assert picture(fresh()).std() > 1


def test_a_cache_of_another_decoder(client, picture):
    prompt = reference_workflow("style_transfer")
    lora = add(
        prompt,
        "LoraLoaderModelOnly",
        model=[the(prompt, "GLMImageLoadDecoder"), 0],
        lora_name="native.safetensors",
        strength_model=1.0,
    )
    decode = the(prompt, "GLMImageDecode")
    prompt[decode]["inputs"]["model"] = [lora, 0]
    with pytest.raises(PromptError, match="another decoder or with other LoRAs") as refusal:
        client.run(prompt)
    assert refusal.value.node_id == decode
    assert picture(fresh()).std() > 1


def test_references_of_another_checkpoint(client, picture):
    prompt = reference_workflow("style_transfer")
    prompt[the(prompt, "GLMImageLoadAR")]["inputs"]["model_name"] = "Wide"
    with pytest.raises(PromptError, match="codebook of 96") as refusal:
        client.run(prompt)
    assert refusal.value.node_id == the(prompt, "GLMImageReferenceCache")
    assert picture(fresh()).std() > 1


def test_tokens_of_edits_in_a_list_are_saved_though_they_have_no_layout(client):
    prompt = reference_workflow("style_transfer")
    encode = the(prompt, "GLMImageEncodeReference")
    image = prompt[encode]["inputs"]["image"]
    both = add(prompt, "ImageBatch", image1=image, image2=image)
    single = add(prompt, "RebatchImages", images=[both, 0], batch_size=1)
    prompt[encode]["inputs"]["image"] = [single, 0]
    sampler = the(prompt, "GLMImageSampleTokens")
    prompt[sampler]["inputs"]["rows"] = 2
    saver = add(prompt, "GLMImageSaveTokens", tokens=[sampler, 0], filename_prefix="edits")
    shown = add(prompt, "GLMImageShowTokens", layout=[sampler, 1], cell_size=8)
    events = []
    with pytest.raises(PromptError, match="no preview stage") as refusal:
        client.run(prompt, events.append)
    assert refusal.value.node_id == shown
    saved = [e["data"] for e in events if e["type"] == "executed" and e["data"]["node"] == saver]
    assert len(saved[0]["output"]["tokens"]) == 2


def test_an_edits_layout_is_blocked_with_a_sentence(client, picture):
    prompt = reference_workflow("style_transfer")
    add(
        prompt,
        "GLMImageSaveTokens",
        tokens=[the(prompt, "GLMImageSampleTokens"), 0],
        layout=[the(prompt, "GLMImageSampleTokens"), 1],
        filename_prefix="edit",
    )
    with pytest.raises(PromptError, match="no preview stage"):
        client.run(prompt)
    assert picture(fresh()).std() > 1
