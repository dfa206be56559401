"""Score Tokens, Read Text and Keep Best, called as ComfyUI calls them."""

import math
import sys
from dataclasses import replace
from functools import partial
from importlib.resources import files

import numpy as np
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from glm_image.glm_core.data.references import Reference, References
from glm_image.glm_core.errors import GLMImageError
from glm_image.nodes.host import ocr
from helpers import sampled
from PIL import Image, ImageDraw, ImageFont

FONT = files("font_roboto") / "files/Roboto-Bold.ttf"

PROMPT, WIDTH, HEIGHT = "a cat", 192, 128


@pytest.fixture(scope="module")
def ar(models):
    return models[1]


@pytest.fixture(scope="module")
def run(nodes):
    return lambda name, *args, **inputs: nodes[f"GLMImage{name}"].execute(*args, **inputs).result


@pytest.fixture(scope="module")
def sample(nodes, ar):
    """Tokens and layouts of a batch of `count`."""

    def sample(count: int = 3, seed: int = 5, **inputs):
        size = (PROMPT, WIDTH, HEIGHT, seed, 1.0, 1.0, 0, count)
        return sampled(nodes["GLMImageSampleTokens"], ar, *size, **inputs)

    return sample


@pytest.fixture(scope="module")
def score(run, ar):
    return lambda prompt=PROMPT, against="", **inputs: run(
        "ScoreTokens", ar, prompt, against, **inputs
    )


each_measure = pytest.mark.parametrize("measure", ["prompt match", "likelihood"])


@each_measure
def test_a_batch_has_the_scores_of_its_images(score, sample, measure) -> None:
    tokens, layout = sample()
    scores, table, picture = score(tokens=tokens, layout=layout, measure=measure)
    assert len(set(scores)) == 3
    for i in range(3):
        one = sample(1, seed=5 + i)
        (single,), _, _ = score(tokens=one[0], layout=one[1], measure=measure)
        assert single == pytest.approx(scores[i], abs=1e-5)
    rows = [line.split() for line in table.splitlines()[1:]]
    assert [int(row[0]) for row in rows] == sorted(range(3), key=lambda i: -scores[i])
    assert [float(row[1]) for row in rows] == sorted((round(x, 4) for x in scores), reverse=True)
    assert picture.shape[0] == 1
    assert picture.shape[3] == 3
    assert 0 <= picture.min() < picture.max() <= 1


def test_cells_that_were_kept_do_not_count_after_joining_either(run, score, sample) -> None:
    base, layout = sample(1)
    locked = replace(layout, locked=torch.ones_like(layout.locked))
    redrawn = [
        sample(1, seed=6, tokens=base, layout=locked, cells=cells) for cells in ("0:0", "1:1-2")
    ]
    alone = [score(tokens=tokens, layout=locked)[0][0] for tokens, locked in redrawn]
    batches = {
        f"{name}_{i}": one
        for i, pair in enumerate(redrawn, 1)
        for name, one in zip(("tokens", "layout"), pair, strict=True)
    }
    tokens, layout = run("JoinTokens", indices="", **batches)
    assert score(tokens=tokens, layout=layout)[0] == pytest.approx(alone, abs=1e-5)
    assert alone[0] != pytest.approx(alone[1], abs=1e-3)


def test_a_layout_alone_and_against_itself(score, sample) -> None:
    _, layout = sample()
    assert any(score(layout=layout)[0])
    assert score(against=PROMPT, layout=layout)[0] == pytest.approx([0, 0, 0], abs=1e-5)


def test_likelihoods_are_what_a_prompt_match_compares(score, sample) -> None:
    connected = dict(zip(("tokens", "layout"), sample(), strict=True))
    ours, others = (score(one, measure="likelihood", **connected)[0] for one in (PROMPT, "a dog"))
    match = [our - other for our, other in zip(ours, others, strict=True)]
    assert score(against="a dog", **connected)[0] == pytest.approx(match, abs=1e-5)
    assert max(ours) < 0
    with pytest.raises(GLMImageError, match="'a dog', but the measure \"likelihood\" compares"):
        score(against="a dog", measure="likelihood", **connected)
    with pytest.raises(GLMImageError, match="choose one of prompt match, likelihood"):
        score(measure="beauty", **connected)


