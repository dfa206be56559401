"""The decoder as a native MODEL: what other nodes do to one works on ours, and means the same."""

from collections import Counter

import comfy.hooks
import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import (
    CFGGuider,
    KSamplerSelect,
    RandomNoise,
    SamplerCustomAdvanced,
)
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_model_advanced import ModelSamplingFlux, ModelSamplingSD3
from glm_image.glm_core.decoder import model as decoder
from glm_image.glm_core.decoder.model import DROPPED, rotary
from glm_image.glm_core.errors import GLMImageError
from helpers import planned, relative_error, same, stages
from torch import Tensor

PROMPT = "a poster with the words 'ONE' and 'TWO'"
SIZE = (64, 96)


@pytest.fixture(scope="module")
def run(nodes):
    return stages(nodes, "small", PROMPT, SIZE)


def decode(
    nodes, run, *, model=None, positive=None, negative=None, latent=None, **kwargs
) -> Tensor:
    options = {"seed": 7, "steps": 3, "cfg": 1.5, "denoise": 1.0, **kwargs}
    (out,) = (
        nodes["GLMImageDecode"]
        .execute(
            model or run.model,
            positive or run.positive,
            negative or run.negative,
            latent or run.empty,
            **options,
        )
        .result
    )
    return out["samples"]


def test_decode_equals_sampler_custom_advanced(nodes, run) -> None:
    (sigmas,) = nodes["GLMImageScheduler"].execute(run.model, run.empty, 3, 1.0).result
    guider = CFGGuider.execute(run.model, run.positive, run.negative, 1.5).result[0]
    noise = RandomNoise.execute(7).result[0]
    sampler = KSamplerSelect.execute("euler").result[0]
    latent = SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, run.empty).result[0]
    assert same(latent["samples"], decode(nodes, run))


@pytest.mark.parametrize(
    "patch",
    [
        lambda model: ModelSamplingSD3().patch(model, 5.0)[0],
        lambda model: ModelSamplingFlux().patch(model, 1.15, 0.5, 96, 64)[0],
    ],
    ids=["SD3", "Flux"],
)
def test_model_sampling_patches_do_not_reach_the_timestep(nodes, run, patch) -> None:
    """Their `timestep()` differ by a factor of 1000; for the same sigmas ours must not."""
    (sigmas,) = nodes["GLMImageScheduler"].execute(run.model, run.empty, 3, 1.0).result
    samples = [
        comfy.sample.sample_custom(
            model,
            run.noise,
            1.5,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            run.positive,
            run.negative,
            run.empty["samples"],
            seed=7,
        )
        for model in (run.model, patch(run.model))
    ]
    assert relative_error(samples[1], samples[0]) < 1e-6


def test_numbers_that_other_nodes_read_are_those_of_the_checkpoint(run, pipelines) -> None:
    model, config = run.model.model, pipelines["small"].transformer.config
    network, heads = model.diffusion_model, config.num_attention_heads
    hidden = heads * config.attention_head_dim
    names = ("in_channels", "out_channels", "patch_size", "num_layers", "attention_head_dim")
    numbers = {name: config[name] for name in names}
    assert {name: getattr(network, name) for name in names} == numbers
    assert (network.num_heads, network.num_attention_heads) == (heads, heads)
    assert (network.hidden_size, network.inner_dim) == (hidden, hidden)
    assert network.dtype == model.get_dtype() == torch.float32
    settings = model.model_config.unet_config
    assert {name: settings[name] for name in names} == numbers
    latents = run.model.get_model_object("latent_format")
    assert latents.latent_channels == config.in_channels


def test_model_sampling_node_gives_ksampler_the_sizes_sigmas(nodes, run) -> None:
    (model,) = nodes["GLMImageModelSampling"].execute(run.model, run.empty).result
    shift = run.model.model.shift(SIZE)
    sampling = model.get_model_object("model_sampling")
    s = 0.25
    expected = shift * s / (1 + (shift - 1) * s)
    assert sampling.percent_to_sigma(0.75) == pytest.approx(expected)
    assert shift != pytest.approx(run.model.model.shift((1024, 1024)))
    assert run.model.get_model_object("model_sampling") is not sampling


