"""The AR network against transformers': logits, names and shapes."""

import copy
import json
from pathlib import Path

import pytest
import reference
import torch
from ar_pair import pair
from glm_image.glm_core.ar.cache import BlockPass, StepPass, span_of, step_mask
from glm_image.glm_core.ar.model import ARConfig, ARModel, rope_table
from glm_image.glm_core.data.grids import grid_positions, text_positions
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.vision.encoder import VISION_PREFIXES
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

HUB = Path(__file__).parent.parent / "configs" / "hub"
CPU = torch.device("cpu")


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def random_sequence(config, batch=1):
    """A prompt of 7 text ids, then a 4x3 grid of codes; ids [B, 19] and positions [3, 19]."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(config.visual_size, config.vocab_size, (batch, 7), generator=generator)
    codes = torch.randint(0, config.codebook, (batch, 12), generator=generator)
    positions = torch.cat([text_positions(7), grid_positions((4, 3), 7)], dim=1)
    return torch.cat([text, codes], dim=1), positions


def all_logits(model, ids, positions, blocks):
    """Logits after every id of a sequence that is read in blocks of the given lengths.

    A block of one id is read by the step that sampling uses.
    """
    cache = model.new_cache(ids.shape[0], span_of(ids.shape[1]), CPU, torch.float32)
    rope = rope_table(model.config, positions, torch.float32)
    out, start = [], 0
    for length in blocks:
        part = slice(start, start + length)
        reading = BlockPass(cache, start)
        if length == 1:
            position = torch.tensor([start])
            sharing = model.config.heads // model.config.kv_heads
            mask = step_mask(position, sharing, cache.length, torch.float32)
            reading = StepPass(cache, position, mask)
        out.append(model(ids[:, part], rope[:, part], reading, torch.float32, tail=length))
        start += length
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("shape", reference.SHAPES)
@pytest.mark.parametrize(
    "blocks", [(19,), (7,) + (1,) * 12, (7, 8, 1, 3)], ids=["whole", "steps", "blocks"]
)
def test_logits_equal_the_references(shape, blocks):
    model, network = pair(shape).model, pair(shape).reference
    ids, positions = random_sequence(model.config, batch=2)
    theirs = network(
        input_ids=ids, position_ids=positions[:, None].expand(3, 2, -1), use_cache=False
    ).logits[..., : model.config.codebook]
    ours = all_logits(model, ids, positions, blocks)
    assert ours.shape == theirs.shape
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("shape", reference.SHAPES)
def test_forward_returns_the_logits_after_the_block(shape):
    model = pair(shape).model
    ids, positions = random_sequence(model.config)
    rope = rope_table(model.config, positions, torch.float32)
    reading = BlockPass(model.new_cache(1, 19, CPU, torch.float32), 0)
    logits = model(ids, rope, reading, torch.float32)
    assert logits.shape == (1, 1, model.config.codebook)
    assert relative_error(logits, all_logits(model, ids, positions, (19,))[:, -1:]) < 1e-6


def test_every_axis_of_the_positions_changes_the_logits():
    model = pair("wide").model
    ids, positions = random_sequence(model.config)
    plain = all_logits(model, ids, positions, (19,))
    for axis in range(3):
        moved = positions.clone()
        moved[axis, 7:] += 1
        assert relative_error(all_logits(model, ids, moved, (19,)), plain) > 1e-3


def test_bf16_equals_the_references_bf16():
    model, network = (
        copy.deepcopy(m).bfloat16() for m in (pair("wide").model, pair("wide").reference)
    )
    ids, positions = random_sequence(model.config)
    theirs = network(input_ids=ids, position_ids=positions[:, None], use_cache=False).logits[
        0, -1, : model.config.codebook
    ]
    reading = BlockPass(model.new_cache(1, 19, CPU, torch.bfloat16), 0)
    ours = model(ids, rope_table(model.config, positions, torch.bfloat16), reading, torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours[0, 0].float(), theirs.float()) < 0.02


def test_a_copied_cache_continues_like_the_original():
    model = pair("small").model
    ids, positions = random_sequence(model.config)
    rope = rope_table(model.config, positions, torch.float32)
    prompt = model.new_cache(1, 7, CPU, torch.float32)
    model(ids[:, :7], rope[:, :7], BlockPass(prompt, 0), torch.float32)
    batch = model.new_cache(3, 19, CPU, torch.float32)
    batch.copy_prefix(prompt, 7)
    logits = model(ids[:, 7:].expand(3, -1), rope[:, 7:], BlockPass(batch, 7), torch.float32)
    whole = all_logits(model, ids, positions, (19,))[:, -1:]
    assert relative_error(logits, whole.expand(3, -1, -1)) < 1e-5


def test_full_size_names_and_shapes_equal_the_references():
    config = json.loads((HUB / "vision_language_encoder_config.json").read_text())
    with torch.device("meta"):
        theirs = GlmImageForConditionalGeneration(GlmImageConfig(**config)).state_dict()
    ours = ARModel(ARConfig.from_dict(config), device="meta").state_dict()
    assert {name: w.shape for name, w in ours.items()} == {
        name: w.shape for name, w in theirs.items() if not name.startswith(VISION_PREFIXES)
    }
    assert sum(w.numel() for w in theirs.values()) == 10_114_245_632
    assert any(name.startswith(VISION_PREFIXES[0]) for name in theirs)
    assert any(name.startswith(VISION_PREFIXES[1]) for name in theirs)


def test_the_hubs_config_is_read():
    config = ARConfig.from_dict(
        json.loads((HUB / "vision_language_encoder_config.json").read_text())
    )
    assert (config.codebook, config.visual_size, config.vocab_size) == (16384, 16512, 168064)
    assert (config.head_dim, config.rotary_dim, config.attention_bias) == (128, 64, True)
    assert (config.image_start, config.image_end, config.image_token) == (16384, 16385, 167855)


BAD_CONFIGS = {
    "of another model": (lambda c: c.pop("vq_config"), "no 'vq_config'"),
    "without rope": (
        lambda c: c["text_config"].pop("rope_parameters"),
        "no '.*rope_parameters'",
    ),
    "of uneven heads": (lambda c: c["text_config"].update(num_key_value_heads=3), "3 KV heads"),
    "of another rope": (
        lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[8, 8]),
        r"\[8, 8\] does not cover half of its 64",
    ),
    "of another rope type": (
        lambda c: c["text_config"]["rope_parameters"].update(rope_type="yarn"),
        "rope_type is 'yarn'",
    ),
    "of another activation": (lambda c: c["text_config"].update(hidden_act="gelu"), "'gelu'"),
    "of a codebook without ids": (
        lambda c: c["vq_config"].update(num_embeddings=99999),
        "codebook 99999, visual vocabulary 16512",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_an_unsupported_config_is_refused(case):
    config = json.loads((HUB / "vision_language_encoder_config.json").read_text())
    spoil, sentence = BAD_CONFIGS[case]
    spoil(config)
    with pytest.raises(GLMImageError, match=sentence):
        ARConfig.from_dict(config)
