"""Layouts through the nodes: sampled, locked, composed, shown, and used by the sampler."""

from dataclasses import replace

import comfy.utils
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from glm_image.glm_core.data.token_image import codebook_palette, draw_sheet, hash_palette
from glm_image.glm_core.errors import GLMImageError
from helpers import run_sampler, same, sampled

PROMPT = "a door with 'PULL' on it"
SIZES = {"512x768": (512, 768), "strip": (384, 128)}  # width, height


@pytest.fixture
def run(nodes):
    return lambda node_id, *args, **kwargs: (
        nodes[f"GLMImage{node_id}"].execute(*args, **kwargs).result
    )


@pytest.fixture(scope="module")
def ar(nodes):
    return nodes["GLMImageLoadAR"].execute("small", "default").result[0]


@pytest.fixture(scope="module")
def wide_ar(nodes):
    return nodes["GLMImageLoadAR"].execute("wide", "default").result[0]


@pytest.fixture
def sample(nodes, ar):
    """The outputs of Sample Tokens or Sample Layout at a size."""

    def call(node, size=(96, 64), seed=5, batch=1, prompt=PROMPT, temperature=0.9, **kwargs):
        arguments = (prompt, *size, seed, temperature, 0.75, 0, batch)
        model = kwargs.pop("model", ar)
        return sampled(nodes[f"GLMImageSample{node}"], model, *arguments, **kwargs)

    return call


@pytest.fixture
def totals(monkeypatch):
    """(done, total) of every progress report so far."""
    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: seen.append((done, total))
    )
    return seen


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 4])
def test_own_layout_locked_gives_the_same_tokens(run, sample, size, batch):
    tokens, layout = sample("Tokens", SIZES[size], batch=batch)
    assert not layout.locked.any()
    (locked,) = run("LockLayout", layout, "whole", -1)
    again, used = sample("Tokens", SIZES[size], layout=locked)
    assert same(again.tokens, tokens.tokens)
    assert same(used.preview, layout.preview)
    assert used.locked.all()


def test_a_wholly_locked_run_has_a_step_for_each_large_cell_alone(run, sample, totals):
    (layout,) = sample("Layout", (1024, 1024))
    assert totals[-1] == (256, 256)
    (locked,) = run("LockLayout", layout, "whole", 0)
    sample("Tokens", (1024, 1024), layout=locked)
    assert totals[-1] == (1024, 1024)


def test_a_batch_of_layouts_is_single_ones_and_the_samplers_own(sample):
    (layouts,) = sample("Layout", batch=3)
    assert same(layouts.preview, sample("Tokens", batch=3)[1].preview)
    for i in range(3):
        (single,) = sample("Layout", seed=5 + i)
        assert same(layouts.preview[i : i + 1], single.preview)


def test_locked_cells_survive_and_the_others_do_not(run, sample):
    (layout,) = sample("Layout")
    mask = torch.zeros(1, 10, 10)
    mask[:, :5] = 1
    (locked,) = run("LockLayout", layout, "masked", 0, mask)
    cells = locked.locked
    assert 0 < cells.sum() < cells.numel()
    drawn = []
    for changes in ({"seed": 6}, {"seed": 7}, {"prompt": "fog"}, {"temperature": 3.0}):
        (again,) = sample("Layout", layout=locked, **changes)
        assert torch.equal(again.preview[:, cells], layout.preview[:, cells])
        assert torch.equal(again.locked, cells)
        assert same(sample("Tokens", layout=locked, **changes)[1].preview, again.preview)
        drawn.append(again.preview[:, ~cells])
    assert not torch.equal(drawn[0], drawn[1])


def test_unlocked_layouts_set_only_the_number_of_samples(sample):
    (layouts,) = sample("Layout", seed=90, batch=2)
    assert same(sample("Tokens", layout=layouts)[1].preview, sample("Layout", batch=2)[0].preview)


def test_layouts_times_batch_size(run, sample):
    """Sample i has layout i modulo their number, and draws with seed + i."""
    (layouts,) = sample("Layout", seed=90, batch=2)
    (locked,) = run("LockLayout", layouts, "whole", -1)
    tokens, used = sample("Tokens", layout=locked, batch=3)
    assert same(used.preview, torch.cat([layouts.preview] * 3))
    for i in (1, 4):
        (one,) = run("LockLayout", layouts, "whole", i % 2)
        assert same(sample("Tokens", layout=one, seed=5 + i)[0].tokens, tokens.tokens[i : i + 1])