@each_measure
def test_locked_and_forced_cells_do_not_count(run, score, sample, measure) -> None:
    score = partial(score, measure=measure)
    tokens, layout = sample(1)
    locked = run("LockLayout", layout, "whole", 0)[0]
    assert math.isnan(score(layout=locked)[0][0])
    mask = torch.zeros(4, 6)
    mask[1, 2] = 1
    redone, same = sample(1, seed=9, tokens=tokens, mask=mask, layout=locked)
    assert redone.info["forced"] == "0:0-5; 1:0-1; 1:3-5; 2-3:0-5"
    (of_cell,), _, _ = score(tokens=redone, layout=same)
    (of_all,), _, _ = score(tokens=tokens, layout=locked)
    assert of_cell != pytest.approx(of_all, abs=1e-3)
    _, _, picture = score(tokens=redone, layout=same)
    light = (picture[0].amax(-1) > 0.13).reshape(4, 16, 6, 16).float().mean((1, 3))
    assert light.nonzero().tolist() == [[1, 2]]


def test_what_does_not_belong_together(run, score, sample) -> None:
    tokens, layout = sample(2)
    with pytest.raises(GLMImageError, match="nothing to score"):
        score()
    with pytest.raises(GLMImageError, match="connect the layout that"):
        score(tokens=tokens)
    with pytest.raises(GLMImageError, match="The prompt is empty"):
        score(" ", layout=layout)
    three = sample(3)[1]
    with pytest.raises(GLMImageError, match="2 images in tokens and 3 layouts"):
        score(tokens=tokens, layout=three)


def references(*seeds: int) -> References:
    """A set of one reference for each seed."""

    def one(seed: int) -> Reference:
        tokens = torch.randint(64, (2, 2), generator=torch.Generator().manual_seed(seed)).int()
        return Reference(tokens, torch.zeros(1, 16, 8, 8), torch.zeros(2, 2, 3), (64, 64))

    return References(tuple((one(seed),) for seed in seeds), 64)


def test_sets_of_references_score_what_they_were_written_with(run, score, sample) -> None:
    """Sample i was written with set i modulo the sets, batch_size times each."""
    tokens, _ = sample(2, references=references(1, 2))
    assert len(tokens.tokens) == 4
    scores = score(tokens=tokens, references=references(1, 2))[0]
    for i, found in enumerate(scores):
        own, other = (references(seed) for seed in ((1, 2) if i % 2 == 0 else (2, 1)))
        alone = replace(tokens, tokens=tokens.tokens[i, None])
        assert score(tokens=alone, references=own)[0] == pytest.approx([found], abs=1e-5)
        assert score(tokens=alone, references=other)[0] != pytest.approx([found], abs=1e-5)
    kept, _ = run("JoinTokens", indices="3,1", tokens_1=tokens)
    found = score(tokens=kept, references=references(1, 2))[0]
    assert found == pytest.approx([scores[3], scores[1]], abs=1e-5)
    one, _ = run("JoinTokens", indices="3", tokens_1=tokens)
    redrawn, _ = sample(1, references=references(1, 2), tokens=one, cells="0:0")
    assert (len(redrawn.tokens), redrawn.numbers, redrawn.root) == (1, (3,), tokens.root)
    wanted, _ = sample(1, references=references(2), tokens=one, cells="0:0")
    assert torch.equal(redrawn.tokens, wanted.tokens)
    with pytest.raises(GLMImageError, match="4 images in tokens and 3 reference sets"):
        score(tokens=tokens, references=references(1, 2, 3))


def keep(nodes, scores, count=1, **connected):
    defaults = {"weight": [1.0], "weight_2": [1.0], "weight_3": [1.0], "count": [count]}
    node = nodes["GLMImageKeepBest"]
    return node.execute(scores=scores, **{**defaults, **connected}).result


def test_the_best_of_lists_and_batches(nodes, sample) -> None:
    (first, above), (second, below) = sample(2), sample(1, seed=30)
    images = torch.rand(3, 8, 8, 3)
    latent = {"samples": torch.rand(3, 16, 8, 8), "batch_index": [4, 7, 9]}
    tokens, layout, kept, latents, table = keep(
        nodes,
        [0.5, math.nan, 2.0],
        count=2,
        tokens=[first, second],
        layout=[above, below],
        images=[images],
        latent=[latent],
    )
    assert torch.equal(tokens.tokens, torch.cat([second.tokens, first.tokens[:1]]))
    assert torch.equal(layout.preview, torch.cat([below.preview, above.preview[:1]]))
    assert torch.equal(kept, images[[2, 0]])
    assert torch.equal(latents["samples"], latent["samples"][[2, 0]])
    assert latents["batch_index"] == [9, 4]
    assert tokens.info["seeds"] == [30, 5]
    assert [line.split()[1] for line in table.splitlines()[1:]] == ["2", "0", "1"]


