"""Denoising with ComfyUI's samplers: the checkpoint's schedule, and the one-node decode."""

from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from torch import Tensor

from ...glm_core.data.grids import PIXELS_PER_LATENT
from .conditioning import for_latent
from .decoder import GLMImageModel, require_decoder, require_size


class ResolutionShift(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """sigma = mu s / (1 + (mu - 1) s): ComfyUI's discrete flow with the shift mu."""


def latent_size(latent: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of the image in pixels."""
    height, width = latent["samples"].shape[-2:]
    return height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT


def sigmas(model: Any, latent: dict[str, Any], steps: int, denoise: float) -> Tensor:
    """The checkpoint's noise levels for the latent's size: float32 [steps + 1]."""
    network = require_decoder(model)
    return network.schedule.sigmas(steps, network.shift(latent_size(latent)), denoise)


def with_resolution_shift(model: Any, latent: dict[str, Any]) -> Any:
    """A clone with the noise levels of the latent's size, which KSampler's schedulers read."""
    network: GLMImageModel = require_decoder(model)
    sampling = ResolutionShift(network.model_config)
    sampling.set_parameters(shift=network.shift(latent_size(latent)))
    clone = model.clone()
    clone.add_object_patch("model_sampling", sampling)
    return clone


def decode(
    model: Any,
    positive: list,
    negative: list,
    latent: dict[str, Any],
    seed: int,
    steps: int,
    cfg: float,
    denoise: float,
) -> dict[str, Any]:
    """The denoised LATENT: Euler with CFG over the checkpoint's schedule.

    SamplerCustomAdvanced with GLM-Image Scheduler gives the same. Only here is the latent's
    `batch_index` known for certain, so that a part of a batch gets its own tokens.
    """
    require_decoder(model).notices.begin()  # as ComfyUI runs nothing where there are no levels
    levels = sigmas(model, latent, steps, denoise)
    require_size(model, latent["samples"].shape)  # before there is noise of that size
    positive, negative = (for_latent(given, latent) for given in (positive, negative))
    if "model_sampling" not in model.object_patches:
        # ComfyUI reads shares of the steps from it; unshifted, they would be those of 1024 pixels.
        model = with_resolution_shift(model, latent)
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    denoised = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.sampler_object("euler"),
        levels,
        positive,
        negative,
        samples,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, max(len(levels) - 1, 0)),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return {**latent, "samples": denoised.to(comfy.model_management.intermediate_device())}