def test_a_region_is_drawn_anew(run, sample):
    size = (256, 256)
    tokens, layout = sample("Tokens", size)
    mask = torch.zeros(1, 256, 256)
    mask[:, 64:192, 64:192] = 1
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 2:6] = True
    (locked,) = run("LockLayout", layout, "whole", 0)
    again, _ = sample("Tokens", size, seed=6, layout=locked, tokens=tokens, mask=mask)
    assert torch.equal(again.tokens[:, ~inside], tokens.tokens[:, ~inside])
    assert (again.tokens != tokens.tokens)[:, inside].sum() >= 8


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_region_of_nothing_or_of_all(run, sample, value, totals):
    tokens, layout = sample("Tokens")
    (locked,) = run("LockLayout", layout, "whole", 0)
    totals.clear()
    mask = torch.full((1, 64, 64), value)
    again, _ = sample("Tokens", seed=6, layout=locked, tokens=tokens, mask=mask)
    free = sample("Tokens", seed=6, layout=locked)[0]
    assert same(again.tokens, free.tokens if value else tokens.tokens)
    assert same(free.tokens, tokens.tokens) is False


def test_tokens_of_a_batch_with_one_layout_each(run, sample):
    tokens, layouts = sample("Tokens", batch=2)
    (locked,) = run("LockLayout", layouts, "whole", -1)
    mask = torch.zeros(1, 2, 3)
    mask[:, 1] = 1
    again, _ = sample("Tokens", seed=6, layout=locked, tokens=tokens, mask=mask)
    assert same(again.tokens[:, 0], tokens.tokens[:, 0])
    three = sample("Tokens", batch=3)[0]
    with pytest.raises(GLMImageError, match="2 layouts and 3 images in tokens"):
        sample("Tokens", layout=locked, tokens=three, mask=mask)


def test_cells_name_the_region_as_a_mask_does(run, sample):
    """Rows 1 and 2 of columns 0 and 1, and nothing of the mask that cells replace."""
    tokens, layout = sample("Tokens", (128, 128))
    mask = torch.zeros(1, 4, 4)
    mask[:, 1:3, :2] = 1
    (locked,) = run("LockLayout", layout, "whole", 0)
    given = {"temperature": 3.0, "tokens": tokens, "layout": locked}
    masked, _ = sample("Tokens", (128, 128), mask=mask, **given)
    named, _ = sample("Tokens", (128, 128), cells="1-2:0-1", mask=1 - mask, **given)
    assert same(named.tokens, masked.tokens)
    assert named.info["forced"] == masked.info["forced"] == "0:0-3; 1-2:2-3; 3:0-3"
    assert not same(named.tokens, tokens.tokens)


def test_cells_of_the_source_are_pasted(run, sample):
    base, source = (sample("Layout", (512, 512), seed=seed)[0] for seed in (1, 2))
    (composed,) = run("ComposeLayouts", base, source, 2, 0, torch.ones(1, 8, 8), "0-3:12-15")
    wanted = base.preview.clone()
    wanted[:, 2:6, 12:16] = source.preview[:, 0:4, 12:16]
    assert same(composed.preview, wanted)
    with pytest.raises(GLMImageError, match="names row 16, but the grid has the rows 0 to 15"):
        run("ComposeLayouts", base, source, 0, 0, None, "16:0")


def test_tokens_are_composed_on_a_layouts_link(nodes, run, sample):
    """Layout To Tokens gives them the type of tokens again; the node shows both."""
    base, source = (sample("Tokens", seed=seed, batch=batch)[0] for seed, batch in ((1, 2), (2, 1)))
    made = nodes["GLMImageComposeLayouts"].execute(base, source, 1, -1, None, "0:1-2")
    (tokens,) = run("LayoutToTokens", made.result[0])
    wanted = base.tokens.clone()
    wanted[:, 1, :2] = source.tokens[:, 0, 1:]
    assert same(tokens.tokens, wanted)
    assert (tokens.width, tokens.height, tokens.info) == (96, 64, {})
    pasted, onto = made.ui["glm_grids"]
    assert (pasted["kind"], pasted["marked"], pasted["given"]) == ("tokens", "0:1-2", "*")
    assert (pasted["row"], pasted["column"], pasted["total"], onto["total"]) == (1, -1, 1, 2)
    (layout,) = sample("Layout")
    for given in ((base, layout), (layout, base)):
        with pytest.raises(GLMImageError, match="connect two layouts, or the tokens of two pict"):
            run("ComposeLayouts", *given, 0, 0)


def test_cells_that_name_no_cell_of_tokens(sample):
    tokens, _ = sample("Tokens")
    with pytest.raises(GLMImageError, match="names column 3, but the grid has the columns 0 to 2"):
        sample("Tokens", tokens=tokens, cells="0:3")
    with pytest.raises(GLMImageError, match="cells is '0:3' and no tokens are connected"):
        sample("Tokens", cells="0:3")


