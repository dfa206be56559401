"""The host's out-of-memory error, raised inside each stage: one sentence, and nothing is lost."""

import gc
import resource

import comfy.model_management
import pytest
import torch
from glm_image.glm_core.errors import GLMImageError
from glm_image.nodes.host.encode import encode_references
from helpers import same, stages

PROMPT = "a door with 'PULL' on it"
SIZE = (64, 96)


@pytest.fixture(scope="module")
def run(nodes):
    return stages(nodes, "small", PROMPT, SIZE)


def sample_tokens(nodes, run):
    sampling = (96, 64, 7, 0.9, 0.75, 0, 1)
    return nodes["GLMImageSampleTokens"].execute(run.ar, PROMPT, *sampling).result[0].tokens


def encode_tokens(nodes, run):
    image = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    return nodes["GLMImageEncodeTokens"].execute(run.ar, image, 96, 64).result[0].tokens


def glyph_encode(nodes, run):
    return nodes["GLMImageGlyphEncode"].execute(run.clip, PROMPT).result[0][0][0]


def decode(nodes, run):
    inputs = (run.positive, run.negative, run.empty, 7, 2, 1.5, 1.0)
    return nodes["GLMImageDecode"].execute(run.model, *inputs).result[0]["samples"]


def reference_cache(nodes, run):
    image = torch.rand(1, 512, 512, 3, generator=torch.Generator().manual_seed(0))
    references, _ = encode_references(run.ar, run.vae, image, None, False)
    cache = nodes["GLMImageReferenceCache"].execute(run.model, references, "cpu", "model")
    return next(cache.result[0].reader.cache.parameters())


STAGES = {
    "The AR model": (sample_tokens, lambda run: run.ar.patcher.model.lm_head),
    "The AR model's vision tower": (
        encode_tokens,
        lambda run: next(m for m in run.ar.vision.patcher.model.modules() if not [*m.children()]),
    ),
    "The glyph encoder": (glyph_encode, lambda run: run.clip.cond_stage_model.transformer.shared),
    "The decoder": (decode, lambda run: run.model.model.diffusion_model.proj_out),
    "The reference cache": (
        reference_cache,
        lambda run: run.model.model.diffusion_model.transformer_blocks[1].ff,
    ),
}


class Full:
    """A layer that finds its device full, after it has taken something of it."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.handle = layer.register_forward_pre_hook(self._raise)

    @staticmethod
    def _raise(*_) -> None:
        taken = torch.ones(2**22)
        raise comfy.model_management.OOM_EXCEPTION(f"no room beside {taken.nbytes} bytes")

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_) -> None:
        self.handle.remove()


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_says_so_and_works_again(nodes, run, stage) -> None:
    work, layer = STAGES[stage]
    expected = work(nodes, run)
    with Full(layer(run)), pytest.raises(GLMImageError) as said:
        work(nodes, run)
    sentence = str(said.value)
    assert sentence.startswith(f"{stage} ran out of memory on cpu: it needs ")
    assert "GiB were free; use " in sentence
    assert comfy.model_management.current_loaded_models == []
    assert same(work(nodes, run), expected)


def test_ten_failures_leave_no_memory_behind(nodes, run) -> None:
    work, layer = STAGES["The decoder"]

    def fail() -> None:
        with Full(layer(run)), pytest.raises(GLMImageError):
            work(nodes, run)

    def tensors() -> int:
        gc.collect()
        return sum(torch.is_tensor(thing) for thing in gc.get_objects())

    fail()
    before, peak = tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10):
        fail()
    assert tensors() <= before
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 5 * 2**14  # kB: less than five of the ten 16 MB tensors that the failures took


def test_other_errors_pass_as_they_are(nodes, run, monkeypatch) -> None:
    layer = STAGES["The AR model"][1](run)

    def broken(*_) -> None:
        raise RuntimeError("a driver's complaint")

    handle = layer.register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="a driver's complaint"):
            sample_tokens(nodes, run)
    finally:
        handle.remove()
