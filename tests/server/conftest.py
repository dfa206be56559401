"""One real ComfyUI server for all tests of this folder, with small random models."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from glm_image.scripts import environment, host
from glm_image.scripts.client import Client, Prompt
from graphs import MODEL
from pictures import first_image
from reference import reference_snapshot
from safetensors.torch import load_file, save_file

Picture = Callable[[Prompt], np.ndarray]


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """ComfyUI's base folder: two random models of different codebooks, and broken ones."""
    folder = host.make_base(tmp_path_factory.mktemp("comfyui"))
    models = folder / "models"
    good = models / "glm_image" / MODEL
    reference_snapshot(good, "small")
    reference_snapshot(models / "glm_image" / "Wide", "wide")
    _write_broken_models(models, good)
    _write_foreign_models(models)
    _write_dead_links(folder)
    _write_loras(models / "loras", good)
    return folder


@pytest.fixture(scope="session")
def client(base: Path) -> Iterator[Client]:
    with host.serve(environment.host(), base, threads=1) as address:
        yield Client(address, timeout_s=120)


@pytest.fixture
def picture(client: Client) -> Picture:
    """Runs a prompt and returns the image of its SaveImage: [height, width, 3], 0 to 255."""

    def run(prompt: Prompt) -> np.ndarray:
        return first_image(client, client.run(prompt), prompt)

    return run


def _write_broken_models(models: Path, good: Path) -> None:
    no_decoder = models / "glm_image" / "No-Decoder"
    shutil.copytree(good, no_decoder, ignore=shutil.ignore_patterns("transformer"))
    truncated = models / "glm_image" / "Truncated"
    shutil.copytree(good, truncated)
    (weights,) = (truncated / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])


def _write_foreign_models(models: Path) -> None:
    """Tiny files that ComfyUI takes for a Wan 2.1 and a CLIP-L; missing weights stay random."""
    for name in ("diffusion_models", "text_encoders"):
        (models / name).mkdir(exist_ok=True)
    wan = {
        "head.modulation": (1, 2, 128),
        "head.head.weight": (64, 128),
        "patch_embedding.weight": (128, 16, 1, 2, 2),
        "blocks.0.ffn.0.weight": (64, 128),
    }
    clip = {"text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768)}
    for file, shapes in (("diffusion_models/wan", wan), ("text_encoders/clip_l", clip)):
        tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
        save_file(tensors, models / f"{file}.safetensors")


def _write_dead_links(base: Path) -> None:
    """Links as an unmounted drive leaves them; the pack lists these folders at import."""
    for folder in ("models/diffusion_models", "models/vae", "input", "output"):
        (base / folder).mkdir(parents=True, exist_ok=True)
        (base / folder / "dead.safetensors").symlink_to("/nowhere/dead.safetensors")


def _write_loras(loras: Path, good: Path) -> None:
    """Rank-2 LoRAs on the first block's query: with native, PEFT's and unknown names."""
    generator = torch.Generator().manual_seed(3)
    decoder = _lora(good / "transformer", "transformer_blocks.0.attn1.to_q", generator)
    ar = _lora(
        good / "vision_language_encoder",
        "model.language_model.layers.0.self_attn.q_proj",
        generator,
    )
    save_file(
        {f"diffusion_model.{key}": value for key, value in decoder.items()},
        loras / "native.safetensors",
    )
    save_file(
        {f"transformer.{key}": value for key, value in decoder.items()}, loras / "peft.safetensors"
    )
    save_file(ar, loras / "ar.safetensors")
    save_file(
        {f"unet.alien.{key}": value for key, value in decoder.items()}, loras / "alien.safetensors"
    )


def _lora(component: Path, layer: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    (file,) = component.glob("*.safetensors")
    rows, columns = load_file(file)[f"{layer}.weight"].shape
    return {
        f"{layer}.lora_A.weight": torch.randn(2, columns, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(rows, 2, generator=generator),
    }
