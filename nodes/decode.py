"""The second stage: latents from semantic tokens, in one node or with ComfyUI's own samplers."""

from typing import Any

from comfy_api.latest import io

from .host import sampling
from .types import CATEGORY


def _steps() -> io.Int.Input:
    return io.Int.Input(
        "steps", default=50, min=1, max=10000, tooltip="Denoising steps; the checkpoint's are 50."
    )


def _denoise() -> io.Float.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Below 1 the latent's own image is kept in part: only the last of the noise levels "
        "are run.",
    )


class Scheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageScheduler",
            display_name="GLM-Image Scheduler",
            category=f"{CATEGORY}/sampling",
            description="The checkpoint's noise levels for the latent's size, for Sampler Custom "
            "Advanced. Larger images are given more steps at high noise. Where a share of the "
            "steps is meant (Set Timestep Range, EasyCache), give the guider the MODEL of "
            "GLM-Image Model Sampling.",
            inputs=[
                io.Model.Input("model", tooltip="From GLM-Image Load Decoder."),
                io.Latent.Input("latent", tooltip="From GLM-Image Apply Tokens; sets the size."),
                _steps(),
                _denoise(),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model: Any, latent: dict, steps: int, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(sampling.sigmas(model, latent, steps, denoise))


class ModelSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageModelSampling",
            display_name="GLM-Image Model Sampling",
            category=f"{CATEGORY}/sampling",
            description="Shifts the model's noise levels to the latent's size, so that KSampler "
            "and its schedulers can drive the decoder.",
            inputs=[
                io.Model.Input("model", tooltip="From GLM-Image Load Decoder."),
                io.Latent.Input("latent", tooltip="From GLM-Image Apply Tokens; sets the size."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, latent: dict) -> io.NodeOutput:
        return io.NodeOutput(sampling.with_resolution_shift(model, latent))


class Decode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageDecode",
            display_name="GLM-Image Decode",
            category=CATEGORY,
            description="Turns semantic tokens into a latent with the checkpoint's schedule: Euler "
            "with CFG, the same as Sampler Custom Advanced with GLM-Image Scheduler.",
            inputs=[
                io.Model.Input("model", tooltip="From GLM-Image Load Decoder."),
                io.Conditioning.Input("positive", tooltip="From GLM-Image Apply Tokens."),
                io.Conditioning.Input("negative", tooltip="From GLM-Image Apply Tokens."),
                io.Latent.Input("latent", tooltip="From GLM-Image Apply Tokens, or an image's."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Of the noise; the layout and the content come from the tokens' seed.",
                ),
                _steps(),
                io.Float.Input(
                    "cfg",
                    default=1.5,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance; the checkpoint's is 1.5. 1 is off and takes half the time.",
                ),
                _denoise(),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list,
        negative: list,
        latent: dict,
        seed: int,
        steps: int,
        cfg: float,
        denoise: float,
    ) -> io.NodeOutput:
        latent = sampling.decode(model, positive, negative, latent, seed, steps, cfg, denoise)
        return io.NodeOutput(latent)
