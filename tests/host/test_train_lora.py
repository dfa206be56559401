"""ComfyUI's Train LoRA node on our MODEL: it learns, and what it learned loads."""

from typing import Any

import comfy.sd
import pytest
import torch
from comfy_extras.nodes_train import TrainLoraNode
from glm_image.glm_core.errors import GLMImageError
from helpers import planned, relative_error, same, stages
from safetensors.torch import save_file
from torch import Tensor

PROMPT = "a card with 'HI' on it"
SIZE = (64, 96)
STEPS = 12


@pytest.fixture(scope="module")
def run(nodes):
    return stages(nodes, "small", PROMPT, SIZE)


def train(model: Any, run: Any, **asked: Any) -> tuple[dict[str, Tensor], list[float]]:
    """The LoRA and the loss of every step; hosts differ in the node's inputs and outputs."""
    inputs = {i.id: getattr(i, "default", None) for i in TrainLoraNode.define_schema().inputs}
    inputs |= {
        "model": model,
        "positive": run.positive,
        "steps": STEPS,
        "learning_rate": 0.01,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "gradient_checkpointing": False,
        "existing_lora": "[None]",
    }
    torch.manual_seed(0)  # the node draws its noise levels from torch's generator
    lists = {name: [value] for name, value in (inputs | asked).items()}
    # 0.3.75 does not take a single latent.
    lists["latents"] = [{"samples": run.latent["samples"]}] * 2
    out = TrainLoraNode.execute(**lists)
    lora, losses, _ = out.result[-3:]
    return lora, losses["loss"]


def decode(nodes, run, model) -> Tensor:
    rest = (run.positive, run.negative, run.empty, 7, 3, 1.5, 1.0)
    return nodes["GLMImageDecode"].execute(model, *rest).result[0]["samples"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_loss_falls(run, dtype: str, checkpointing: bool) -> None:
    options = {"training_dtype": dtype, "gradient_checkpointing": checkpointing}
    _, losses = train(run.model, run, **options)
    _, untrained = train(run.model, run, **options, learning_rate=1e-7)
    assert len(losses) == STEPS
    # The same noise levels and noise, so that only what was learned differs.
    assert losses[0] == pytest.approx(untrained[0], rel=1e-5)
    assert sum(losses[-6:]) < 0.9 * sum(untrained[-6:])


def test_checkpointing_changes_no_gradient(run) -> None:
    (lora, losses), (checkpointed, others) = (
        train(run.model, run, gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert losses == pytest.approx(others, rel=1e-4)
    assert lora.keys() == checkpointed.keys()


def test_the_lora_changes_the_picture_and_loads_from_a_file(nodes, run, loras) -> None:
    before = decode(nodes, run, run.model)
    lora, _ = train(run.model, run)
    assert same(decode(nodes, run, run.model), before)

    by_host, _ = comfy.sd.load_lora_for_models(run.model, None, lora, 1.0, 0)
    changed = decode(nodes, run, by_host)
    assert relative_error(changed, before) > 1e-3

    save_file(lora, loras / "trained.safetensors")
    ours, _ = nodes["GLMImageLoadLora"].execute("trained.safetensors", 1.0, 1.0, run.model).result
    assert same(decode(nodes, run, ours), changed)


@pytest.mark.parametrize(
    ("dtype", "split", "message"),
    [
        ("int8", "", "^A LoRA cannot be trained on int8 or int4 weights; .* fp8_e4m3fn"),
        ("default", "cpu=0-0,cpu=1-1", "^A LoRA cannot be trained on a model that a device plan"),
    ],
    ids=["int8", "split"],
)
def test_what_cannot_be_trained_is_refused(nodes, run, dtype, split, message) -> None:
    plan, _ = planned(nodes, decoder_split=split)
    model = nodes["GLMImageLoadDecoder"].execute("small", dtype, plan).result[0]
    with pytest.raises(GLMImageError, match=message):
        train(model, run)


BYPASS = {"bypass_mode"} & {i.id for i in TrainLoraNode.define_schema().inputs}


@pytest.mark.skipif(not BYPASS, reason="this host has no bypass mode")
def test_bypass_mode_is_refused_for_the_embedding_alone(nodes, run) -> None:
    with pytest.raises(GLMImageError, match=r"takes the embedding .* with bypass_mode off, and"):
        train(run.model, run, bypass_mode=True)
    lora, _ = train(run.model, run)
    linear = {key: value for key, value in lora.items() if "prior_token_embedding" not in key}
    loaders = (comfy.sd.load_lora_for_models, comfy.sd.load_bypass_lora_for_models)
    weights, bypass = (load(run.model, None, linear, 1.0, 0)[0] for load in loaders)
    assert relative_error(decode(nodes, run, bypass), decode(nodes, run, weights)) < 1e-4