def test_one_of_a_batch_keeps_its_seed(nodes, sample) -> None:
    tokens = keep(nodes, [0.0, 1.0, 0.0], tokens=[sample(3)[0]])[0]
    assert tokens.info["seed"] == 6
    assert torch.equal(tokens.tokens, sample(1, seed=6)[0].tokens)


def test_noise_masks_go_with_their_latents(nodes) -> None:
    masked = {"samples": torch.zeros(1, 16, 4, 4), "noise_mask": torch.zeros(1, 16, 16)}
    plain = {"samples": torch.ones(1, 16, 4, 4)}
    latent = keep(nodes, [2.0, 1.0], count=2, latent=[masked, plain])[3]
    assert latent["noise_mask"].shape == (2, 1, 32, 32)
    assert latent["noise_mask"].mean((1, 2, 3)).tolist() == [0, 1]


def test_what_is_not_connected_blocks_with_a_sentence(nodes, sample) -> None:
    _, layout, *_ = keep(nodes, [1.0], tokens=[sample(1)[0]])
    assert isinstance(layout, ExecutionBlocker)
    assert "no layout to give" in layout.message


@pytest.mark.parametrize(
    ("scores", "inputs", "sentence"),
    [
        ([1.0, 2.0], {}, "2 scores, 3 images"),
        ([1.0, 2.0, 3.0], {"scores_2": [1.0]}, "3 scores, 1 scores_2"),
        ([1.0, 2.0, 3.0], {"count": 4}, "count is 4 and there are 3"),
        ([1.0, 2.0, "x"], {}, 'scores is "x" and not a number'),
    ],
)
def test_counts_and_types_are_checked(nodes, scores, inputs, sentence) -> None:
    with pytest.raises(GLMImageError, match=sentence):
        keep(nodes, scores, images=[torch.rand(3, 8, 8, 3)], **inputs)


def test_sizes_that_make_no_batch(nodes) -> None:
    images = [torch.rand(1, 8, 8, 3), torch.rand(1, 8, 16, 3)]
    assert keep(nodes, [0.0, 1.0], images=images)[2].shape == (1, 8, 16, 3)
    with pytest.raises(GLMImageError, match="16x8 with 3 channels, 8x8 with 3 channels"):
        keep(nodes, [0.0, 1.0], count=2, images=images)


def written(*lines: str) -> torch.Tensor:
    """A picture [256, 512, 3] with black lines of text on white."""
    image = Image.new("RGB", (512, 256), "white")
    for i, line in enumerate(lines):
        font = ImageFont.truetype(str(FONT), 56)
        ImageDraw.Draw(image).text((40, 40 + 100 * i), line, "black", font)
    return torch.from_numpy(np.array(image)).float() / 255


def test_texts_are_read_and_outlined(run) -> None:
    images = torch.stack([written("OPEN", "LATE"), written("OPEN"), written()])
    scores, table, shown = run("ReadText", images, prompt="a sign 'LATE' and 'OPEN'")
    assert scores == pytest.approx([1, 0.5, 0])
    assert "image 1: 0.500" in table
    assert "'LATE' read as ''" in table
    changed = (shown - images).abs().sum(-1) > 0.2
    assert changed[1, 30:120].any()
    assert not changed[1, 130:].any()
    assert not changed[2].any()


def test_texts_of_ones_own_go_before_the_prompts(run) -> None:
    scores, _, _ = run("ReadText", written("OPEN")[None], prompt="'LATE'", texts="OPEN\n\n")
    assert scores == [1]


def test_a_prompt_without_texts(run) -> None:
    with pytest.raises(GLMImageError, match="'a cat' has no text in quotes"):
        run("ReadText", written()[None], prompt="a cat")


def test_a_batch_without_pictures_to_read(run) -> None:
    with pytest.raises(GLMImageError, match="no image in the batch"):
        run("ReadText", torch.zeros(0, 64, 64, 3), texts="OPEN")


def test_without_the_ocr_packages_a_sentence_says_how_to_get_them(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)  # as if it were not installed
    ocr._reader.cache_clear()
    with pytest.raises(GLMImageError, match=r"pip install -r .*requirements-ocr\.txt"):
        run("ReadText", written("OPEN")[None], texts="OPEN")