def test_the_network_is_given_the_unshifted_timestep(nodes, run) -> None:
    seen = spy_on_network(run.model, lambda x, timesteps, *_, **__: timesteps.tolist())
    decode(nodes, run, model=seen.model, cfg=1.0)
    assert seen.calls == [[999.0], [666.0], [333.0]]


def test_texts_of_different_length_are_neither_padded_nor_repeated(nodes, run) -> None:
    seen = spy_on_network(run.model, lambda x, t, context, *_, **__: context.shape)
    decode(nodes, run, model=seen.model, steps=1)
    lengths = {conditioning[0][0].shape[1] for conditioning in (run.positive, run.negative)}
    assert len(lengths) == 2
    assert {shape[1] for shape in seen.calls} == lengths
    assert all(shape[0] == 1 for shape in seen.calls)


def test_texts_of_one_length_share_a_batch_and_change_nothing(nodes) -> None:
    """Without quotes the prompt's text is the empty one: the host joins both passes."""
    run = stages(nodes, "small", "nothing to read", SIZE)
    seen = spy_on_network(run.model, lambda x, *_, tokens, **__: tokens[:, 0, 0, 0].tolist())
    joined = decode(nodes, run, model=seen.model, steps=1)
    assert len(seen.calls) == 1
    assert sorted(seen.calls[0])[0] == DROPPED

    # One step to sigma 0 leaves the guided prediction, which is linear in the two passes.
    conditional = decode(nodes, run, steps=1, cfg=1.0)
    unconditional = decode(nodes, run, positive=run.negative, steps=1, cfg=1.0)
    expected = unconditional + 1.5 * (conditional - unconditional)
    assert relative_error(joined, expected) < 1e-5


def test_tokens_are_cropped_with_the_area(nodes, run) -> None:
    """An area of 32 x 64 pixels, 32 from the left: its tokens are those cells of the grid."""
    states, values = run.positive[0]
    area = [[states, {**values, "area": (4, 8, 4, 4), "strength": 1.0}]]
    seen = spy_on_network(run.model, lambda x, *_, tokens, size, **__: (x.shape, tokens, size))
    decode(nodes, run, model=seen.model, positive=area, steps=1, cfg=1.0)
    ((shape, tokens, size),) = seen.calls
    assert tuple(shape[-2:]) == (4, 8)
    assert size == SIZE
    assert same(tokens[0, 0, ::4, ::4].long(), run.tokens.tokens[0, 1:2, 1:3].long())


def test_a_videos_latent_is_refused(nodes, run) -> None:
    video = {"samples": torch.zeros(1, 16, 1, 8, 12)}
    with pytest.raises(GLMImageError, match=r"^The latent has 5 dimensions, as a video's, and"):
        decode(nodes, run, latent=video)


INVARIANT = (
    "glyph_projector",
    "prior_token_embedding",
    "prior_projector",
    "time_condition_embed.condition_embedder",
)


def test_what_does_not_change_between_steps_is_computed_once_and_then_freed(
    nodes, run, monkeypatch
) -> None:
    network, calls = run.model.model.diffusion_model, []

    def counted(name: str):
        return lambda *_: calls.append(name)

    def counted_rotary(*args):
        calls.append("rotary")
        return rotary(*args)

    monkeypatch.setattr(decoder, "rotary", counted_rotary)
    handles = [network.get_submodule(n).register_forward_hook(counted(n)) for n in INVARIANT]
    handles.append(network.transformer_blocks[0].register_forward_hook(counted("step")))
    try:
        decode(nodes, run, steps=5)
    finally:
        for handle in handles:
            handle.remove()
    passes = 2  # the conditional and the unconditional one
    expected = dict.fromkeys((*INVARIANT, "rotary"), passes) | {"step": 5 * passes}
    assert Counter(calls) == expected
    assert network.step_invariants._entries == []


