"""The AR stage of the pack and of the reference, on the same random weights."""

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import reference
import torch
from glm_image.glm_core.ar_model import VISION_PREFIXES, ARConfig, ARModel
from glm_image.glm_core.ar_sampler import SamplingOptions, sample_layout, sample_tokens
from glm_image.glm_core.prompt import PromptTokenizer
from torch import Tensor

PLACE = {"device": torch.device("cpu"), "dtype": torch.float32}


@dataclass(frozen=True)
class Pair:
    model: ARModel
    tokenizer: PromptTokenizer
    pipeline: reference.GlmImagePipeline

    @property
    def reference(self) -> reference.GlmImageForConditionalGeneration:
        return self.pipeline.vision_language_encoder

    def ids(self, prompt: str, grid: tuple[int, int]) -> list[int]:
        return self.tokenizer.text_to_image(prompt, grid)

    def tokens(
        self, prompt: str, grid: tuple[int, int], seed: int = 0, batch: int = 1, **kwargs
    ) -> tuple[Tensor, Tensor]:
        options = kwargs.pop("options", SamplingOptions())
        ids = self.ids(prompt, grid)
        return sample_tokens(self.model, ids, grid, seed, batch, options, **PLACE, **kwargs)

    def layout(
        self, prompt: str, grid: tuple[int, int], seed: int = 0, batch: int = 1, **kwargs
    ) -> Tensor:
        options = kwargs.pop("options", SamplingOptions())
        ids = self.ids(prompt, grid)
        return sample_layout(self.model, ids, grid, seed, batch, options, **PLACE, **kwargs)


@cache
def pair(shape_name: str) -> Pair:
    pipeline = reference.reference_pipeline(shape_name)
    network = pipeline.vision_language_encoder
    model = ARModel(ARConfig.from_dict(network.config.to_dict()), device="meta")
    weights = network.state_dict()
    text = {name: w for name, w in weights.items() if not name.startswith(VISION_PREFIXES)}
    model.load_state_dict(text, assign=True)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.processor.save_pretrained(folder)
        tokenizer = PromptTokenizer(
            (Path(folder) / "tokenizer.json").read_text(),
            json.loads((Path(folder) / "tokenizer_config.json").read_text()),
            (Path(folder) / "chat_template.jinja").read_text(),
        )
    return Pair(model, tokenizer, pipeline)
