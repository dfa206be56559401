"""The AR stage of the pack and of the reference, on the same random weights."""

import tempfile
from dataclasses import dataclass
from functools import cache

import reference
import torch
from glm_image.glm_core.ar.model import ARConfig, ARModel
from glm_image.glm_core.ar.philox import batch_seeds
from glm_image.glm_core.ar.prompt import Prompt, PromptTokenizer
from glm_image.glm_core.ar.sampler import SamplingRun, sample_layout, sample_tokens
from glm_image.glm_core.ar.step import SamplingOptions
from glm_image.glm_core.files.opening import open_component
from glm_image.glm_core.vision.encoder import (
    OTHER_PREFIXES,
    VISION_PREFIXES,
    VisionConfig,
    VisionEncoder,
)
from glm_image.glm_core.vision.pixels import ImageConfig
from torch import Tensor

CPU_FLOAT32 = {"device": torch.device("cpu"), "dtype": torch.float32}


@dataclass(frozen=True)
class Pair:
    model: ARModel
    tokenizer: PromptTokenizer
    vision: VisionEncoder
    images: ImageConfig
    pipeline: reference.GlmImagePipeline

    @property
    def reference(self) -> reference.GlmImageForConditionalGeneration:
        return self.pipeline.vision_language_encoder

    def prompt(self, text: str, grid: tuple[int, int]) -> Prompt:
        return self.tokenizer.text_to_image(text, grid)

    def tokens(
        self, prompt: str, grid: tuple[int, int], preview=None, large=None, **how
    ) -> tuple[Tensor, Tensor]:
        read = self.prompt(prompt, grid)
        return sample_tokens(self.model, read, grid, run(**how), preview=preview, large=large)

    def layout(self, prompt: str, grid: tuple[int, int], preview=None, **how) -> Tensor:
        return sample_layout(
            self.model, self.prompt(prompt, grid), grid, run(**how), preview=preview
        )


DEFAULTS = SamplingOptions()


def run(seed: int = 0, batch: int = 1, options: SamplingOptions = DEFAULTS, **how) -> SamplingRun:
    return SamplingRun(batch_seeds(seed, batch), options, **CPU_FLOAT32, **how)


@cache
def pair(shape_name: str) -> Pair:
    with tempfile.TemporaryDirectory() as folder:
        pipeline = reference.reference_snapshot(folder, shape_name)
        component = open_component(folder, "ar")
    processor = component.processor
    return Pair(
        _network(ARModel, ARConfig, pipeline, VISION_PREFIXES),
        PromptTokenizer(processor.tokenizer, processor.tokenizer_config, processor.chat_template),
        _network(VisionEncoder, VisionConfig, pipeline, OTHER_PREFIXES),
        ImageConfig.from_dict(processor.image),
        pipeline,
    )


def _network(kind, config, pipeline, ignored_prefixes):
    reference_network = pipeline.vision_language_encoder
    network = kind(config.from_dict(reference_network.config.to_dict()), device="meta")
    weights = reference_network.state_dict()
    stored = {name: w for name, w in weights.items() if not name.startswith(ignored_prefixes)}
    network.load_state_dict(stored, assign=True)
    return network
