"""The stored workflows of layouts and tiles, and the live preview while they run."""

import base64
import io
import itertools
import struct
import time

import numpy as np
import pytest
from glm_image.glm_core.data.token_file import load_tokens
from glm_image.glm_core.data.token_image import DARK
from glm_image.scripts import environment, host
from glm_image.scripts.client import Client, PromptError
from graphs import add, changed, fresh, the, upstream
from PIL import Image
from safetensors.torch import load_file

TRAINED = "Trained"
NAMES = (
    "lock_layout_change_prompt",
    "lock_region_resample_rest",
    "compose_two_layouts",
    "redo_region",
)


def images(client, run, prompt, class_type="SaveImage"):
    return images_of(client, run, the(prompt, class_type))


def images_of(client, run, node_id):
    return [
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        for data in client.images(run, node_id)
    ]


def titled(prompt, title):
    """The id of the only node of a title."""
    (node_id,) = (key for key, node in prompt.items() if node["_meta"]["title"] == title)
    return node_id


def seeds_apart(prompt):
    """Gives each sampler its own seed, as in the stored workflow."""
    samplers = [
        node["inputs"] for node in prompt.values() if isinstance(node["inputs"].get("seed"), int)
    ]
    for i, inputs in enumerate(samplers):
        inputs["seed"] = inputs["seed"] * 100 + i
    return prompt


@pytest.mark.parametrize("name", NAMES)
def test_it_paints_and_a_new_decoder_seed_samples_nothing(client, name):
    prompt = seeds_apart(fresh(name=name))
    run = client.run(prompt)
    (picture,) = images(client, run, prompt)
    assert picture.shape == (64, 96, 3)
    assert picture.std() > 1
    (shown,) = (
        key
        for key, node in prompt.items()
        if node["class_type"] in ("GLMImageShowTokens", "PreviewImage")
    )
    assert len(images_of(client, run, shown)) == 1
    decode = max(
        (key for key, node in prompt.items() if node["class_type"] == "GLMImageDecode"), key=int
    )
    prompt[decode]["inputs"]["seed"] = 12345  # in place of a link to the seed of both
    again = client.run(prompt)
    assert decode in again.executed
    assert not [k for k in again.executed if "Sample" in prompt[k]["class_type"]]


def test_contact_sheet_and_the_chosen_picture(client):
    prompt = fresh(name="layout_contact_sheet")
    run = client.run(prompt)
    pictures = [
        np.asarray(Image.open(io.BytesIO(data))).astype(int)
        for data in client.images(run, titled(prompt, "Small pictures"))
    ]
    assert len(pictures) == 8
    assert {picture.shape for picture in pictures} == {(13 * 32, 19 * 32, 3)}
    assert all((a != b).any() for a, b in itertools.pairwise(pictures))
    (sheet,) = client.images(run, titled(prompt, "Layouts"))
    # 3 x 3 layouts of 13 x 19 cells of 16 pixels, 8 pixels apart
    assert Image.open(io.BytesIO(sheet)).size == (3 * 19 * 16 + 2 * 8, 3 * 13 * 16 + 2 * 8)
    (first,) = images(client, run, prompt)

    prompt[titled(prompt, "Choose one")]["inputs"]["batch_index"] = 5
    again = client.run(prompt)
    assert the(prompt, "GLMImageSampleLayout") in again.cached
    assert titled(prompt, "Decode small pictures") in again.cached
    (other,) = images(client, again, prompt)
    assert first.shape == other.shape == (64, 96, 3)
    assert (first != other).any()