def test_nothing_is_reused_under_weight_hooks(nodes, run) -> None:
    """A hook may change the weights from step to step."""
    hooks = comfy.hooks.create_hook_lora(hook_patch(run.model), 1.0, 0.0)
    states, values = run.positive[0]
    hooked = [[states, {**values, "hooks": hooks}]]
    plain = decode(nodes, run, steps=2)
    calls = []
    projector = run.model.model.diffusion_model.prior_projector
    handle = projector.register_forward_hook(lambda *_: calls.append(1))
    try:
        changed = decode(nodes, run, positive=hooked, steps=2)
    finally:
        handle.remove()
    assert len(calls) == 3  # positive twice, the hookless negative once
    assert relative_error(changed, plain) > 1e-4


def test_block_replacement_and_attention_override(nodes, run) -> None:
    model = run.model.clone()
    seen = []

    def replace(args: dict, extra: dict) -> dict:
        seen.append(args["transformer_options"]["block_index"])
        return extra["original_block"](args)

    def override(attention, *args, **kwargs):
        seen.append("attention")
        return attention(*args, **kwargs)

    model.set_model_patch_replace(replace, "dit", "double_block", 1)
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    assert same(decode(nodes, run, model=model, steps=1), decode(nodes, run, steps=1))
    blocks = len(run.model.model.diffusion_model.transformer_blocks)
    assert seen.count(1) == 2
    assert seen.count("attention") == 2 * blocks


@pytest.mark.parametrize("split", ["", "cpu=0-0,cpu=1-1"], ids=["whole", "split"])
def test_block_replacement_sees_and_changes_every_argument(nodes, run, split) -> None:
    plan, _ = planned(nodes, decoder_split=split)
    loaded = nodes["GLMImageLoadDecoder"].execute("small", "default", plan).result[0]
    model, seen = loaded.clone(), []

    def replace(args: dict, extra: dict) -> dict:
        options = args["transformer_options"]
        numbers = options["block_index"], options["total_blocks"], options["block_type"]
        seen.append((*numbers, sorted(args)))
        out = extra["original_block"](args)
        return {"img": out["img"].flip(1), "txt": out["txt"]}

    for block in (0, 1):
        model.set_model_patch_replace(replace, "dit", "double_block", block)
    changed = decode(nodes, run, model=model, steps=1, cfg=1.0)
    names = ["img", "pe", "transformer_options", "txt", "vec"]
    assert seen == [(block, 2, "double", names) for block in (0, 1)]
    assert relative_error(changed, decode(nodes, run, steps=1, cfg=1.0)) > 1e-3


@pytest.mark.parametrize("split", ["", "cpu=0-0,cpu=1-1"], ids=["whole", "split"])
def test_patches_after_a_block_see_its_number_and_result(nodes, run, split) -> None:
    plan, _ = planned(nodes, decoder_split=split)
    loaded = nodes["GLMImageLoadDecoder"].execute("small", "default", plan).result[0]
    model, seen = loaded.clone(), []

    def replace(args: dict, extra: dict) -> dict:
        seen.append(extra["original_block"](args))
        return seen[-1]

    def after(args: dict) -> dict:
        out = seen.pop()
        assert args["img"] is out["img"]
        assert args["txt"] is out["txt"]
        seen.append((args["block_index"], sorted(args)))
        return {"img": args["img"].flip(1), "txt": args["txt"]}

    for block in (0, 1):
        model.set_model_patch_replace(replace, "dit", "double_block", block)
    model.set_model_patch(after, "double_block")
    changed = decode(nodes, run, model=model, steps=1, cfg=1.0)
    names = ["block_index", "img", "pe", "transformer_options", "txt", "vec"]
    assert seen == [(block, names) for block in (0, 1)]
    assert relative_error(changed, decode(nodes, run, steps=1, cfg=1.0)) > 1e-3


def test_an_interrupt_ends_a_step_after_the_block_that_runs(nodes, run) -> None:
    """A block takes seconds where weights are streamed, and a step has dozens."""
    model, seen = run.model.clone(), []

    def interrupt(args: dict) -> dict:
        seen.append(args["block_index"])
        comfy.model_management.interrupt_current_processing()
        return args

    model.set_model_patch(interrupt, "double_block")
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        decode(nodes, run, model=model)
    assert seen == [0]
    assert decode(nodes, run).isfinite().all()  # the next run is not interrupted


