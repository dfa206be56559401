"""A plan's bytes against the modules' own, at the hub's full sizes, on the meta device."""

import weakref

import pytest
import torch
from full_size import components, hub_config
from glm_image.glm_core.ar.model import ARConfig, ARModel
from glm_image.glm_core.decoder.model import Decoder, DecoderConfig
from glm_image.glm_core.files.weight_dtypes import WEIGHT_DTYPES, is_layer_matrix, stored_bytes
from glm_image.glm_core.glyph.encoder import GlyphConfig, GlyphEncoder
from glm_image.glm_core.placement import memory
from glm_image.glm_core.placement.plan import Stage
from glm_image.glm_core.placement.stages import Request, stages
from glm_image.glm_core.quant.packing import FORMATS, quantise
from glm_image.glm_core.vae import AutoencoderKL, VAEConfig
from glm_image.glm_core.vision.encoder import VisionConfig, VisionEncoder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NETWORKS = {
    "ar": ("ar", ARModel, ARConfig, torch.bfloat16),
    "vision": ("ar", VisionEncoder, VisionConfig, torch.bfloat16),
    "decoder": ("decoder", Decoder, DecoderConfig, torch.bfloat16),
    "glyph": ("glyph", GlyphEncoder, GlyphConfig, torch.float32),
    "vae": ("vae", AutoencoderKL, VAEConfig, torch.bfloat16),
}
LAYERS = {"ar": "model.language_model.layers", "decoder": "transformer_blocks"}


def network(stage: str) -> nn.Module:
    component, kind, config, dtype = NETWORKS[stage]
    with torch.device("meta"):
        return kind(config.from_dict(hub_config(component)), dtype=dtype)


def full_size_stages(weights: str = "default") -> dict[str, Stage]:
    found = stages(components(), weights, Request(1024, 1024, references=1))
    return {stage.name: stage for stage in found}


def allocated(module: nn.Module, weights: str = "default") -> int:
    return sum(_allocated(key, value, weights) for key, value in module.named_parameters())


def _allocated(key: str, value: torch.Tensor, weights: str) -> int:
    if weights == "fp8_e4m3fn" and is_layer_matrix(key, value.ndim):
        value = value.to(torch.float8_e4m3fn)
    return value.nbytes


@pytest.mark.parametrize("stage", NETWORKS)
@pytest.mark.parametrize("weights", ["default", "fp8_e4m3fn"])
def test_weights_are_what_the_modules_allocate(stage: str, weights: str) -> None:
    planned = full_size_stages(weights)[stage]
    module = network(stage)
    stored = weights if stage in ("ar", "vision", "decoder") else "default"
    assert planned.weights == pytest.approx(allocated(module, stored), rel=0.01)
    if stage in LAYERS:
        layers = module.get_submodule(LAYERS[stage])
        prefix = f"{LAYERS[stage]}."
        expected = [
            sum(_allocated(f"{prefix}{i}.{k}", v, stored) for k, v in layer.named_parameters())
            for i, layer in enumerate(layers)
        ]
        assert planned.layers == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("weights", ["default", "bf16", "fp32", "fp8_e4m3fn", "int8", "int4"])
def test_a_weight_is_counted_as_it_is_stored(weights: str) -> None:
    component = components()["decoder"]
    for key in (
        "transformer_blocks.0.attn1.to_q.weight",
        "transformer_blocks.0.attn1.to_q.bias",
        "transformer_blocks.0.norm1.linear.weight",
        "proj_out.weight",
    ):
        value = torch.empty(component.tensors[key].shape, dtype=torch.bfloat16)
        if weights in FORMATS and is_layer_matrix(key, value.ndim):
            value = quantise(value, weights)
        elif weights in ("bf16", "fp32") or is_layer_matrix(key, value.ndim):
            value = value.to(WEIGHT_DTYPES[weights] or value.dtype)
        assert stored_bytes(component, key, weights) == value.nbytes


# ---- working memory ------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The peak bytes of tensors made while it is active."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.live = self.most = 0
        self._seen = {value.untyped_storage()._cdata for value in module.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += storage.nbytes()
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.live -= nbytes


def no_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **_) -> torch.Tensor:
    """The output of attention, without the scores, which no kernel stores."""
    return q.new_empty(q.shape[0], q.shape[2], heads * q.shape[3])


def passes() -> dict:
    """By name: a network, its planned work at 1024 x 1024, and a pass over empty tensors."""
    half = {"dtype": torch.bfloat16, "device": "meta"}
    latent = torch.empty(1, 16, 128, 128, **half)
    decoder, vae, vision = network("decoder"), network("vae"), network("vision")
    for block in decoder.transformer_blocks:
        block.attn1.attention = no_scores
    for block in vision.model["visual"].blocks:
        block.attn = nn.Identity()  # it takes no other attention, and the MLP is wider
    ids = torch.empty(1, 64, 64, dtype=torch.int64, device="meta")
    invariants = decoder.prepare(
        torch.empty(1, 30, 1472, **half), ids, (1024, 1024), torch.bfloat16
    )
    cached = [[(torch.empty(1, 32, 4096, 128, **half),) * 2]] * 30
    time = torch.empty(1, device="meta")

    def step(**references):
        return lambda: decoder.predict(latent, time, invariants, **references)

    planned = {name: full_size_stages()[name].work for name in ("decoder", "vae", "vision")}
    alone = memory.decoder(decoder.config, 1, (128, 128), 0, torch.bfloat16)
    pixels = torch.empty(1, 3, 1024, 1024, device="meta")
    return {
        "decoder": (decoder, alone, step()),
        "decoder with a reference": (decoder, planned["decoder"], step(references=cached)),
        "vae": (vae, planned["vae"], lambda: vae.decode(latent)),
        "vision": (vision, planned["vision"], lambda: vision(pixels, torch.bfloat16)),
    }


@pytest.mark.parametrize("name", ["decoder", "decoder with a reference", "vae", "vision"])
def test_planned_work_covers_a_pass_and_little_more(name: str) -> None:
    module, planned, run = passes()[name]
    with LiveBytes(module) as memory:
        run()
    assert 0.7 * planned < memory.most < 1.02 * planned