def test_layouts_by_hand(client):
    """The layouts alone, then a picture in which the cells that were named have stayed."""
    prompt = seeds_apart(fresh(name="layouts_by_hand", steps=1))
    lock, layouts = (the(prompt, f"GLMImage{name}") for name in ("LockLayout", "SampleLayout"))
    prompt[layouts]["inputs"]["batch_size"] = 2
    alone = client.run({key: prompt[key] for key in upstream(prompt, lock)})
    (shown,) = alone.outputs[lock]["glm_grids"]
    assert (shown["rows"], shown["columns"], shown["count"]) == (13, 19, 2)
    assert len(alone.outputs[lock]["glm_images"]) == 2

    prompt[lock]["inputs"].update(batch_index=1, cells="0-12:0-9")
    used = add(prompt, "GLMImageLockLayout", layout=[the(prompt, "GLMImageSampleTokens"), 1],
               lock="none", batch_index=0)  # fmt: skip
    run = client.run(prompt)
    assert layouts in run.cached
    (after,) = run.outputs[used]["glm_grids"]
    assert after["given"] == "0-12:0-9"
    before, after = colours(shown)[1], colours(after)[0]
    np.testing.assert_array_equal(after[:, :10], before[:, :10])
    assert (after[:, 10:] != before[:, 10:]).any()

    prompt[lock]["inputs"]["cells"] = "0-13:0"
    with pytest.raises(PromptError, match="names row 13, but the grid has the rows 0 to 12"):
        client.run(prompt)


def colours(grid):
    """uint8 [count, rows, columns, 3] of an entry of `glm_grids`"""
    raw = np.frombuffer(base64.b64decode(grid["colours"]), dtype=np.uint8)
    return raw.reshape(grid["count"], grid["rows"], grid["columns"], 3)


def test_another_prompt_and_seed_keep_the_locked_region(client):
    prompt = fresh(name="lock_region_resample_rest")
    client.run(prompt)
    prompt[titled(prompt, "Prompt")]["inputs"]["value"] = "something else"
    prompt[titled(prompt, "Seed")]["inputs"]["value"] += 1
    run = client.run(prompt)
    assert titled(prompt, "Lock the region") in run.cached
    assert titled(prompt, "Four layouts around the region") in run.executed


def test_the_layout_stays_under_the_new_prompt(client):
    prompt = seeds_apart(fresh(name="lock_layout_change_prompt"))
    tokens = the(prompt, "GLMImageSampleTokens")
    shown = the(prompt, "GLMImageShowTokens")
    used = add(prompt, "GLMImageShowTokens", layout=[tokens, 1], ar=["1", 0], cell_size=16)
    run = client.run(prompt)
    before, after = (
        np.asarray(Image.open(io.BytesIO(client.images(run, node)[0]))) for node in (shown, used)
    )
    np.testing.assert_array_equal(after, before)
    assert (before == 255).all(axis=-1).mean() > 0.2  # every cell is outlined


def test_a_redone_region_leaves_the_rest_untouched(client, base):
    prompt = seeds_apart(fresh(name="redo_region", width=256, height=256, steps=4))
    nodes = {"before": "Decode first picture", "after": "Decode the region"}
    for name, title in nodes.items():
        samples = [titled(prompt, title), 0]
        prompt[str(len(prompt) + 1)] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": samples, "filename_prefix": f"region/{name}"},
            "_meta": {"title": name},
        }
    run = client.run(prompt)
    before, after = (
        load_file(max((base / "output" / "region").glob(f"{name}*.latent")))["latent_tensor"]
        for name in nodes
    )
    changed_cells = (after - before).abs().amax(dim=(0, 1)) > 1e-4
    assert before.shape[-2:] == (32, 32)
    assert changed_cells[8:24, 16:].float().mean() > 0.9
    changed_cells[8:24, 16:] = False
    assert not changed_cells.any()
    # The VAE sees a little beyond the region: far from it, pixels change by rounding only.
    (old,), (new,) = (images(client, run, prompt, kind) for kind in ("PreviewImage", "SaveImage"))
    moved = np.abs(new - old).max(axis=-1)
    assert moved[64:192, 128:].mean() > 5 * moved[:, :64].mean()


# ---- beyond the edges, twice the size ----------------------------------------------------------


