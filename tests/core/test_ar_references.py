"""Image to image against the corrected reference: its VQ ids, prompt, positions and tokens."""

from unittest.mock import patch

import numpy as np
import pytest
import reference
import torch
from ar_pair import pair, run
from glm_image.glm_core.ar.chat_template import ChatTemplate
from glm_image.glm_core.ar.prompt import Prompt, PromptTokenizer
from glm_image.glm_core.ar.sampler import sample_from_references
from glm_image.glm_core.ar.step import SamplingOptions
from glm_image.glm_core.data.grids import text_positions, upsample_tokens
from glm_image.glm_core.data.tokens import Forced
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.vision.pixels import vision_pixels
from PIL import Image

GREEDY = SamplingOptions(temperature=0)
PROMPT = ' a cat at the "mat", 32\n'
GRID = (5, 7)
REFERENCES = {"one": [(512, 512)], "two": [(544, 640), (512, 576)]}


def photos(sizes):
    """uint8 [H, W, 3] images with structure at many scales, so that neighbouring tokens differ."""
    generator = torch.Generator().manual_seed(4)
    images = []
    for height, width in sizes:
        image = torch.zeros(1, 3, height, width)
        for cells in (2, 6, 16, 40):
            noise = torch.randn(1, 3, cells, cells, generator=generator)
            image += torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")
        images.append(((image[0] / 4 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0))
    return images


def our_references(both, images):
    return [
        both.vision(vision_pixels(image[None] / 255, both.images), torch.float32)[0]
        for image in images
    ]


@pytest.mark.parametrize("count", REFERENCES)
@pytest.mark.parametrize("shape", reference.SHAPES)
def test_tokens_of_and_from_references_equal_the_references(shape, count):
    both, images = pair(shape), photos(REFERENCES[count])
    greedy = patch.object(both.reference.generation_config, "top_k", 1)
    with reference.mended(both.pipeline), greedy:
        tokens, ids, grids = both.pipeline.generate_prior_tokens(
            "x", 32 * GRID[0], 32 * GRID[1], [[Image.fromarray(i.numpy()) for i in images]]
        )
    ours = our_references(both, images)
    assert all(len(grid.unique()) > 8 for grid in ours)
    assert [[1, 2 * h, 2 * w] for h, w in (grid.shape for grid in ours)] == grids[0].tolist()
    upsampled = [upsample_tokens(grid[None]).flatten() for grid in ours]
    assert torch.cat(upsampled).tolist() == ids[0].tolist()

    prompt = both.tokenizer.image_to_image("x", GRID, ours)
    written = sample_from_references(both.model, prompt, GRID, run(options=GREEDY))
    assert written.shape == (1, *GRID)
    assert upsample_tokens(written).flatten().tolist() == tokens.flatten().tolist()
    assert len(written.unique()) > 2  # few, because greedy on random weights repeats itself
    plain_positions = Prompt(prompt.ids, text_positions(len(prompt)))
    moved = sample_from_references(both.model, plain_positions, GRID, run(options=GREEDY))
    assert (moved != written).sum() > 8  # the positions change the tokens


@pytest.mark.parametrize("templated", [True, False])
@pytest.mark.parametrize("shape", reference.SHAPES)
def test_prompt_and_positions_equal_the_references(shape, templated):
    both, sizes = pair(shape), REFERENCES["two"]
    processor, network = both.pipeline.processor, both.reference
    images = [Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)) for size in sizes]
    target = {"target_h": 32 * GRID[0], "target_w": 32 * GRID[1]}
    if templated:
        shown = [{"type": "image", "image": image} for image in images]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*shown, {"type": "text", "text": PROMPT}]}],
            tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=target,
        )  # fmt: skip
        tokenizer = both.tokenizer
    else:
        names = processor.tokenizer
        image = names.bos_token + names.image_token + names.eos_token
        inputs = processor(images=images, text=[2 * image + PROMPT], return_tensors="pt", **target)
        tokenizer = without_template(both, processor)

    codes = [torch.randint(0, 50, (h // 32, w // 32)) for h, w in sizes]
    prompt = tokenizer.image_to_image(PROMPT, GRID, codes)
    expected = inputs["input_ids"][0]
    expected[expected == network.config.image_token_id] = torch.cat([c.flatten() for c in codes])
    assert prompt.ids.tolist() == expected.tolist()

    positions, _ = network.model.get_rope_index(
        expected[None], inputs["image_grid_thw"], inputs["images_per_sample"]
    )
    assert prompt.positions.tolist() == positions[:, 0].tolist()
    first = network.model._cached_decode_position_ids[0, :, 0]
    assert first.tolist() == [prompt.end] * 3


def without_template(both, processor):
    tokenizer = processor.tokenizer
    names = ("bos_token", "eos_token", "image_token", "grid_bos_token", "grid_eos_token")
    config = {name: getattr(tokenizer, name) for name in names}
    return PromptTokenizer(tokenizer.backend_tokenizer.to_str(), config, None)


def test_an_image_token_in_the_users_text_is_no_reference():
    both = pair("small")
    image = both.pipeline.processor.tokenizer.image_token
    codes = [torch.full((2, 2), 7)]
    prompt = both.tokenizer.image_to_image(f"a {image} b", GRID, codes)
    assert (prompt.ids == both.model.config.image_token).sum() == 0
    text = both.pipeline.processor.tokenizer.decode(prompt.ids)
    assert f"a {image} b" in text
    assert (prompt.ids == 7).sum() == 4


def test_references_and_their_order_change_the_tokens():
    both = pair("wide")
    codes = [torch.arange(6).view(2, 3), torch.arange(20, 26).view(3, 2)]

    def written(references):
        prompt = both.tokenizer.image_to_image("a cat", (4, 4), references)
        return sample_from_references(both.model, prompt, (4, 4), run(options=GREEDY)).tolist()

    runs = [written(codes), written(codes[::-1]), written(codes[:1])]
    assert runs[0] != runs[1] != runs[2] != runs[0]


def test_a_batch_equals_single_runs_and_forced_cells_stay():
    both = pair("small")
    prompt = both.tokenizer.image_to_image("a cat", (3, 4), [torch.arange(6).view(2, 3)])
    options = SamplingOptions(temperature=1.5, top_p=1.0)

    def written(seed, batch, **forced):
        how = run(seed, batch, options)
        return sample_from_references(both.model, prompt, (3, 4), how, **forced)

    batch = written(11, 3)
    assert torch.equal(batch, torch.cat([written(11 + i, 1) for i in range(3)]))
    assert not torch.equal(batch[0], batch[1])
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1:, :2] = True
    values = torch.full((1, 3, 4), 33)
    forced = written(11, 1, large=Forced(values, mask))
    assert (forced[0][mask] == 33).all()
    assert torch.equal(forced[0, 0], batch[0, 0])  # before the first forced cell


def test_no_reference_is_an_error():
    with pytest.raises(GLMImageError, match="no reference images"):
        pair("small").tokenizer.image_to_image("a cat", GRID, [])


def test_an_empty_prompt_is_an_error():
    with pytest.raises(GLMImageError, match="prompt is empty"):
        pair("small").tokenizer.image_to_image(" \n", GRID, [torch.zeros(2, 2)])


def test_a_template_that_drops_a_reference_is_an_error():
    both = pair("small")
    processor = both.pipeline.processor
    tokenizer = without_template(both, processor)
    tokenizer._template = ChatTemplate("{{ messages[0].content[-1].text }}")
    assert len(tokenizer.text_to_image("a cat", GRID))
    with pytest.raises(GLMImageError, match="every reference image"):
        tokenizer.image_to_image("a cat", GRID, [torch.zeros(2, 2)])
