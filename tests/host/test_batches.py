"""Latents and tokens of a batch: each latent is painted with its own tokens and references."""

from dataclasses import replace
from functools import partial

import comfy.sample
import comfy_extras.nodes_post_processing  # noqa: F401  current hosts import it before nodes_latent
import pytest
import torch
from comfy_extras.nodes_latent import LatentBatch, LatentBatchSeedBehavior
from comfy_extras.nodes_rebatch import LatentRebatch
from glm_image.glm_core.decoder.model import DROPPED
from glm_image.glm_core.errors import GLMImageError
from glm_image.nodes.host.batches import ORIGIN, drawn_numbers, pictures_of, pictures_of_latent
from glm_image.nodes.host.encode import encode_references
from helpers import relative_error, stages

import nodes as host

PROMPT = "a poster with the words 'ONE' and 'TWO'"
SIZE = (64, 96)
SEED = 7


@pytest.fixture(scope="module")
def run(nodes):
    return stages(nodes, "small", PROMPT, SIZE, batch=2)


def taken(latent: dict, first: int, length: int) -> dict:
    return host.LatentFromBatch().frombatch(latent, first, length)[0]


def repeated(latent: dict, amount: int = 2) -> dict:
    return host.RepeatLatentBatch().repeat(latent, amount)[0]


def joined(first: dict, second: dict) -> dict:
    out = LatentBatch.execute(first, second)
    return out.result[0]


def with_fixed_seed(latent: dict) -> dict:
    return LatentBatchSeedBehavior.execute(latent, "fixed").result[0]


def unnumbered(latent: dict) -> dict:
    return {"samples": latent["samples"]}


def by_decode(nodes, run, positive, negative, latent):
    decode = nodes["GLMImageDecode"].execute
    return decode(run.model, positive, negative, latent, SEED, 2, 1.0, 1.0).result[0]["samples"]


def by_ksampler(nodes, run, positive, negative, latent):
    (model,) = nodes["GLMImageModelSampling"].execute(run.model, latent).result
    arguments = (model, SEED, 2, 1.0, "euler", "simple", positive, negative, latent)
    return host.common_ksampler(*arguments)[0]["samples"]


def split(nodes, positive, negative, latent) -> list[tuple]:
    """The positive, negative and latent of each image."""
    lists = nodes["GLMImageSplitBatch"].execute(positive, negative, latent).result
    return list(zip(*lists, strict=True))


SAMPLERS = pytest.mark.parametrize("sample", [by_decode, by_ksampler])


def expected(nodes, run, sample, latent: dict, pictures: list[int]) -> list:
    """Each latent alone, with its own noise and the tokens that it should be painted with."""
    numbers = latent.get("batch_index", range(len(pictures)))
    alone = []
    for number, picture in zip(numbers, pictures, strict=True):
        apply = nodes["GLMImageApplyTokens"].execute
        positive, negative, empty = apply(run.positive, run.tokens, picture).result
        alone.append(sample(nodes, run, positive, negative, {**empty, "batch_index": [number]}))
    return alone


@SAMPLERS
@pytest.mark.parametrize(
    ("change", "pictures"),
    [
        (lambda latent: latent, [0, 1]),
        (lambda latent: taken(repeated(latent), 1, 2), [1, 0]),
        (lambda latent: joined(taken(latent, 1, 1), taken(latent, 0, 1)), [1, 0]),
        (lambda latent: LatentRebatch.execute([taken(repeated(latent, 3), 1, 4)], [2]), [1, 0]),
        (with_fixed_seed, [0, 1]),
        (unnumbered, [0, 1]),
    ],
    ids=["whole", "from repeated", "turned", "rebatched", "fixed seed", "unnumbered"],
)
def test_latents_are_painted_with_their_own_tokens(nodes, run, sample, change, pictures) -> None:
    latent = change(run.empty)
    latent = latent if isinstance(latent, dict) else latent.result[0][0]
    found = sample(nodes, run, run.positive, run.negative, latent)
    assert len(found) == 2
    for i, alone in enumerate(expected(nodes, run, sample, latent, pictures)):
        assert relative_error(found[i : i + 1], alone) < 1e-5
        assert relative_error(found[1 - i : 2 - i], alone) > 1e-2


def test_decode_paints_one_of_a_batch_with_its_own_tokens(nodes, run) -> None:
    latent = taken(run.empty, 1, 1)
    found = by_decode(nodes, run, run.positive, run.negative, latent)
    (alone,) = expected(nodes, run, by_decode, latent, [1])
    assert relative_error(found, alone) < 1e-5


