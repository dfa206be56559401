"""Image to image through the nodes' own code: parity, exactness, per-sample sets, refusals."""

import gc
import re
import weakref
from dataclasses import replace

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from glm_image.glm_core.data.references import References
from glm_image.glm_core.errors import GLMImageError
from glm_image.nodes.host import decoder as decoder_module
from glm_image.nodes.host import reference_cache
from glm_image.nodes.host.cache_patcher import make_cache_patcher
from helpers import relative_error, same, sampled, stages
from reference import SHAPES
from torch import Tensor

PROMPT = "make it say 'SHUT'"
SIZE = (64, 96)


@pytest.fixture(scope="module")
def run(nodes):
    return stages(nodes, "small", PROMPT, SIZE)


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    """Two pictures of different aspect, in sizes that neither implementation changes."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand(1, height // 32, width // 32, 3, generator=generator)
        .repeat_interleave(32, 1)
        .repeat_interleave(32, 2)
        for height, width in ((512, 512), (512, 640))
    ]


def encode(run, images: list[Tensor], per_sample: bool = False) -> References:
    from glm_image.nodes.host.encode import encode_references

    chain = None
    for image in images:
        chain, _ = encode_references(run.ar, run.vae, image, chain, per_sample)
    return chain


def decode(nodes, run, cache, *, model=None, steps=2, cfg=1.5, seed=7, tokens=None, index=-1):
    positive, negative, empty = (
        nodes["GLMImageApplyTokens"]
        .execute(run.positive, tokens or run.tokens, index, None, cache)
        .result
    )
    out = nodes["GLMImageDecode"].execute(
        model or run.model, positive, negative, empty, seed, steps, cfg, 1.0
    )
    return out.result[0]["samples"]


def cached(nodes, run, references, store="auto", precision="model", model=None):
    make = nodes["GLMImageReferenceCache"].execute
    return make(model or run.model, references, store, precision).result[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2])
def test_latents_equal_the_reference(nodes, pipelines, images, shape: str, count: int) -> None:
    run = stages(nodes, shape, PROMPT, SIZE, steps=1)
    references = encode(run, images[:count])
    cache = cached(nodes, run, references)
    ours = run.model.model.process_latent_in(decode(nodes, run, cache, steps=3))

    pipeline = pipelines[shape]
    pipeline.set_progress_bar_config(disable=True)
    (chain,) = references.sets
    upsampled = [image.tokens.repeat_interleave(2, 0).repeat_interleave(2, 1) for image in chain]
    expected = pipeline(
        prompt=PROMPT,
        image=[(image[0].numpy()) for image in images[:count]],
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=3,
        guidance_scale=1.5,
        prior_token_ids=run.decoder_ids,
        prior_token_image_ids=[torch.cat([tokens.flatten() for tokens in upsampled]).long()],
        source_image_grid_thw=[torch.tensor([[1, *tokens.shape] for tokens in upsampled])],
        latents=run.noise,
        output_type="latent",
    ).images
    assert relative_error(ours, expected) < 1e-4


def test_a_step_needs_room_for_the_references_too(nodes, run, images, monkeypatch) -> None:
    """The out-of-memory sentence has the same bytes."""
    cache = cached(nodes, run, encode(run, images))
    network, explained = run.model.model, []
    original = decoder_module.explain_out_of_memory

    def explain_out_of_memory(stage, needs, *rest, **how):
        explained.append(needs)
        return original(stage, needs, *rest, **how)

    monkeypatch.setattr(decoder_module, "explain_out_of_memory", explain_out_of_memory)
    decode(nodes, run, cache, steps=1)
    shape = list(run.latent["samples"].shape)
    tokens = sum(image.shape[1] * image.shape[2] // 16**2 for image in images)
    need = network.memory_required(shape, {"references": [(1, tokens)]})
    assert explained == [{run.model.load_device: need}]
    assert need > network.memory_required(shape)


def test_references_change_the_picture_and_the_unconditional_pass_does_not_see_them(
    nodes, run, images
) -> None:
    cache = cached(nodes, run, encode(run, images[:1]))
    assert relative_error(decode(nodes, run, cache), decode(nodes, run, None)) > 1e-3
    # With guidance g, out = u + g (c - u): u follows from two guidances and must not move.
    unconditional = [
        2 * decode(nodes, run, c, steps=1, cfg=1.0) - decode(nodes, run, c, steps=1, cfg=2.0)
        for c in (cache, None)
    ]
    assert relative_error(*unconditional) < 1e-4


def test_streamed_from_host_memory_is_the_same(nodes, run, images) -> None:
    references = encode(run, images)
    resident = cached(nodes, run, references, "gpu")
    streamed = cached(nodes, run, references, "cpu")
    assert not resident.reader.streamed
    assert streamed.reader.streamed
    assert same(decode(nodes, run, resident), decode(nodes, run, streamed))


def test_fp8_is_close_and_half_as_large(nodes, run, images) -> None:
    references = encode(run, images)
    full, half = (cached(nodes, run, references, "auto", p) for p in ("model", "fp8"))
    error = relative_error(decode(nodes, run, half, steps=4), decode(nodes, run, full, steps=4))
    assert 0 < error < 2e-2
    sizes = [cache.reader.cache.nbytes for cache in (half, full)]
    assert sizes[0] < 0.27 * sizes[1]  # the test's full precision is float32


def test_the_cache_serves_every_prompt_and_seed_without_another_pass(nodes, run, images) -> None:
    cache = cached(nodes, run, encode(run, images[:1]))
    before = [p.clone() for p in cache.reader.cache.parameters()]
    first = decode(nodes, run, cache, seed=1)
    second = decode(nodes, run, cache, seed=2)
    assert relative_error(first, second) > 1e-2
    assert all(map(same, before, cache.reader.cache.parameters()))


def test_each_sample_has_its_own_references(nodes, images) -> None:
    run = stages(nodes, "small", PROMPT, SIZE, batch=2, steps=1)
    batch = torch.cat([images[0], images[0].flip(1)])
    cache = cached(nodes, run, encode(run, [batch], per_sample=True))
    together = decode(nodes, run, cache)
    for i in range(2):
        alone = cached(nodes, run, encode(run, [batch[i : i + 1]]))
        assert relative_error(decode(nodes, run, alone, index=i)[0], together[i]) < 1e-4
        assert relative_error(decode(nodes, run, cache, index=i)[0], together[i]) < 1e-4
        other = cached(nodes, run, encode(run, [batch[1 - i : 2 - i]]))
        assert relative_error(decode(nodes, run, other, index=i)[0], together[i]) > 1e-3


def test_shared_references_come_before_each_samples_own(run, images) -> None:
    shared = encode(run, images[1:])
    from glm_image.nodes.host.encode import encode_references

    batch = torch.cat([images[0], images[0].flip(1)])
    chain, _ = encode_references(run.ar, run.vae, batch, shared, True)
    assert [len(images) for images in chain.sets] == [2, 2]
    assert chain.sets[0][0] is chain.sets[1][0] is shared.sets[0][0]
    assert not same(chain.sets[0][1].tokens, chain.sets[1][1].tokens)


def test_a_cache_of_other_loras_is_refused(nodes, run, images) -> None:
    layer = "transformer_blocks.0.ff.net.2"
    rows, columns = run.model.model.diffusion_model.get_submodule(layer).weight.shape
    lora = {
        f"diffusion_model.{layer}.lora_A.weight": torch.randn(2, columns),
        f"diffusion_model.{layer}.lora_B.weight": torch.randn(rows, 2),
    }
    adapted, _ = comfy.sd.load_lora_for_models(run.model, None, lora, 1.0, 0.0)
    references = encode(run, images[:1])
    plain, own = cached(nodes, run, references), cached(nodes, run, references, model=adapted)
    with pytest.raises(GLMImageError, match="another decoder or with other LoRAs"):
        decode(nodes, run, plain, model=adapted)
    assert decode(nodes, run, own, model=adapted).isfinite().all()
    decode(nodes, run, plain)  # and the next prompt works


def test_a_cache_of_other_injections_is_refused(nodes, run, images) -> None:
    """Current hosts inject LoRAs that bypass the weights."""
    injected = run.model.clone()
    nothing = comfy.model_patcher.PatcherInjection(lambda _: None, lambda _: None)
    injected.set_injections("bypass", [nothing])
    references = encode(run, images[:1])
    plain, own = (cached(nodes, run, references, model=model) for model in (run.model, injected))
    for cache, model in ((plain, injected), (own, run.model)):
        with pytest.raises(GLMImageError, match="another decoder or with other LoRAs"):
            decode(nodes, run, cache, model=model)
    assert same(decode(nodes, run, own, model=injected.clone()), decode(nodes, run, plain))


def test_the_cache_is_loaded_by_comfyui_and_counted(nodes, run, images) -> None:
    cache = cached(nodes, run, encode(run, images[:1]))
    comfy.model_management.unload_all_models()
    decode(nodes, run, cache)
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert any(model.is_clone(cache.patchers[0]) for model in loaded)
    assert cache.patchers[0].model_size() == cache.reader.cache.nbytes


def test_a_reader_is_made_once_for_each_device(nodes, run, images) -> None:
    cache = cached(nodes, run, encode(run, images[:1]), "gpu")
    meta = torch.device("meta")
    assert not hasattr(cache.reader, "dtype")
    assert cache.reader.to(torch.device("cpu")) is cache.reader
    assert cache.reader.to(meta) is cache.reader.to(meta)
    assert cache.reader.to(meta)[0][0][0].device == meta


def test_more_than_memory_holds_is_refused_with_what_helps(nodes, run, images, monkeypatch) -> None:
    references = encode(run, images[:1])
    free = comfy.model_management.get_free_memory
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *a, **k: 1000)
    with pytest.raises(GLMImageError, match=r"need .* GiB and 0.0 GiB .* fewer or smaller"):
        cached(nodes, run, references)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", free)


def test_auto_asks_the_patcher_what_is_free(nodes, run, images, monkeypatch) -> None:
    """Current hosts' patchers count weights that they can evict; `get_free_memory` does not."""
    references, patcher = encode(run, images[:1]), type(run.model)
    for free, streamed in ((0, True), (10**15, False)):
        monkeypatch.setattr(patcher, "get_free_memory", lambda *_, f=free: f, raising=False)
        assert cached(nodes, run, references).reader.streamed == streamed


