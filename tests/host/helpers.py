"""The text-to-image graph, called node by node."""

from dataclasses import dataclass
from typing import Any

import comfy.sample
import torch
from glm_image.glm_core.ar.step import SamplingOptions
from glm_image.glm_core.data.grids import upsample_tokens
from glm_image.glm_core.data.tokens import Layout, SemanticTokens
from glm_image.nodes.host.requests import layout_of, requests_of, tokens_of
from torch import Tensor


@dataclass
class Stages:
    """The outputs of the graph's nodes."""

    ar: Any
    model: Any
    clip: Any
    vae: Any
    tokens: Any
    layout: Any
    positive: list
    negative: list
    empty: dict
    latent: dict
    image: Tensor
    seed: int

    @property
    def decoder_ids(self) -> Tensor:
        """int64 [B, N], one id per 16 pixels, as the reference pipeline takes them."""
        return upsample_tokens(self.tokens.tokens).flatten(1).long()

    @property
    def noise(self) -> Tensor:
        empty = self.empty
        return comfy.sample.prepare_noise(empty["samples"], self.seed, empty["batch_index"])


def stages(
    nodes: dict,
    shape: str,
    prompt: str,
    size: tuple[int, int],
    *,
    steps: int = 2,
    cfg: float = 1.5,
    batch: int = 1,
    seed: int = 7,
) -> Stages:
    def run(node: str, *args: Any) -> tuple:
        return nodes[node].execute(*args).result

    height, width = size
    (ar,) = run("GLMImageLoadAR", shape, "default")
    (model,) = run("GLMImageLoadDecoder", shape, "default")
    (clip,) = run("GLMImageLoadGlyphEncoder", shape)
    (vae,) = run("GLMImageLoadVAE", shape)
    node = nodes["GLMImageSampleTokens"]
    tokens, layout = sampled(node, ar, prompt, width, height, seed, 0.9, 0.75, 0, batch)
    glyphs, _ = run("GLMImageGlyphEncode", clip, prompt)
    positive, negative, empty = run("GLMImageApplyTokens", glyphs, tokens, -1)
    (latent,) = run("GLMImageDecode", model, positive, negative, empty, seed, steps, cfg, 1.0)
    image = vae.decode(latent["samples"])
    return Stages(
        ar, model, clip, vae, tokens, layout, positive, negative, empty, latent, image, seed
    )


def sampled(node: type, *values: Any, **more: Any) -> tuple:
    """The outputs of Sample Tokens or Sample Layout for lists of one entry."""
    return tuple(entry for (entry,) in run_sampler(node, *values, **more).result)


def run_sampler(node: type, *values: Any, **more: Any) -> Any:
    """Runs Sample Tokens or Sample Layout on lists of one entry."""
    names = [given.id for given in node.define_schema().inputs]
    given = dict(zip(names, values, strict=False)) | more
    return node.execute(**{name: [value] for name, value in given.items()})


def written(
    ar: Any, prompt: str, height: int, width: int, seed: int, batch: int
) -> tuple[SemanticTokens, Layout]:
    """A batch of the AR model's, without a node."""
    requests = requests_of(ar.codebook, prompt, height, width, seed, batch, SamplingOptions())
    samples = ar.write(requests, 1)
    return tokens_of(requests, samples, ar.codebook), layout_of(requests, samples, ar.codebook)


def planned(nodes: dict, shape: str = "small", **asked: Any) -> tuple:
    """A device plan for a 96x64 picture, and its table."""
    inputs = {
        "model_name": shape,
        "weight_dtype": "default",
        "width": 96,
        "height": 64,
        "batch_size": 1,
        "references": 0,
        "strategy": "auto",
        **dict.fromkeys(("ar", "decoder", "glyph", "vae"), "auto"),
        "ar_split": "",
        "decoder_split": "",
        "reserve_gb": 1.0,
    }
    return nodes["GLMImageDevicePlan"].execute(**inputs | asked).result


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