@pytest.mark.parametrize(
    ("sample", "change", "count"),
    [
        (by_ksampler, lambda latent: taken(latent, 1, 1), 1),
        (by_ksampler, lambda latent: taken(repeated(latent), 1, 3), 3),
        (by_decode, lambda latent: taken(repeated(latent), 1, 3), 3),
        (by_decode, lambda latent: unnumbered(taken(latent, 1, 1)), 1),
    ],
)
def test_other_counts_are_refused(nodes, run, sample, change, count) -> None:
    with pytest.raises(
        GLMImageError, match=rf"^The latent holds {count} images, .* GLM-Image Split"
    ):
        sample(nodes, run, run.positive, run.negative, change(run.empty))


@SAMPLERS
def test_references_follow_the_tokens(nodes, run, sample) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 64, 64, 3, generator=generator).repeat(1, 8, 8, 1)
    chain, _ = encode_references(run.ar, run.vae, images, None, per_sample=True)
    (cache,) = nodes["GLMImageReferenceCache"].execute(run.model, chain, "auto", "model").result
    apply = nodes["GLMImageApplyTokens"].execute
    positive, negative, empty = apply(run.positive, run.tokens, -1, None, cache).result
    latent = taken(repeated(empty), 1, 2)
    found = sample(nodes, run, positive, negative, latent)
    for i, picture in enumerate((1, 0)):
        chosen, negative, single = apply(run.positive, run.tokens, picture, None, cache).result
        single = {**single, "batch_index": [latent["batch_index"][i]]}
        alone = sample(nodes, run, chosen, negative, single)
        assert relative_error(found[i : i + 1], alone) < 1e-5
        without, *_ = apply(run.positive, run.tokens, picture).result
        unlike = sample(nodes, run, without, negative, single)
        assert relative_error(found[i : i + 1], unlike) > 1e-3


@pytest.mark.parametrize("numbers", [[0, 1, 2], [1, 2], [5], [3, 0, 3], [40]])
def test_numbers_are_read_from_comfyuis_noise(numbers: list[int]) -> None:
    latent = torch.zeros(len(numbers), 16, 4, 6)
    noise = comfy.sample.prepare_noise(latent, 2**64 - 1, numbers)
    assert drawn_numbers(noise, 2**64 - 1) == numbers
    assert drawn_numbers(noise, 3) is None
    assert drawn_numbers(noise + 0.1, 2**64 - 1) is None


def test_no_noise_has_no_numbers() -> None:
    assert drawn_numbers(torch.zeros(1, 16, 4, 6), 1) is None


@pytest.mark.parametrize(
    ("own", "numbers", "known", "pictures"),
    [
        ([0, 1], [0, 1, 2, 3], False, [0, 1, 0, 1]),
        ([0, 1], [1, 0, 1, 0], False, [1, 0, 1, 0]),
        ([0, 1, 2, 3], [3, 1], True, [3, 1]),
        ([0, 1], [0, 0], True, [0, 1]),  # two images encoded apart and joined
        ([0, 1, 2], [0, 1, 0], True, [0, 1, 2]),
        ([0], [5, 5], True, [0, 0]),
        ([4, 2], [4, 2], True, [0, 1]),  # the best two, and their latents
        ([4, 2], [4, 2], False, [0, 1]),
        ([4, 2], [2], True, [1]),
        ([0, 1], [4, 2], False, [0, 1]),  # the best latents, tokens of a second pass
        ([1, 0], [0, 1], True, [1, 0]),
        ([1, 0], [0, 1], False, [0, 1]),  # noise of latents without numbers
    ],
)
def test_numbers_choose_tokens(own, numbers, known, pictures) -> None:
    assert pictures_of(own, len(numbers), numbers, known) == pictures


@pytest.mark.parametrize(
    ("own", "origin", "numbers", "pictures"),
    [
        ([4, 2], "R", [4, 2, 7, 5], [0, 1, 0, 1]),  # the best two, repeated
        ([1, 0], "R", [0, 3], [1, 0]),  # a part of that: of 1, 0, 3, 2
        ([1, 0], "R", [1, 1, 0, 0], [0, 0, 1, 1]),
        ([0, 1], "other", [4, 2], [0, 1]),  # the best two with tokens of a second pass
        ([0, 1], "other", [1, 4], [0, 1]),
        ([0, 1], "other", [1, 0], [0, 1]),
        ([0, 1], "other", [1], [1]),
        ([1, 0], None, [1], [1]),  # encoded pictures of the best, and the second of them
        ([4, 2], None, [1], [1]),
        ([4, 2], None, None, [0, 1]),
    ],
)
def test_latents_choose_tokens_by_the_batch_they_count_in(own, origin, numbers, pictures) -> None:
    latent = {"samples": torch.zeros(len(pictures), 16, 2, 2), ORIGIN: origin}
    latent |= {} if numbers is None else {"batch_index": numbers}
    assert pictures_of_latent(own, "R", latent) == pictures


