"""The DiT against diffusers' own: predictions, keys, shapes."""

import json
from pathlib import Path

import pytest
import torch
from glm_image.glm_core.attention import sdpa
from glm_image.glm_core.decoder.model import DROPPED, Decoder, DecoderConfig
from glm_image.glm_core.errors import GLMImageError
from reference import GlmImageTransformer2DModel

HUB = Path(__file__).parents[1] / "configs" / "hub"

SHAPES = {
    "small": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": 24,
        "time_embed_dim": 16,
        "condition_dim": 8,
        "prior_vq_quantizer_codebook_size": 64,
    },
    "other channels": {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 3,
        "text_embed_dim": 20,
        "time_embed_dim": 12,
        "condition_dim": 6,
        "prior_vq_quantizer_codebook_size": 33,
    },
    "patch of 1": {
        "patch_size": 1,
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 20,
        "condition_dim": 10,
        "prior_vq_quantizer_codebook_size": 128,
    },
}


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


def pair(shape: str) -> tuple[Decoder, GlmImageTransformer2DModel]:
    """Ours and the reference on the same random weights, large enough to make every path count."""
    torch.manual_seed(0)
    reference = GlmImageTransformer2DModel(**SHAPES[shape]).eval()
    for parameter in reference.parameters():
        parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.1)
    with torch.device("meta"):
        ours = Decoder(DecoderConfig.from_dict(SHAPES[shape]))
    ours.load_state_dict(reference.state_dict(), assign=True)
    return ours, reference


def inputs(config: DecoderConfig, rows: int, cols: int, batch: int = 2, text: int = 5) -> dict:
    generator = torch.Generator().manual_seed(1)
    p = config.patch_size
    return {
        "x": torch.randn(batch, config.in_channels, rows * p, cols * p, generator=generator),
        "timestep": torch.tensor([980.0, 17.0])[:batch],
        "glyphs": torch.randn(batch, text, config.text_embed_dim, generator=generator),
        "tokens": torch.randint(
            config.prior_vq_quantizer_codebook_size, (batch, rows, cols), generator=generator
        ),
        "size": (rows * p * 8, cols * p * 8),
    }


def reference_prediction(reference, args: dict, drop: bool) -> torch.Tensor:
    batch = args["x"].shape[0]
    ids = args["tokens"].flatten(1)
    return reference(
        hidden_states=args["x"],
        encoder_hidden_states=args["glyphs"],
        prior_token_id=ids,
        prior_token_drop=torch.full_like(ids, drop, dtype=torch.bool),
        timestep=args["timestep"],
        target_size=torch.tensor([args["size"]] * batch, dtype=torch.float32),
        crop_coords=torch.zeros(batch, 2),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("drop", [False, True], ids=["conditional", "unconditional"])
def test_prediction_equals_reference(shape: str, drop: bool) -> None:
    ours, reference = pair(shape)
    args = inputs(ours.config, rows=6, cols=4)
    expected = reference_prediction(reference, args, drop)
    if drop:
        args["tokens"] = torch.full_like(args["tokens"], DROPPED)
    assert relative_error(ours(**args), expected) < 1e-5


def test_prior_time_size_text_and_position_all_matter() -> None:
    ours, _ = pair("small")
    args = inputs(ours.config, rows=6, cols=4)
    base = ours(**args)
    changes = {
        "tokens": (args["tokens"] + 1) % ours.config.prior_vq_quantizer_codebook_size,
        "timestep": args["timestep"] - 10,
        "glyphs": args["glyphs"].flip(1) + 0.5,
        "size": (args["size"][1], args["size"][0]),
        "x": args["x"].flip(-1),
    }
    for name, value in changes.items():
        assert relative_error(ours(**{**args, name: value}), base) > 1e-3, name


def test_conditional_and_unconditional_samples_mix_in_one_batch() -> None:
    ours, _ = pair("small")
    args = inputs(ours.config, rows=4, cols=4)
    args["tokens"][1] = DROPPED
    both = ours(**args)
    for i in range(2):
        one = {k: v if k == "size" else v[i : i + 1] for k, v in args.items()}
        assert relative_error(both[i : i + 1], ours(**one)) < 1e-5


def test_latents_off_the_patch_grid_keep_their_size() -> None:
    ours, _ = pair("small")
    args = inputs(ours.config, rows=4, cols=4)
    args["x"] = args["x"][..., :7, :5]
    args["tokens"] = args["tokens"][:, :4, :3]
    assert ours(**args).shape == args["x"].shape


def test_further_options_reach_the_attention_of_every_block() -> None:
    ours, _ = pair("small")
    args = inputs(ours.config, rows=4, cols=4)
    expected, seen = ours(**args), []

    def attention(*states, option: object, **options) -> torch.Tensor:
        seen.append(option)
        return sdpa(*states, **options)

    for block in ours.transformer_blocks:
        block.attn1.attention = attention
    x, timestep = args.pop("x"), args.pop("timestep")
    invariants = ours.prepare(**args, dtype=x.dtype)
    assert torch.equal(ours.predict(x, timestep, invariants, option="mine"), expected)
    assert seen == ["mine", "mine"]


def test_full_size_keys_and_shapes_equal_the_reference() -> None:
    config = json.loads((HUB / "transformer_config.json").read_text())
    with torch.device("meta"):
        ours = Decoder(DecoderConfig.from_dict(config)).state_dict()
        reference = GlmImageTransformer2DModel.from_config(config).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in reference.items()}
    assert sum(v.numel() for v in ours.values()) == 6_926_882_880


def test_config_errors_name_the_value() -> None:
    with pytest.raises(GLMImageError, match="no 'num_layers'"):
        DecoderConfig.from_dict({k: v for k, v in SHAPES["small"].items() if k != "num_layers"})
    with pytest.raises(GLMImageError, match="attention_head_dim is 18"):
        DecoderConfig.from_dict({**SHAPES["small"], "attention_head_dim": 18})