def test_an_extended_picture_keeps_its_cells_and_pixels(client, base):
    """64x64 pixels grow by 32 on the left and 64 at the top."""
    prompt = fresh(name="extend_picture", width=64, height=64, steps=4)
    canvas, seam, read, write = (
        titled(prompt, title)
        for title in (
            "Grow the canvas",
            "Unlock the seam of the layout",
            "GLM-Image Encode Tokens",
            "Write the new cells",
        )
    )
    prompt[canvas]["inputs"] |= {"left": 32, "top": 64, "right": 0, "bottom": 0, "feathering": 8}
    prompt[seam]["inputs"]["expand"] = 8  # a cell of this layout has seven pixels
    shown = add(prompt, "PreviewImage", images=[canvas, 0])
    savers = [
        add(prompt, "GLMImageSaveTokens", tokens=[node, 0], layout=[node, 1], filename_prefix=name)
        for name, node in (("read", read), ("written", write))
    ]
    run = client.run(prompt)
    (picture,), (grey,) = (
        images_of(client, run, node) for node in (the(prompt, "SaveImage"), shown)
    )
    assert picture.shape == grey.shape == (128, 96, 3)
    inner = slice(64 + 8, None), slice(32 + 8, None)  # the seam is as wide as the feathering
    assert (picture[inner] == grey[inner]).all()
    new = np.ones(picture.shape[:2], dtype=bool)
    new[64:, 32:] = False
    assert grey[new].std() < 1
    assert picture[new].std() > 5

    (before, old), (after, layout) = (
        load_tokens(base / "output" / run.outputs[node]["tokens"][0]["filename"]) for node in savers
    )
    assert (after.tokens[:, 2:, 1:] == before.tokens[:, 2:, 1:]).all()
    assert (after.tokens != before.tokens).any()
    assert 0 < layout.locked.sum() < layout.locked.numel()
    assert (layout.preview == old.preview)[:, layout.locked].all()


def test_the_same_picture_at_twice_the_size(client):
    """It is nearer to the enlarged picture, as the VAE has it, than one of its tokens alone."""
    prompt = fresh(name="upscale_by_tokens", steps=4)
    first, vae = titled(prompt, "Decode the first picture"), the(prompt, "GLMImageLoadVAE")
    enlarged = add(prompt, "VAEDecode", samples=[the(prompt, "VAEEncode"), 0], vae=[vae, 0])
    shown = add(prompt, "PreviewImage", images=[enlarged, 0])
    run = client.run(prompt)
    (large,), (plain,) = (
        images_of(client, run, node) for node in (the(prompt, "SaveImage"), shown)
    )
    anew = client.run(changed(prompt, denoise=1.0))
    assert first in anew.cached
    (other,) = images(client, anew, prompt)
    assert large.shape == plain.shape == (128, 192, 3)
    assert 0 < np.abs(large - plain).mean() < 0.5 * np.abs(other - plain).mean()


# ---- tiles -----------------------------------------------------------------------------------


def at_and_beside_borders(picture, borders):
    """The mean step from column to column across the tiles' borders, and everywhere else."""
    steps = np.abs(np.diff(picture, axis=1)).mean(axis=(0, 2))
    beside = np.ones(len(steps), dtype=bool)
    beside[[border - 1 for border in borders]] = False
    return steps[~beside].mean(), steps[beside].mean()


def test_an_upscaled_picture_shows_no_borders_of_tiles(client):
    """96x64 pixels times 1.75 in tiles of 96x64, which begin at column 0 and 72, row 0 and 48."""
    prompt = fresh(name="upscale_in_tiles", denoise=0.6)
    (picture,) = images(client, client.run(prompt), prompt)
    assert picture.shape == (112, 168, 3)
    for way in (picture, picture.swapaxes(0, 1)):
        borders = (72, 96) if way is picture else (48, 64)
        at, beside = at_and_beside_borders(way, borders)
        assert at < 1.5 * beside

    for node in prompt.values():  # with hard edges, the same measure finds them
        if node["class_type"] == "FeatherMask":
            node["inputs"].update(left=0, top=0)
    run = client.run(prompt)
    assert not [k for k in run.executed if prompt[k]["class_type"].startswith("GLMImage")]
    (hard,) = images(client, run, prompt)
    at, beside = at_and_beside_borders(hard, (72,))
    assert at > 2 * beside