def best_of_both(nodes, run):
    """The tokens and latents of image 1, then of image 0."""
    weights = {name: [1.0] for name in ("weight", "weight_2", "weight_3")}
    keep = partial(nodes["GLMImageKeepBest"].execute, scores=[1.0, 2.0], count=[2], **weights)
    tokens, _, _, latent, _ = keep(tokens=[run.tokens], latent=[run.empty]).result
    return tokens, latent


@SAMPLERS
def test_the_best_latents_are_painted_with_their_own_tokens(nodes, run, sample) -> None:
    tokens, latent = best_of_both(nodes, run)
    positive, negative, empty = (
        nodes["GLMImageApplyTokens"].execute(run.positive, tokens, -1).result
    )
    assert latent["batch_index"] == empty["batch_index"] == [1, 0]
    found = sample(nodes, run, positive, negative, latent)
    for i, alone in enumerate(expected(nodes, run, sample, latent, [1, 0])):
        assert relative_error(found[i : i + 1], alone) < 1e-5
    singles = split(nodes, positive, negative, latent)
    for one, alone in zip(singles, found, strict=True):
        assert relative_error(sample(nodes, run, *one), alone[None]) < 1e-5
    encoded = unnumbered(latent)  # as VAE Encode makes of the best images
    again = sample(nodes, run, positive, negative, encoded)
    for i, picture in enumerate([1, 0]):
        one = unnumbered(taken(latent, i, 1)) | {"batch_index": [i]}
        chosen = nodes["GLMImageApplyTokens"].execute(run.positive, run.tokens, picture).result
        alone = sample(nodes, run, chosen[0], chosen[1], one)
        assert relative_error(again[i : i + 1], alone) < 1e-5


def cache_of(nodes, run, count: int, per_sample: bool):
    """The reference cache of as many noisy pictures."""
    images = torch.rand(count, 512, 512, 3, generator=torch.Generator().manual_seed(0))
    chain, _ = encode_references(run.ar, run.vae, images, None, per_sample=per_sample)
    return nodes["GLMImageReferenceCache"].execute(run.model, chain, "auto", "model").result[0]


def test_images_taken_out_of_a_batch_keep_their_references(nodes, run) -> None:
    cache = cache_of(nodes, run, 2, per_sample=True)
    apply = nodes["GLMImageApplyTokens"].execute
    positive, negative, latent = apply(run.positive, run.tokens, -1, None, cache).result
    whole = by_decode(nodes, run, positive, negative, latent)
    (second,) = nodes["GLMImageJoinTokens"].execute(indices="1", tokens_1=run.tokens).result[:1]
    positive, negative, latent = apply(run.positive, second, -1, None, cache).result
    assert relative_error(by_decode(nodes, run, positive, negative, latent), whole[1:]) < 1e-5


# ---- a conditioning that ConditioningZeroOut has zeroed ------------------------------------------


def zeroed(conditioning: list) -> list:
    return host.ConditioningZeroOut().zero_out(conditioning)[0]


def guided(nodes, run, positive, negative):
    decode = nodes["GLMImageDecode"].execute
    return decode(run.model, positive, negative, run.empty, SEED, 2, 3.0, 1.0).result[0]["samples"]


def test_a_zeroed_positive_is_the_negative_of_apply_tokens(nodes, run) -> None:
    right = guided(nodes, run, run.positive, run.negative)
    assert torch.equal(guided(nodes, run, run.positive, zeroed(run.positive)), right)
    assert torch.equal(guided(nodes, run, run.positive, zeroed(run.negative)), right)


def test_a_zeroed_positive_leaves_its_references(nodes, run) -> None:
    cache = cache_of(nodes, run, 1, per_sample=False)
    apply = nodes["GLMImageApplyTokens"].execute
    positive, negative, _ = apply(run.positive, run.tokens, -1, None, cache).result
    right = guided(nodes, run, positive, negative)
    assert torch.equal(guided(nodes, run, positive, zeroed(positive)), right)


def test_text_zeroed_before_apply_tokens_is_the_empty_text(nodes, run) -> None:
    apply = nodes["GLMImageApplyTokens"].execute
    positive, negative, _ = apply(zeroed(run.positive), run.tokens, -1).result
    assert torch.equal(positive[0][0], run.negative[0][0])
    assert torch.equal(positive[0][1]["glm_tokens"], run.tokens.tokens)
    assert (negative[0][1]["glm_tokens"] == DROPPED).all()


# ---- a batch as lists of single images -----------------------------------------------------------