class Driver:
    """CUDA's registry of pinned memory, as torch shows it: address -> bytes."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.pinned[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0


@pytest.fixture
def driver(monkeypatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    return driver


def on_an_accelerator(nodes, run, images):
    cache = cached(nodes, run, encode(run, images[:1]), "cpu").reader.cache
    return cache, make_cache_patcher(cache, torch.device("meta"), streamed=True)


def test_a_streamed_cache_is_pinned_by_the_host_until_it_is_freed(
    nodes, run, images, monkeypatch, driver
) -> None:
    management = comfy.model_management
    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", 10**9)
    cache, patcher = on_an_accelerator(nodes, run, images)
    assert driver.pinned == {p.data_ptr(): p.nbytes for p in cache.parameters()}
    assert cache.nbytes == management.TOTAL_PINNED_MEMORY
    del cache, patcher
    gc.collect()
    assert not driver.pinned
    assert management.TOTAL_PINNED_MEMORY == 0


def test_nothing_is_pinned_if_the_host_pins_nothing(
    nodes, run, images, monkeypatch, driver
) -> None:
    """As with --disable-pinned-memory."""
    monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", -1)
    cache, _ = on_an_accelerator(nodes, run, images)
    assert not driver.pinned
    assert not any(p.is_pinned() for p in cache.parameters())


def test_pinning_that_runs_out_of_memory_is_told_as_such(nodes, run, images, monkeypatch) -> None:
    def full(*_) -> None:
        raise torch.OutOfMemoryError

    references = encode(run, images[:1])
    monkeypatch.setattr(reference_cache, "make_cache_patcher", full)
    with pytest.raises(GLMImageError, match="The reference cache ran out of memory"):
        cached(nodes, run, references, "cpu")


def test_hosts_that_free_memory_see_models_and_caches(nodes, run, images) -> None:
    """0.3.75 asks for `get_ram_usage`, current hosts look for a patcher."""
    cache = cached(nodes, run, encode(run, images[:1]))
    assert cache.get_ram_usage() == cache.reader.cache.nbytes
    weights = [run.ar.patcher, run.ar.vision.patcher]
    assert run.ar.get_ram_usage() == sum(part.model_size() for part in weights) > 0
    for output in (cache, run.ar):
        assert isinstance(output.patcher, comfy.model_patcher.ModelPatcher)


def test_references_of_another_codebook_are_refused(nodes, run, images) -> None:
    references = References(encode(run, images[:1]).sets, codebook=99)
    with pytest.raises(GLMImageError, match="codebook of 99"):
        cached(nodes, run, references)


def test_tokens_of_a_drawing_fit_the_asked_size(nodes, run, images) -> None:
    tokens, layout, *size = nodes["GLMImageEncodeTokens"].execute(run.ar, images[1], 160, 96).result
    assert size == [160, 96]
    assert tuple(tokens.tokens.shape) == (1, 3, 5)
    assert tuple(layout.preview.shape[1:]) == (12, 20)
    assert not layout.locked.any()
    assert len(tokens.tokens.unique()) > 1


def sample(nodes, run, references, *, seed=7, batch=1, **more):
    height, width = SIZE
    values = run.ar, PROMPT, width, height, seed, 0.9, 0.75, 0, batch
    return sampled(nodes["GLMImageSampleTokens"], *values, references=references, **more)


def test_tokens_are_written_from_the_references(nodes, run, images) -> None:
    references = encode(run, images[:1])
    tokens, layout = sample(nodes, run, references)
    assert tuple(tokens.tokens.shape) == (1, 2, 3)
    assert "no preview stage" in layout.message
    other = encode(run, images[1:])
    several = sample(nodes, run, references, batch=8)[0].tokens
    assert same(several[:1], tokens.tokens)
    assert not same(several, sample(nodes, run, other, batch=8)[0].tokens)


def test_sample_i_is_shown_set_i_and_drawn_with_seed_plus_i(nodes, run, images) -> None:
    batch = torch.cat([images[0], images[0].flip(1)])
    together = sample(nodes, run, encode(run, [batch], per_sample=True), batch=2)[0].tokens
    assert len(together) == 4
    for i in range(4):
        alone = encode(run, [batch[i % 2 : i % 2 + 1]])
        assert same(together[i : i + 1], sample(nodes, run, alone, seed=7 + i)[0].tokens)


def test_a_region_is_drawn_anew_with_references(nodes, run, images) -> None:
    mask = torch.zeros(1, *SIZE)
    mask[..., 64:] = 1
    tokens, _ = sample(nodes, run, encode(run, images[:1]), batch=8, tokens=run.tokens, mask=mask)
    assert (tokens.tokens[..., :2] == run.tokens.tokens[..., :2]).all()
    assert not (tokens.tokens[..., 2:] == run.tokens.tokens[..., 2:]).all()


def test_references_and_a_layout_are_refused(nodes, run, images) -> None:
    with pytest.raises(GLMImageError, match="cannot be used together"):
        sample(nodes, run, encode(run, images[:1]), layout=run.layout)


def test_a_lora_loaded_again_is_the_same_lora(nodes, run, images) -> None:
    layer = "transformer_blocks.0.ff.net.2"
    rows, columns = run.model.model.diffusion_model.get_submodule(layer).weight.shape
    lora = {
        f"diffusion_model.{layer}.lora_A.weight": torch.randn(2, columns),
        f"diffusion_model.{layer}.lora_B.weight": torch.randn(rows, 2),
    }

    def load(strength: float):
        copy = {key: value.clone() for key, value in lora.items()}
        return comfy.sd.load_lora_for_models(run.model, None, copy, strength, 0.0)[0]

    cache = cached(nodes, run, encode(run, images[:1]), model=load(1.0))
    assert decode(nodes, run, cache, model=load(1.0)).isfinite().all()
    with pytest.raises(GLMImageError, match="with other LoRAs"):
        decode(nodes, run, cache, model=load(0.5))


def test_an_empty_chain_and_latents_of_another_vae_are_refused(nodes, run, images) -> None:
    with pytest.raises(GLMImageError, match="chain of references is empty"):
        cached(nodes, run, References(((),), run.ar.config.codebook))
    with pytest.raises(GLMImageError, match="no image in the batch"):
        encode(run, [images[0][:0]])
    with pytest.raises(GLMImageError, match="no image in the batch"):
        nodes["GLMImageEncodeTokens"].execute(run.ar, images[0][:0], 64, 64)
    references = encode(run, images[:1])
    narrow = replace(references.sets[0][0], latent=references.sets[0][0].latent[:, :4])
    with pytest.raises(GLMImageError, match="4 channels and the decoder takes 16"):
        cached(nodes, run, replace(references, sets=((narrow,),)))


def test_a_chain_of_two_models_is_refused(nodes, run, images) -> None:
    """Their codes differ, and the larger codebook's ids are beyond the smaller one's table."""
    chain = encode(run, images[:1])
    wide = nodes["GLMImageLoadAR"].execute("wide", "default").result[0]
    add = nodes["GLMImageEncodeReference"].execute
    said = "codebook of the references before these is 64 and the AR model's 96"
    with pytest.raises(GLMImageError, match=said):
        add(wide, run.vae, images[1], "references", chain)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        (lambda latents: latents[:, :, None], [1, 16, 1, 64, 64]),
        (lambda latents: latents[..., ::2, ::2], [1, 16, 32, 32]),
    ],
)
def test_a_vae_whose_latents_have_another_shape_is_refused(
    nodes, run, images, shape, found
) -> None:
    """Such as a video VAE's, which have frames."""

    class OtherVAE:
        decode = None

        def encode(self, pixels: Tensor) -> Tensor:
            return shape(run.vae.encode(pixels))

    said = rf"shape {re.escape(str(found))} of 512x512 pixels.* \[1, channels, 64, 64\]; connect"
    with pytest.raises(GLMImageError, match=said):
        nodes["GLMImageEncodeReference"].execute(run.ar, OtherVAE(), images[0], "references")