# ---- live preview ----------------------------------------------------------------------------


def previews(client, prompt, on_event=lambda event: None):
    """(time, picture) of every live preview of a run."""
    seen = []

    def note(message):
        (event,) = struct.unpack(">I", message[:4])
        assert event == 1  # a picture; the next four bytes are its format
        seen.append((time.monotonic(), Image.open(io.BytesIO(message[8:]))))

    client.run(prompt, on_event, on_picture=note)
    return seen


@pytest.fixture(scope="module")
def previewing(base):
    """A server with previews on, which has the trained model as well."""
    host.add_model(base, environment.ROOT / "tiny", TRAINED)
    flags = ("--preview-method", "auto")
    with host.serve(environment.host(), base, *flags, threads=1) as address:
        yield Client(address, timeout_s=120)
    (base / "models" / "glm_image" / TRAINED).unlink()


def long_run():
    """A prompt that only writes tokens, 32 x 32 for each of a batch: about two seconds."""
    prompt = fresh(batch_size=2, width=1024, height=1024)
    tokens = the(prompt, "GLMImageSampleTokens")
    writing = {key: prompt[key] for key in (tokens, "1", "5")}
    add(writing, "GLMImageSaveTokens", tokens=[tokens, 0], filename_prefix="tokens/live")
    return writing


def test_the_grid_fills_in_a_live_preview(previewing):
    seen = previews(previewing, long_run())
    times = [at for at, _ in seen]
    assert len(seen) >= 3
    assert len(seen) <= 4 * (times[-1] - times[0]) + 2
    pictures = [np.asarray(picture.convert("L")).astype(int) for _, picture in seen]
    assert all(256 < max(picture.shape) <= 512 for picture in pictures)
    dark = round(255 * DARK)
    for picture in pictures:  # written rows are above unwritten ones
        written = (picture != dark).any(axis=1)
        assert written[: written.sum()].mean() > 0.9
    assert any((picture == dark).mean() > 0.3 for picture in pictures)


def painting(client, model, seed):
    """The last live preview of Decode, and the finished picture at the preview's size."""
    prompt = fresh(width=256, height=192, steps=4, value="a red circle and a blue square")
    changed(prompt, model_name=model, seed=seed)
    decode, running, forming = the(prompt, "GLMImageDecode"), [], []

    def note(event):
        running.append(event["data"].get("node"))

    def keep(message):
        if running[-1] == decode:
            forming.append(Image.open(io.BytesIO(message[8:])))

    run = client.run(prompt, note, keep)
    if not forming:
        return None, None
    (picture,) = client.images(run, the(prompt, "SaveImage"))
    last = forming[-1].convert("RGB")
    finished = (
        Image.open(io.BytesIO(picture)).convert("RGB").resize(last.size, Image.Resampling.BOX)
    )
    return tuple(np.asarray(image).astype(float) for image in (last, finished))


def test_the_picture_forms_in_the_live_preview_of_decode(previewing):
    last, finished = painting(previewing, TRAINED, 1)
    assert last.shape[1] / last.shape[0] == pytest.approx(4 / 3)
    correlation = np.corrcoef(last.ravel(), finished.ravel())[0, 1]
    assert correlation > 0.95  # 0.993 was measured


def test_another_models_colours_are_fitted_once_its_vae_has_been_used(previewing, base):
    assert painting(previewing, "GLM-Image", 2) == (None, None)  # none is known yet
    kept = list((base / "user" / "__glm_image" / "latent_rgb").iterdir())
    assert len(kept) == 1
    written = kept[0].stat().st_mtime_ns
    last, _ = painting(previewing, "GLM-Image", 3)
    assert last.shape[1] / last.shape[0] == pytest.approx(4 / 3)
    assert kept[0].stat().st_mtime_ns == written


def test_no_live_preview_where_previews_are_off(client):
    assert previews(client, long_run()) == []