def test_easycache_runs_and_skips_steps(nodes, run) -> None:
    network = run.model.model.diffusion_model
    (model,) = EasyCacheNode.execute(run.model, 10.0, 0.1, 0.95, False).result
    calls = []
    handle = network.proj_out.register_forward_hook(lambda *_: calls.append(1))
    try:
        decode(nodes, run, model=model, steps=10)
    finally:
        handle.remove()
    assert 0 < len(calls) < 20


def test_image_of_a_batch_keeps_its_noise_and_pixels(nodes) -> None:
    batch = stages(nodes, "small", PROMPT, SIZE, batch=3)
    tokens = batch.tokens
    glyphs = [[states, values] for states, values in batch.positive]
    positive, negative, empty = nodes["GLMImageApplyTokens"].execute(glyphs, tokens, 2).result
    assert empty["batch_index"] == [2]
    alone = decode(nodes, batch, positive=positive, negative=negative, latent=empty, steps=2)
    together = batch.latent["samples"]
    assert relative_error(alone[0], together[2]) < 1e-5
    assert relative_error(together[1], together[2]) > 1e-2


def test_tokens_of_a_batch_are_single_runs_of_seed_plus_i(nodes) -> None:
    batch = stages(nodes, "wide", PROMPT, SIZE, batch=3, seed=41, steps=1)
    single = stages(nodes, "wide", PROMPT, SIZE, seed=43, steps=1)
    assert same(batch.tokens.tokens[2:], single.tokens.tokens)
    assert same(batch.layout.preview[2:], single.layout.preview)


def test_denoise_keeps_part_of_the_image(nodes, run) -> None:
    finished = {**run.empty, "samples": run.latent["samples"]}
    assert same(decode(nodes, run, latent=finished, denoise=0.0), finished["samples"])
    changed = [
        relative_error(decode(nodes, run, latent=finished, denoise=d, seed=99), finished["samples"])
        for d in (0.1, 0.9)
    ]
    assert 0 < changed[0] < changed[1]


def test_noise_mask_keeps_the_rest_of_the_image(nodes, run) -> None:
    mask = torch.zeros(1, 8, 12)
    mask[..., 6:] = 1
    masked = {**run.empty, "samples": run.latent["samples"], "noise_mask": mask}
    samples = decode(nodes, run, latent=masked, seed=99)
    torch.testing.assert_close(samples[..., :6], run.latent["samples"][..., :6])
    assert relative_error(samples[..., 6:], run.latent["samples"][..., 6:]) > 1e-2


def test_memory_estimate_grows_with_tokens_and_batch(run) -> None:
    model = run.model.model
    one = model.memory_required([1, 16, 64, 64])
    assert model.memory_required([2, 16, 64, 64]) == 2 * one
    assert model.memory_required([1, 16, 128, 128]) == 4 * one


class Spy:
    def __init__(self, model, calls: list) -> None:
        self.model = model
        self.calls = calls


def spy_on_network(patcher, what) -> Spy:
    """A clone whose every network call is recorded as what(*args, **kwargs) of it."""
    clone, calls = patcher.clone(), []

    def wrapper(executor, *args, **kwargs):
        calls.append(what(*args, **kwargs))
        return executor(*args, **kwargs)

    clone.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, wrapper)
    return Spy(clone, calls)


def hook_patch(patcher) -> dict[str, Tensor]:
    name = "prior_projector.net.2"
    weight = patcher.model.diffusion_model.get_submodule(name).weight
    generator = torch.Generator().manual_seed(5)
    return {
        f"diffusion_model.{name}.lora_A.weight": torch.randn(
            2, weight.shape[1], generator=generator
        ),
        f"diffusion_model.{name}.lora_B.weight": torch.randn(
            weight.shape[0], 2, generator=generator
        ),
    }
