"""The VAE against diffusers' AutoencoderKL."""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from glm_image.glm_core import vae
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.latent_rgb import dead_leaves, fit_colours
from glm_image.glm_core.vae import VAEConfig
from reference import AutoencoderKL, reference_pipeline
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
HUB = Path(__file__).parents[1] / "configs" / "hub"
SHAPES = {
    "hub-like": {"block_out_channels": (8, 16, 24, 24), "layers_per_block": 3},
    "two blocks": {"block_out_channels": (16, 8), "layers_per_block": 1},
    "one width": {"block_out_channels": (8, 8, 8), "layers_per_block": 2, "latent_channels": 4},
}


def reference_of(shape: dict) -> AutoencoderKL:
    torch.manual_seed(1)
    blocks, channels = len(shape["block_out_channels"]), shape.get("latent_channels", 16)
    reference = AutoencoderKL(
        **{"latent_channels": channels, **shape},
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        latents_mean=[0.5] * channels,
        latents_std=[2.0] * channels,
    ).eval()
    for parameter in reference.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return reference


def network_of(reference: AutoencoderKL) -> vae.AutoencoderKL:
    config = VAEConfig.from_dict(json.loads(reference.to_json_string()))
    network = vae.AutoencoderKL(config, device="meta")
    network.load_state_dict(reference.state_dict(), assign=True)
    return network


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-4, f"relative error {error:.2e}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_encode_equals_the_references_mode(shape):
    reference = reference_of(shape)
    network = network_of(reference)
    pixels = torch.rand(2, 3, 64, 48) * 2 - 1
    latents = network.encode(pixels)
    assert latents.shape[2:] == (64 // network.config.downscale, 48 // network.config.downscale)
    assert_close(latents, reference.encode(pixels).latent_dist.mode())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decode_equals_the_references(shape):
    reference = reference_of(shape)
    latents = torch.randn(2, reference.config.latent_channels, 6, 10)
    assert_close(network_of(reference).decode(latents), reference.decode(latents).sample)


def test_the_pipelines_vae_loads():
    reference = reference_pipeline("wide").vae
    latents = torch.randn(1, reference.config.latent_channels, 4, 4)
    assert_close(network_of(reference).decode(latents), reference.decode(latents).sample)


def test_full_size_keys_and_shapes_equal_the_references():
    config = json.loads((HUB / "vae_config.json").read_text())
    with torch.device("meta"):
        reference = AutoencoderKL.from_config(config).state_dict()
    ours = vae.AutoencoderKL(VAEConfig.from_dict(config), device="meta").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in reference.items()}
    assert sum(v.numel() for v in ours.values()) == 406_100_643


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mid_block_add_attention": True}, "mid_block_add_attention is True"),
        ({"use_quant_conv": None}, "no 'use_quant_conv'"),
        ({"use_post_quant_conv": True}, "use_post_quant_conv is True"),
        ({"act_fn": "relu"}, "act_fn is 'relu'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types is"),
        ({"latents_mean": None}, "no 'latents_mean'"),
        ({"latents_std": [1.0] * 4}, "latents_std has 4 values and latent_channels is 16"),
        ({"norm_num_groups": 48}, "128 is no multiple of norm_num_groups 48"),
    ],
)
def test_an_unsupported_config_is_refused(change, sentence):
    config = json.loads((HUB / "vae_config.json").read_text()) | change
    with pytest.raises(GLMImageError, match=sentence):
        VAEConfig.from_dict({k: v for k, v in config.items() if v is not None})


@pytest.fixture(scope="module")
def trained():
    """The VAE of the trained model in `tiny/`, in float32."""
    folder = ROOT / "tiny" / "vae"
    network = vae.AutoencoderKL(
        VAEConfig.from_dict(json.loads((folder / "config.json").read_text()))
    )
    (file,) = folder.glob("*.safetensors")
    network.load_state_dict(load_file(file))
    return network.float()


def test_the_shipped_colours_are_those_of_the_trained_vae(trained):
    """After another training write what is fitted here into the file."""
    (file,) = (ROOT / "nodes" / "host" / "latent_colours").glob("*.json")
    shipped = json.loads(file.read_text())
    fitted = fit_colours(trained, torch.device("cpu"), torch.float32)
    for name, values in asdict(fitted).items():
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(shipped[name]), atol=2e-3, rtol=0
        )


def test_colours_are_those_of_the_pictures(trained):
    """Of a picture that was not fitted to: mirrored leaves of other colours."""
    fitted = fit_colours(trained, torch.device("cpu"), torch.float32)
    pictures = -dead_leaves().flip(1, 2)
    latents, config = trained.encode(pictures), trained.config
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
    colours = torch.einsum("bchw,cr->brhw", (latents - mean) / std, torch.tensor(fitted.factors))
    colours += torch.tensor(fitted.bias)[:, None, None]
    small = F.avg_pool2d(pictures, 8)
    correlation = torch.corrcoef(torch.stack((colours.flatten(), small.flatten())))[0, 1]
    assert correlation > 0.9  # 0.959 was measured


def test_a_vae_that_overflows_has_no_colours(trained):
    broken = copy.deepcopy(trained)
    broken.encoder.conv_in.weight[:] = float("inf")
    assert fit_colours(broken, torch.device("cpu"), torch.float32) is None
