"""The second stage: latents from semantic tokens, in one node or with ComfyUI's samplers."""

from typing import Any

from comfy_api.latest import io

from .host import sampling
from .inputs import seed_input
from .messages import message
from .node import Node
from .types import CATEGORY


def _steps() -> io.Int.Input:
    return io.Int.Input(
        "steps",
        default=50,
        min=1,
        max=10000,
        tooltip="Denoising steps; the checkpoint recommends 50.",
    )


def _denoise() -> io.Float.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="1 starts from pure noise. Below 1, sampling starts at a lower noise level and "
        "part of the latent's own image remains.",
    )


def _model_and_latent() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="From GLM-Image Load Decoder."),
        io.Latent.Input("latent", tooltip="From GLM-Image Apply Tokens; its size is used."),
    ]


class Scheduler(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageScheduler",
            display_name="GLM-Image Scheduler",
            category=f"{CATEGORY}/sampling",
            description="Makes the checkpoint's noise levels for the latent's size, for Sampler "
            "Custom Advanced. Larger images get more steps at high noise. Nodes that take a share "
            "of the steps (Set Timestep Range, EasyCache) need a guider with the MODEL of "
            "GLM-Image Model Sampling.",
            inputs=[*_model_and_latent(), _steps(), _denoise()],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model: Any, latent: dict, steps: int, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(sampling.sigmas(model, latent, steps, denoise))


class ModelSampling(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageModelSampling",
            display_name="GLM-Image Model Sampling",
            category=f"{CATEGORY}/sampling",
            description="Shifts the model's noise levels to the latent's size, so that KSampler "
            "and its schedulers can drive the decoder.",
            inputs=_model_and_latent(),
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, latent: dict) -> io.NodeOutput:
        return io.NodeOutput(sampling.with_resolution_shift(model, latent))


class Decode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageDecode",
            display_name="GLM-Image Decode",
            category=CATEGORY,
            description="Turns semantic tokens into a latent with Euler, CFG and the checkpoint's "
            "schedule. Sampler Custom Advanced with GLM-Image Scheduler gives the same latent. "
            "Each latent of a batch gets the tokens of its batch_index.",
            inputs=[
                io.Model.Input("model", tooltip="From GLM-Image Load Decoder."),
                io.Conditioning.Input("positive", tooltip="From GLM-Image Apply Tokens."),
                io.Conditioning.Input("negative", tooltip="From GLM-Image Apply Tokens."),
                io.Latent.Input(
                    "latent", tooltip="From GLM-Image Apply Tokens, or of an encoded image."
                ),
                seed_input(
                    "Seed of the noise. It changes details; the tokens' seed decides the layout "
                    "and the content."
                ),
                _steps(),
                io.Float.Input(
                    "cfg",
                    default=1.5,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance; the checkpoint recommends 1.5. 1 is off and halves the "
                    "time.",
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
        return io.NodeOutput(latent, ui=message(model.model.notices.said))
