"""The host's out-of-memory error in each stage: one sentence, then the stage works again."""

import gc
import resource
from dataclasses import replace

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.placement import memory
from glm_image.glm_core.placement.plan import GIB
from glm_image.nodes.host import devices
from glm_image.nodes.host.ar import load_ar
from glm_image.nodes.host.decoder import load_decoder
from glm_image.nodes.host.devices import Placement
from glm_image.nodes.host.encode import encode_references
from glm_image.nodes.host.out_of_memory import explain_out_of_memory
from glm_image.nodes.host.patchers import with_segments
from helpers import same, sampled, stages

PROMPT = "a door with 'PULL' on it"
SIZE = (64, 96)


@pytest.fixture(scope="module")
def run(nodes):
    return stages(nodes, "small", PROMPT, SIZE)


def sample_tokens(nodes, run):
    sampling = (96, 64, 7, 0.9, 0.75, 0, 1)
    return sampled(nodes["GLMImageSampleTokens"], run.ar, PROMPT, *sampling)[0].tokens


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
    parts = [p for patcher in cache.result[0].patchers for p in patcher.model.parameters()]
    return torch.cat([part.flatten() for part in parts])


def vae_decode(nodes, run):
    return run.vae.decode(run.latent["samples"])


STAGES = {
    "The VAE": (vae_decode, lambda run: run.vae.first_stage_model.decoder.conv_out),
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
    """Makes a layer run out of memory after it has allocated some."""

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
    sentence = said.value.sentence
    assert sentence.startswith(f"{stage} ran out of memory on cpu, where it needs ")
    assert "GiB were free; use " in sentence
    assert "fewer layers" not in sentence
    assert comfy.model_management.current_loaded_models == []
    assert same(work(nodes, run), expected)


def test_no_room_for_the_decoders_weights_is_a_sentence_too(nodes, run, monkeypatch) -> None:
    """The host loads them before the first step, in the node that samples."""
    expected = decode(nodes, run)
    comfy.model_management.unload_all_models()

    def full(*_, **__) -> None:
        raise comfy.model_management.OOM_EXCEPTION("no room")

    sentence = "^The decoder ran out of memory on cpu, where it needs "
    with monkeypatch.context() as patched:
        patched.setattr(ModelPatcher, "partially_load", full)
        with pytest.raises(GLMImageError, match=sentence):
            decode(nodes, run)
    assert same(decode(nodes, run), expected)


# ---- split models --------------------------------------------------------------------------------

CPU, OTHER = torch.device("cpu"), torch.device("cpu", 0)
"""One device to torch; two, if compared."""
PLENTY = 64 * GIB


@pytest.fixture
def room(monkeypatch) -> dict[torch.device, int]:
    """The free bytes that the host reports, by device, of a machine with two."""
    free = {CPU: PLENTY, OTHER: PLENTY}

    def get_free_memory(device=CPU, torch_free_too: bool = False):
        return (free[device], free[device]) if torch_free_too else free[device]

    monkeypatch.setattr(comfy.model_management, "get_free_memory", get_free_memory)
    monkeypatch.setattr(devices, "machine", lambda: {"gpu:0": CPU, "gpu:1": OTHER})
    return free


@pytest.fixture(scope="module")
def split_run(run):
    """The same run with AR model and decoder split over two devices, one block on each."""
    placement = Placement(CPU, CPU, segments=((range(1, 2), Placement(OTHER, CPU)),))
    ar, model = load_ar("small", placement=placement), load_decoder("small", placement=placement)
    return replace(run, ar=ar, model=model)


def last_layer(stage: str, run) -> torch.nn.Module:
    patcher = run.ar.patcher if stage == "The AR model" else run.model
    return with_segments(patcher)[1].model.layers[0]


SPLIT = {"The AR model": "ar", "The decoder": "decoder", "The reference cache": "decoder"}


@pytest.mark.parametrize("stage", SPLIT)
@pytest.mark.parametrize(
    ("full", "named"), [((CPU,), ["gpu:0"]), ((OTHER,), ["gpu:1"]), ((), ["gpu:0", "gpu:1"])]
)
def test_of_a_split_model_the_full_device_is_named(
    nodes, run, split_run, room, stage, full, named
) -> None:
    """The full device, wherever the error arises; both if neither has less free than is needed."""
    work, _ = STAGES[stage]
    expected = work(nodes, run)

    def run_out(*_) -> None:
        room.update(dict.fromkeys(full, 0))
        raise comfy.model_management.OOM_EXCEPTION("no room")

    handle = last_layer(stage, split_run).register_forward_pre_hook(run_out)
    with pytest.raises(GLMImageError) as said:
        work(nodes, split_run)
    handle.remove()
    sentence = said.value.sentence
    assert [
        name for name in ("gpu:0", "gpu:1") if f"on {name}, where it needs" in sentence
    ] == named
    assert sentence.startswith(f"{stage} ran out of memory on gpu:")
    assert sentence.endswith(
        f", or give {' or '.join(named)} fewer layers in {SPLIT[stage]}_split."
    )
    assert comfy.model_management.current_loaded_models == []
    room.update(dict.fromkeys(full, PLENTY))
    assert same(work(nodes, split_run), expected)


def test_the_sentence_has_the_bytes_of_the_full_device(room) -> None:
    needs = {CPU: 2 * GIB, OTHER: 5 * GIB}
    sentences = []
    for free in (4 * GIB, 6 * GIB):
        room.update({CPU: 3 * GIB, OTHER: free})
        with (
            pytest.raises(GLMImageError) as said,
            explain_out_of_memory(
                "The decoder", needs, "use a smaller size", split="decoder_split"
            ),
        ):
            raise comfy.model_management.OOM_EXCEPTION
        sentences.append(said.value.sentence)
    assert sentences == [
        "The decoder ran out of memory on gpu:1, where it needs 5.0 GiB beside its weights and "
        "4.0 GiB were free; use a smaller size, or give gpu:1 fewer layers in decoder_split.",
        "The decoder ran out of memory on gpu:0, where it needs 2.0 GiB beside its weights and "
        "3.0 GiB were free, or on gpu:1, where it needs 5.0 GiB beside its weights and 6.0 GiB "
        "were free; use a smaller size, or give gpu:0 or gpu:1 fewer layers in decoder_split.",
    ]


def test_each_device_needs_the_kv_cache_of_its_own_layers(run) -> None:
    ar = load_ar(
        "deep", placement=Placement(CPU, CPU, segments=((range(1, 4), Placement(OTHER, CPU)),))
    )
    layer = memory.kv_cache(ar.config, 2, 100, ar.dtype)
    work = memory.ar(ar.config, 50, ar.dtype)
    assert ar.config.layers == 4
    assert ar.memory_required(2, 100, 50) == {CPU: work + layer, OTHER: work + 3 * layer}
    whole = load_ar("deep").memory_required(2, 100, 50)
    assert whole == {CPU: work + 4 * layer}


# ---- leaks, and other errors ---------------------------------------------------------------------


@pytest.mark.parametrize("which", ["run", "split_run"])
def test_ten_failures_leave_no_memory_behind(nodes, request, which) -> None:
    run = request.getfixturevalue(which)
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
