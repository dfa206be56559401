"""The vision encoder against transformers': features, token ids, names and shapes."""

import copy
import json
from pathlib import Path

import pytest
import reference
import torch
from ar_pair import pair
from glm_image.glm_core.ar.model import ARConfig, ARModel
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files.opening import open_component
from glm_image.glm_core.vision.encoder import OTHER_PREFIXES, VisionConfig, VisionEncoder
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

HUB = Path(__file__).parents[1] / "configs" / "hub"
HUB_CONFIG = json.loads((HUB / "vision_language_encoder_config.json").read_text())
GRIDS = [(4, 4), (3, 9), (16, 16), (21, 5), (1, 1)]  # the position table is 16x16


def random_pixels(grid, batch=1):
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1])
    return torch.randn(batch, 3, 16 * grid[0], 16 * grid[1], generator=generator)


def reference_features(network, pixels, dtype=torch.float32):
    """The reference's features [C, h, w] of pixels [1, 3, 16 h, 16 w]."""
    height, width = pixels.shape[2] // 16, pixels.shape[3] // 16
    patches = pixels.reshape(3, height, 16, width, 16).permute(1, 3, 0, 2, 4).reshape(-1, 768)
    grid = torch.tensor([[1, height, width]])
    return network.get_image_features(patches.to(dtype), grid).pooler_output[0]


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("shape", reference.SHAPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_features_and_ids_equal_the_references(shape, grid):
    vision, network = pair(shape).vision, pair(shape).reference
    pixels = random_pixels(grid)
    theirs = reference_features(network, pixels)
    ours = vision.model["visual"](pixels)
    assert ours.shape == (1, *grid, vision.config.hidden_size)
    assert relative_error(ours[0].permute(2, 0, 1), theirs) < 1e-5

    ids = vision(pixels, torch.float32)
    assert ids.dtype == torch.int64
    assert ids.shape == (1, *grid)
    assert len(ids.unique()) > 1 or grid == (1, 1)
    assert ids.flatten().tolist() == network.get_image_tokens([theirs]).tolist()


def test_a_batch_equals_single_images():
    vision = pair("wide").vision
    pixels = random_pixels((5, 7), batch=3)
    ids = vision(pixels, torch.float32)
    assert not torch.equal(ids[0], ids[1])
    for image, expected in zip(pixels, ids, strict=True):
        assert torch.equal(vision(image[None], torch.float32)[0], expected)


def test_bf16_features_equal_the_references_bf16():
    vision, network = (
        copy.deepcopy(m).bfloat16() for m in (pair("deep").vision, pair("deep").reference)
    )
    pixels = random_pixels((12, 12))
    ours = vision.model["visual"](pixels.bfloat16())
    assert ours.dtype == torch.bfloat16
    theirs = reference_features(network, pixels, torch.bfloat16)
    assert relative_error(ours[0].permute(2, 0, 1).float(), theirs.float()) < 0.02
    exact = pair("deep").vision(pixels, torch.float32)
    assert (vision(pixels, torch.bfloat16) == exact).float().mean() > 0.9


def test_codes_that_bf16_cannot_distinguish_are_distinguished():
    """Distances are float32 between unit vectors, so a longer code is no nearer."""
    vision = copy.deepcopy(pair("small").vision)
    quantiser = vision.model["vqmodel"]
    table = quantiser.quantize["embedding"].weight
    features = torch.randn(1, 1, 1, 32, generator=torch.Generator().manual_seed(0))
    wanted = quantiser.quant_conv(features.permute(0, 3, 1, 2)).flatten()
    nudge = torch.zeros_like(wanted)
    nudge[0] = 1e-3 * wanted.norm()
    table.copy_(-wanted.expand_as(table))
    table[7], table[40], table[50] = wanted + nudge, 0.01 * wanted, 100 * (wanted - nudge)
    assert (table[7].bfloat16() == wanted.bfloat16()).float().mean() > 0.9
    assert quantiser(features).item() == 40


class OffloadingLayers:
    """Layers that store bfloat16 weights and cast them when they run, as a host's do."""

    class Linear(torch.nn.Linear):
        def forward(self, x):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)

    class LayerNorm(torch.nn.LayerNorm):
        def forward(self, x):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return torch.nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

    class Conv2d(torch.nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    class Embedding(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1  # like a patched weight, which only the layer knows


def test_only_layers_read_their_weights():
    both = pair("small")
    stored = {k: v.bfloat16() for k, v in both.vision.state_dict().items()}
    ours = VisionEncoder(both.vision.config, operations=OffloadingLayers)
    ours.load_state_dict(stored, assign=True)
    plain = VisionEncoder(both.vision.config)
    plain.load_state_dict(
        {k: v.float() + ("embedding" in k) for k, v in stored.items()}, assign=True
    )
    pixels = random_pixels((6, 4))
    assert torch.equal(ours(pixels, torch.float32), plain(pixels, torch.float32))


@pytest.mark.parametrize("shape", reference.SHAPES)
def test_the_network_loads_from_a_whole_checkpoint(shape, tmp_path):
    pair(shape).pipeline.save_pretrained(tmp_path)
    component = open_component(tmp_path, "ar")
    network = VisionEncoder(VisionConfig.from_dict(component.config), device="meta")
    component.check({k: v.shape for k, v in network.state_dict().items()}, OTHER_PREFIXES)
    network.load_state_dict(component.state_dict(OTHER_PREFIXES), assign=True)
    pixels = random_pixels((4, 6))
    expected = pair(shape).vision(pixels, torch.float32)
    assert torch.equal(network(pixels, torch.float32), expected)


def test_full_size_names_and_shapes_equal_the_references():
    with torch.device("meta"):
        theirs = GlmImageForConditionalGeneration(GlmImageConfig(**HUB_CONFIG)).state_dict()
    text = ARModel(ARConfig.from_dict(HUB_CONFIG), device="meta").state_dict()
    vision = VisionEncoder(VisionConfig.from_dict(HUB_CONFIG), device="meta").state_dict()
    assert not text.keys() & vision.keys()
    unused = {
        "model.vqmodel.post_quant_conv.weight": (1536, 2048, 1, 1),
        "model.vqmodel.post_quant_conv.bias": (1536,),
    }
    ours = {name: tuple(w.shape) for name, w in (text | vision).items()} | unused
    assert ours == {name: tuple(w.shape) for name, w in theirs.items()}
    assert all(name.startswith(OTHER_PREFIXES) for name in unused | text)
    assert not any(name.startswith(OTHER_PREFIXES) for name in vision)


def test_the_hubs_config_is_read():
    config = VisionConfig.from_dict(HUB_CONFIG)
    assert (config.layers, config.hidden_size, config.heads) == (40, 1536, 16)
    assert (config.position_side, config.codebook, config.code_dim) == (128, 16384, 2048)
    shorter = copy.deepcopy(HUB_CONFIG)
    del shorter["vision_config"]["attention_bias"]
    assert VisionConfig.from_dict(shorter) == config


BAD_CONFIGS = {
    "of another model": (lambda c: c.pop("vision_config"), "no 'vision_config'"),
    "without a codebook": (
        lambda c: c["vq_config"].pop("num_embeddings"),
        "no '.*num_embeddings'",
    ),
    "of uneven heads": (lambda c: c["vision_config"].update(num_heads=7), "1536 .* its 7 heads"),
    "that merges patches": (
        lambda c: c["vision_config"].update(spatial_merge_size=2),
        "spatial_merge_size is 2",
    ),
    "of another activation": (
        lambda c: c["vision_config"].update(hidden_act="silu"),
        "hidden_act is 'silu'",
    ),
    "of two widths": (
        lambda c: c["vq_config"].update(latent_channels=1024),
        "latent_channels is 1024, but only 1536",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_an_unsupported_config_is_refused(case):
    config = copy.deepcopy(HUB_CONFIG)
    spoil, sentence = BAD_CONFIGS[case]
    spoil(config)
    with pytest.raises(GLMImageError, match=sentence):
        VisionConfig.from_dict(config)