def test_a_loaded_file_says_its_size_and_prompt(nodes, run, sample):
    tokens, _ = sample("Tokens")
    for kept, prompt in ((tokens, PROMPT), (replace(tokens, info={"prompt": 1}), "")):
        (saved,) = nodes["GLMImageSaveTokens"].execute(kept, "sizes/test").ui["tokens"]
        loaded = run("LoadTokens", f"{saved['subfolder']}/{saved['filename']} [output]")
        assert loaded[2:] == (96, 64, prompt)


def test_tokens_without_a_region_stay_and_a_region_needs_tokens(nodes, sample, ar):
    tokens, _ = sample("Tokens")
    with pytest.raises(GLMImageError, match="mask is connected and tokens are not"):
        sample("Tokens", mask=torch.ones(1, 8, 8))
    settings = (PROMPT, 96, 64, 6, 0.9, 0.75, 0, 1)
    kept = run_sampler(nodes["GLMImageSampleTokens"], ar, *settings, tokens=tokens)
    assert same(kept.result[0][0].tokens, tokens.tokens)
    assert "drag over the picture on the node" in kept.ui["text"][-1]
    # The node shows what it was given, whatever it wrote of it.
    redrawn = run_sampler(
        nodes["GLMImageSampleTokens"], ar, *settings, tokens=tokens, cells="0:0-1"
    )
    (before,), (after,) = kept.ui["glm_given"], redrawn.ui["glm_given"]
    assert (before["marked"], after["marked"]) == ("", "0:0-1")
    assert before["hashes"] == after["hashes"] == kept.ui["glm_grids"][0]["hashes"]
    assert before["colours"] == after["colours"] == kept.ui["glm_grids"][0]["colours"]
    assert len(redrawn.ui["text"]) == len(kept.ui["text"]) - 1


def test_a_layout_that_does_not_fit(sample, wide_ar):
    (layout,) = sample("Layout", (512, 512))
    sentence = r"of 512x512 pixels: .* 16x16 .* 512x768 pixels has 19x13. Use 512x512, .* as \d+x"
    with pytest.raises(GLMImageError, match=sentence):
        sample("Tokens", (512, 768), layout=layout)
    with pytest.raises(GLMImageError, match="codebook of the layout is 64 and the AR model's 96"):
        sample("Tokens", (512, 512), layout=layout, model=wide_ar)


def test_locks_go_through_a_file(nodes, run, sample, tmp_path):
    tokens, layouts = sample("Tokens", batch=2)
    mask = torch.zeros(1, 4, 4)
    mask[:, :, 2:] = 1
    (locked,) = run("LockLayout", layouts, "masked", -1, mask)
    (saved,) = nodes["GLMImageSaveTokens"].execute(tokens, "layouts/test", locked).ui["tokens"]
    name = f"{saved['subfolder']}/{saved['filename']} [output]"
    loaded_tokens, loaded, *_ = run("LoadTokens", name)
    assert same(loaded_tokens.tokens, tokens.tokens)
    assert same(loaded.preview, layouts.preview)
    assert same(loaded.locked, locked.locked)
    assert loaded.locked.any()


def test_a_layout_is_saved_without_its_images_tokens(nodes, run, sample):
    """Layout To Tokens stands in for them. The loaded layout fits the same sizes."""
    (layouts,) = sample("Layout", batch=2)
    (locked,) = run("LockLayout", layouts, "whole", 1)
    (small,) = run("LayoutToTokens", locked)
    (saved,) = nodes["GLMImageSaveTokens"].execute(small, "layouts/alone", locked).ui["tokens"]
    loaded = run("LoadTokens", f"{saved['subfolder']}/{saved['filename']} [output]")[1]
    assert same(loaded.preview, locked.preview)
    assert loaded.locked.all()
    _, used = sample("Tokens", layout=loaded)
    assert same(used.preview, locked.preview)


def test_a_layout_decodes_as_a_small_picture(run, sample):
    (layouts,) = sample("Layout", (512, 768), batch=2)
    (tokens,) = run("LayoutToTokens", layouts)
    (clip,) = run("LoadGlyphEncoder", "small")
    (model,) = run("LoadDecoder", "small", "default")
    positive, negative, latent = run(
        "ApplyTokens", run("GlyphEncode", clip, PROMPT)[0], tokens, batch_index=-1
    )
    (decoded,) = run("Decode", model, positive, negative, latent, 1, 1, 1.0, 1.0)
    assert decoded["samples"].shape == (2, 16, 19 * 4, 13 * 4)


def test_shown_in_the_colours_of_the_codebook_or_in_arbitrary_ones(run, sample, ar, pipelines):
    tokens, layouts = sample("Tokens", batch=3)
    codes = pipelines["small"].vision_language_encoder.model.vqmodel.quantize.embedding.weight
    with_ar, _ = run("ShowTokens", 8, tokens=tokens, ar=ar)
    assert same(with_ar[0], draw_sheet(tokens.tokens, codebook_palette(codes), 8, numbered=True))
    without, _ = run("ShowTokens", 8, tokens=tokens)
    assert same(without[0], draw_sheet(tokens.tokens, hash_palette(64), 8, numbered=True))
    (locked,) = run("LockLayout", layouts, "whole", -1)
    (outlined, _), (plain, _) = (run("ShowTokens", 8, layout=shown) for shown in (locked, layouts))
    assert outlined.shape == plain.shape
    assert (outlined == 1).all(dim=-1).sum() > (plain == 1).all(dim=-1).sum() + 1000


