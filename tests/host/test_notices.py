"""What the decoder does not do for other nodes is said once a run, in the log and on the node."""

import logging

import node_helpers
import pytest
import torch
from comfy.controlnet import ControlBase
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from glm_image.glm_core.errors import GLMImageError
from glm_image.nodes.host import notices
from helpers import same, stages

import nodes as host

SIZE = (64, 96)


@pytest.fixture(scope="module")
def run(nodes):
    return stages(nodes, "small", "the word 'ONE'", SIZE)


def decode(nodes, run, *, model=None, positive=None, negative=None, cfg=1.5):
    out = nodes["GLMImageDecode"].execute(
        model or run.model,
        positive or run.positive,
        negative or run.negative,
        run.empty,
        7,
        2,
        cfg,
        1.0,
    )
    return out.result[0]["samples"]


@pytest.fixture
def said(caplog):
    """The warnings of the pack since the last call."""

    def read() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.name == notices.log.name]
        caplog.clear()
        return found

    with caplog.at_level(logging.WARNING, logger=notices.log.name):
        yield read


def test_a_usual_run_says_nothing(nodes, run, said) -> None:
    area = node_helpers.conditioning_set_values(
        run.positive, {"area": (4, 8, 4, 4), "strength": 1.0, "start_percent": 0.0}
    )
    decode(nodes, run)
    decode(nodes, run, positive=area)
    model = run.model.clone()
    model.set_model_patch(lambda args: args, "double_block")
    model.set_model_patch_replace(
        lambda args, extra: extra["original_block"](args), "dit", "double_block", 1
    )
    decode(nodes, run, model=model)
    assert said() == []


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("reference_latents", [torch.zeros(1, 16, 8, 12)], "GLM-Image Encode Reference"),
        ("clip_vision_output", object(), "GLM-Image Encode Reference"),
        ("unclip_conditioning", [{"strength": 1.0}], "GLM-Image Encode Reference"),
        ("concat_latent_image", torch.zeros(1, 16, 8, 12), "Set Latent Noise Mask"),
        ("guidance", 3.5, "set cfg"),
        ("nag_scale", 5.0, "changes nothing"),
    ],
)
def test_conditioning_that_is_not_read_is_said_once_a_run(
    nodes, run, said, key, value, advice
) -> None:
    plain = decode(nodes, run)
    positive = node_helpers.conditioning_set_values(run.positive, {key: value})
    for _ in range(2):
        assert same(decode(nodes, run, positive=positive), plain)
        (sentence,) = said()
        assert f"does not read '{key}' of the positive conditioning" in sentence
        assert advice in sentence
        assert sentence.endswith(".")


def test_a_run_without_steps_does_not_repeat_what_the_last_one_said(nodes, run) -> None:
    positive = node_helpers.conditioning_set_values(run.positive, {"guidance": 3.5})
    execute = nodes["GLMImageDecode"].execute
    said = execute(run.model, positive, run.negative, run.empty, 7, 2, 1.0, 1.0)
    assert "does not read 'guidance'" in str(said.ui)
    unchanged = execute(run.model, run.positive, run.negative, run.empty, 7, 2, 1.0, 0.0)
    assert torch.equal(unchanged.result[0]["samples"], run.empty["samples"])
    assert "guidance" not in str(unchanged.ui)


def patched(node: type, model, *arguments):
    """The MODEL that a core node makes; hosts moved these nodes from one API to another."""
    run = node.execute if hasattr(node, "execute") else getattr(node(), node.FUNCTION)
    out = run(model, *arguments)
    return getattr(out, "result", out)[0]


@pytest.mark.parametrize(
    ("node", "arguments", "names"),
    [
        (FreeU_V2, (1.3, 1.4, 0.9, 0.2), ["output_block_patch"]),
        (HyperTile, (256, 2, 0, False), ["attn1_patch", "attn1_output_patch"]),
        (TomePatchModel, (0.3,), ["attn1_patch", "attn1_output_patch"]),
        (
            PatchModelAddDownscale,
            (3, 2.0, 0.0, 0.35, True, "bicubic", "bicubic"),
            ["input_block_patch_after_skip", "output_block_patch"],
        ),
        (PerturbedAttentionGuidance, (3.0,), ["attn1"]),
    ],
)
def test_patches_for_u_nets_are_said_once_a_run(nodes, run, said, node, arguments, names) -> None:
    model = patched(node, run.model, *arguments)
    for _ in range(2):
        decode(nodes, run, model=model)
        sentences = said()
        assert len(sentences) == len(names)
        for name, sentence in zip(names, sentences, strict=True):
            assert f"no place for the model patch '{name}'" in sentence


def test_self_attention_guidance_is_refused(nodes) -> None:
    large = stages(nodes, "small", "no text", (192, 192), steps=1)
    model = patched(SelfAttentionGuidance, large.model, 0.5, 2.0)
    with pytest.raises(GLMImageError, match=r"Self-Attention Guidance .* remove that node\. \["):
        decode(nodes, large, model=model)


def test_a_controlnet_is_refused_before_it_runs(nodes, run) -> None:
    positive = node_helpers.conditioning_set_values(run.positive, {"control": ControlBase()})
    with pytest.raises(GLMImageError, match=r"^GLM-Image's decoder takes no ControlNet; remove"):
        decode(nodes, run, positive=positive)


def test_a_negative_with_tokens_is_said_where_guidance_is_on(nodes, run, said) -> None:
    decode(nodes, run, negative=run.positive)
    (sentence,) = said()
    assert sentence.startswith("The negative conditioning has semantic tokens, so guidance")
    decode(nodes, run, negative=run.positive, cfg=1.0)
    decode(nodes, run, negative=host.ConditioningZeroOut().zero_out(run.positive)[0])
    assert said() == []