@SAMPLERS
@pytest.mark.parametrize(
    "change",
    [
        lambda latent: latent,
        lambda latent: taken(repeated(latent, 3), 1, 4),
        lambda latent: joined(taken(latent, 1, 1), taken(latent, 0, 1)),
        unnumbered,
        with_fixed_seed,
    ],
    ids=["whole", "from repeated", "turned", "unnumbered", "fixed seed"],
)
def test_single_images_are_painted_as_in_the_batch(nodes, run, sample, change) -> None:
    latent = change(run.empty)
    whole = sample(nodes, run, run.positive, run.negative, latent)
    singles = split(nodes, run.positive, run.negative, latent)
    assert [len(single["samples"]) for *_, single in singles] == [1] * len(whole)
    for i, single in enumerate(singles):
        alone = sample(nodes, run, *single)
        assert relative_error(alone, whole[i : i + 1]) < 1e-5
        assert relative_error(alone, whole[i - 1 : i or None]) > 1e-2


def test_one_of_a_batch_is_split_by_its_number(nodes, run) -> None:
    latent = taken(run.empty, 1, 1)
    ((positive, _, single),) = split(nodes, run.positive, run.negative, latent)
    assert torch.equal(positive[0][1]["glm_tokens"], run.tokens.tokens[1:])
    assert single["batch_index"] == [1]


@pytest.mark.parametrize("by", ["decode", "ksampler"])
def test_single_images_keep_masks_areas_references_and_the_negative(nodes, run, by) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 64, 64, 3, generator=generator).repeat(1, 8, 8, 1)
    chain, _ = encode_references(run.ar, run.vae, images, None, per_sample=True)
    (cache,) = nodes["GLMImageReferenceCache"].execute(run.model, chain, "auto", "model").result
    apply = nodes["GLMImageApplyTokens"].execute
    positive, _, empty = apply(run.positive, run.tokens, -1, None, cache).result
    away, *_ = apply(run.positive, replace(run.tokens, tokens=run.tokens.tokens.flip(0)), -1).result
    left = torch.zeros(2, 8, 12)
    left[0, :, :4], left[1, :, :8] = 1, 1
    halves = host.ConditioningSetMask().append(positive, 1 - left, "default", 0.5)[0]
    halves += host.ConditioningSetMask().append(positive, left, "default", 1.0)[0]
    lower = host.ConditioningSetArea().append(positive, 64, 32, 0, 32, 0.7)[0]
    latent = {
        **empty,
        "samples": torch.randn(empty["samples"].shape, generator=generator),
        "noise_mask": torch.rand(2, 64, 96, generator=generator),
    }

    def sampled(positive, negative, latent):
        if by == "decode":
            decode = nodes["GLMImageDecode"].execute
            arguments = (run.model, positive, negative, latent, SEED, 2, 2.5, 0.8)
            return decode(*arguments).result[0]["samples"]
        arguments = (run.model, SEED, 2, 2.5, "euler", "simple", positive, negative, latent)
        return host.common_ksampler(*arguments)[0]["samples"]

    whole = sampled(halves + lower, away, latent)
    for i, single in enumerate(split(nodes, halves + lower, away, latent)):
        alone = sampled(*single)
        assert relative_error(alone, whole[i : i + 1]) < 1e-5
        assert relative_error(alone, whole[1 - i : 2 - i]) > 1e-2


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_batch_without_tokens_is_not_split(nodes, run, side) -> None:
    sides = {"positive": run.positive, "negative": run.negative}
    plain = [[states, {}] for states, _ in run.positive]
    with pytest.raises(GLMImageError, match=f"^The {side} conditioning carries no semantic tok"):
        nodes["GLMImageSplitBatch"].execute(**sides | {side: plain}, latent=run.empty)


@pytest.mark.parametrize(
    ("count", "sentence"), [(0, "^The latent holds no image;"), (3, "^The latent holds 3 images, ")]
)
def test_other_batches_are_not_split(nodes, run, count, sentence) -> None:
    latent = {"samples": torch.zeros(count, 16, 8, 12)}
    with pytest.raises(GLMImageError, match=sentence):
        split(nodes, run.positive, run.negative, latent)


# ---- latents of another size ---------------------------------------------------------------------


@SAMPLERS
@pytest.mark.parametrize(
    ("rows", "columns", "sentence"),
    [
        (41, 62, r"96 x 64 pixels .* 496 x 328 pixels; scale or pad the picture to 512 x 352, "),
        (16, 24, r"96 x 64 pixels .* 192 x 128 pixels; .* in the workflow 'Upscale in tiles'"),
    ],
)
def test_latents_of_another_size_are_refused(nodes, run, sample, rows, columns, sentence) -> None:
    latent = {"samples": torch.ones(2, 16, rows, columns)}
    with pytest.raises(GLMImageError, match=sentence):
        sample(nodes, run, run.positive, run.negative, latent)