def test_colours_where_the_file_has_no_codebook(ar, monkeypatch):
    component = ar.palette._component
    monkeypatch.delitem(component.tensors, "model.vqmodel.quantize.embedding.weight")
    assert same(type(ar.palette)(component, 64).colours, hash_palette(64))


def test_nodes_show_the_grid_that_they_wrote_or_read(nodes, sample, ar):
    settings = (PROMPT, 96, 64, 5, 0.9, 0.75, 0, 2)
    written = run_sampler(nodes["GLMImageSampleTokens"], ar, *settings)
    drawn = run_sampler(nodes["GLMImageSampleLayout"], ar, *settings)
    read = nodes["GLMImageEncodeTokens"].execute(ar, torch.rand(2, 64, 96, 3), 96, 64)
    (saved,) = nodes["GLMImageSaveTokens"].execute(written.result[0][0], "shown/test").ui["tokens"]
    name = f"{saved['subfolder']}/{saved['filename']} [output]"
    loaded = nodes["GLMImageLoadTokens"].execute(name)
    for output, kind, shape in (
        (written, "tokens", (2, 3)),
        (drawn, "layout", (13, 19)),
        (read, "tokens", (2, 3)),
        (loaded, "tokens", (2, 3)),
    ):
        (grid,) = output.ui["glm_grids"]
        assert (grid["kind"], grid["rows"], grid["columns"], grid["total"]) == (kind, *shape, 2)
    hashes = [output.ui["glm_grids"][0]["hashes"] for output in (written, loaded)]
    assert hashes[0] == hashes[1]


def test_what_cannot_be_shown(run, sample, wide_ar):
    tokens, layout = sample("Tokens")
    for given in ({}, {"tokens": tokens, "layout": layout}):
        with pytest.raises(GLMImageError, match="either tokens or a layout"):
            run("ShowTokens", 16, **given)
    with pytest.raises(GLMImageError, match="codebook of 64 and the AR model one of 96"):
        run("ShowTokens", 16, tokens=tokens, ar=wide_ar)


@pytest.mark.parametrize("on", [True, False])
def test_live_preview(sample, monkeypatch, on):
    method = LatentPreviewMethod.Auto if on else LatentPreviewMethod.NoPreviews
    monkeypatch.setattr(args, "preview_method", method)
    seen = []
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda done, total, preview, node_id=None: seen.append((done, preview)),
    )
    sample("Tokens", (512, 512), batch=5)
    pictures = [(done, preview) for done, preview in seen if preview is not None]
    assert bool(pictures) == on
    assert (seen[-1][1] is not None) == on  # of all cells
    for _, (form, image, limit) in pictures:
        assert (form, limit) == ("PNG", None)
        assert 256 < max(image.size) <= 512


def test_memory_counts_the_locked_cells_of_every_sample(run, sample, ar, monkeypatch):
    asked, required = [], ar.memory_required

    def spied(*what):
        asked.append(what)
        return required(*what)

    monkeypatch.setattr(ar, "memory_required", spied)
    (layouts,) = sample("Layout", batch=3)
    (locked,) = run("LockLayout", layouts, "whole", -1)
    sample("Tokens", layout=locked)
    (prompt, free), (_, forced) = ((length, block) for _, length, block in asked)
    cells = layouts.preview[0].numel()
    assert free < prompt
    assert forced == 3 * cells
    (more,), (less,) = (required(3, prompt, block).values() for block in (forced, free))
    assert more > less


def test_lock_layout_shows_what_it_was_given_and_what_it_locked(nodes, sample):
    (layouts,) = sample("Layout", batch=3)
    pictures = torch.rand(3, 16, 16, 3)
    out = nodes["GLMImageLockLayout"].execute(
        layouts, "whole", 2, images=pictures, cells="0-3:0; 5:1"
    )
    assert out.result[0].locked.sum() == 5
    assert same(out.result[0].preview, layouts.preview[2:])
    (shown,) = out.ui["glm_grids"]
    assert (shown["count"], shown["taken"]) == (3, 2)
    assert (shown["given"], shown["locked"]) == ("", "0-3:0; 5:1")
    assert len(out.ui["glm_images"]) == 3
    with pytest.raises(GLMImageError, match="2 images and 3 layouts"):
        nodes["GLMImageLockLayout"].execute(layouts, "whole", 2, images=pictures[:2])
