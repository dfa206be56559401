"""A whole image through the nodes against the reference pipeline, from the same noise."""

from pathlib import Path

import folder_paths
import pytest
import torch
from helpers import relative_error, same, stages
from reference import SHAPES

import nodes as core_nodes
from scripts.without_comfyui import TextToImage

PROMPT = "a sign that says 'OPEN 24h' beside \"no\" door"
SIZE = (96, 160)  # height, width


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cfg", [1.5, 1.0])
def test_latents_and_pixels_equal_the_reference(nodes, pipelines, shape: str, cfg: float) -> None:
    run = stages(nodes, shape, PROMPT, SIZE, steps=4, cfg=cfg)
    pipeline = pipelines[shape]
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt=PROMPT,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=4,
        guidance_scale=cfg,
        prior_token_ids=run.decoder_ids,
        latents=run.noise,
        output_type="latent",
    ).images
    normalised = run.model.model.process_latent_in(run.latent["samples"])
    assert relative_error(normalised, expected) < 1e-4

    vae = pipeline.vae
    mean, std = (
        torch.tensor(getattr(vae.config, name)).view(1, -1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    pixels = vae.decode(expected * std + mean).sample
    pixels = ((pixels + 1) / 2).clamp(0, 1).movedim(1, -1)
    assert (run.image - pixels).abs().max() < 1 / 255


@pytest.mark.parametrize("shape", SHAPES)
def test_the_example_without_comfyui_makes_the_same_picture(nodes, shape: str) -> None:
    run = stages(nodes, shape, PROMPT, SIZE, steps=4, cfg=1.5)
    snapshot, cpu = Path(folder_paths.models_dir, "glm_image", shape), torch.device("cpu")
    example = TextToImage(snapshot, PROMPT, SIZE, 4, 1.5, run.seed, cpu, torch.float32)
    assert torch.equal(example.write_tokens(), run.tokens.tokens.long())
    assert (example.paint().movedim(0, -1) - run.image[0]).abs().max() < 1 / 255


def test_shares_of_the_steps_are_shares_of_the_images_own_schedule(nodes) -> None:
    """One prompt for the first half of the steps and another for the rest: GLM-Image Decode agrees
    with the model that KSampler gets."""
    run = stages(nodes, "small", PROMPT, SIZE, steps=4)
    by_range = core_nodes.ConditioningSetTimestepRange().set_range
    empty = [[states[:, :1], dict(values)] for states, values in run.positive]
    positive = by_range(run.positive, 0, 0.5)[0] + by_range(empty, 0.5, 1)[0]
    (model,) = nodes["GLMImageModelSampling"].execute(run.model, run.empty).result

    def decode(model, positive):
        rest = (run.negative, run.empty, run.seed, 4, 1.5, 1.0)
        return nodes["GLMImageDecode"].execute(model, positive, *rest).result[0]["samples"]

    halves = decode(run.model, positive)
    assert same(halves, decode(model, positive))
    assert not same(halves, decode(run.model, run.positive))
    assert not same(halves, decode(run.model, empty))