def test_a_resident_cache_that_the_host_moved_away_is_fetched(nodes, run, images) -> None:
    reader = cached(nodes, run, encode(run, images[:1]), "gpu").reader
    elsewhere = type(reader)(reader.cache, torch.device("meta"), streamed=False)
    assert all(part.device.type == "meta" for pair in elsewhere[1] for part in pair)


def test_the_cache_dies_with_its_last_holder(nodes, run, images) -> None:
    handle = cached(nodes, run, encode(run, images[:1]))
    cache = weakref.ref(handle.reader.cache)
    gc.disable()
    try:
        del handle
        assert cache() is None
    finally:
        gc.enable()


def test_apply_tokens_takes_the_output_of_an_earlier_one(nodes, run) -> None:
    again = nodes["GLMImageApplyTokens"].execute(run.positive, run.tokens, -1, run.negative).result
    for ours, expected in zip(again[:2], (run.positive, run.negative), strict=True):
        assert same(ours[0][0], expected[0][0])


def test_the_negative_of_an_earlier_apply_tokens_has_no_references(nodes, run, images) -> None:
    cache = cached(nodes, run, encode(run, images[:1]))
    apply = nodes["GLMImageApplyTokens"].execute
    positive, _, _ = apply(run.positive, run.tokens, -1, None, cache).result
    _, negative, _ = apply(run.positive, run.tokens, -1, positive).result
    assert not {"glm_references", "additional_models"} & negative[0][1].keys()
