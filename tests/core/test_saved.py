"""Files of other programs' save nodes: components under prefixes, each with a tensor of configs."""

import json
from pathlib import Path

import pytest
import torch
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files.opening import open_component
from glm_image.glm_core.files.saved import config_tensor, read_parts
from reference import reference_snapshot
from safetensors.torch import save_file
from torch import Tensor

CONFIG = "glm_image_config"
PREFIXES = {
    "decoder": "model.diffusion_model.",
    "glyph": "cond_stage_model.transformer.",
    "vae": "first_stage_model.",
}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("snapshot")
    reference_snapshot(folder, "small")
    return folder


def tensors(snapshot: Path, component: str, prefix: str) -> dict[str, Tensor]:
    opened = open_component(snapshot, component)
    config = f"{prefix.removesuffix('transformer.')}{CONFIG}"
    state = {prefix + key: value.clone() for key, value in opened.state_dict().items()}
    return {**state, config: config_tensor(opened)}


def test_one_file_holds_several_components(snapshot, tmp_path) -> None:
    file, state = tmp_path / "whole.safetensors", {"model_ema.decay": torch.zeros(1)}
    for component, prefix in PREFIXES.items():
        state |= tensors(snapshot, component, prefix)
    save_file(state, file, {"format": "pt", "prompt": "{}"})
    assert read_parts(file).keys() == PREFIXES.keys()
    for component in PREFIXES:
        ours, original = open_component(file, component), open_component(snapshot, component)
        assert (ours.config, ours.scheduler, ours.vae) == (
            original.config,
            original.scheduler,
            original.vae,
        )
        state, expected = ours.state_dict(), original.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    with pytest.raises(GLMImageError, match=r"holds the .* and the .*, not the AR model; choose"):
        open_component(file, "ar")


def test_prefixes_may_be_any(snapshot, tmp_path) -> None:
    for number, prefix in enumerate(("", "vae.", "a.b.")):
        file = tmp_path / f"{number}.safetensors"
        save_file(tensors(snapshot, "vae", prefix), file)
        assert open_component(file, "vae").tensors.keys() == (
            open_component(snapshot, "vae").tensors.keys()
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"{", "glm_image_config in .* is not valid JSON"),
        (b"[]", "glm_image_config in .* is not a JSON object"),
        (b"\xff\xfe", "glm_image_config in .* is not valid JSON"),
        (b'{"component": "vae"}', "has no 'config' in its metadata"),
        (b'{"component": "vae", "config": 3}', "has no 'config' in its metadata"),
        (b'{"component": ["x"], "config": {}}', r"holds the component '\['x'\]', not the VAE"),
        (b" " * (2 << 20), "glm_image_config in .* is broken; save the file again"),
    ],
    ids=["cut", "list", "no text", "no config", "number", "no name", "too long"],
)
def test_a_broken_config_is_one_sentence(tmp_path, config: bytes, message: str) -> None:
    file = tmp_path / "broken.safetensors"
    state = {"w": torch.zeros(1), CONFIG: torch.tensor(list(config), dtype=torch.uint8)}
    save_file(state, file)
    with pytest.raises(GLMImageError, match=message):
        open_component(file, "vae")


def test_another_dtype_is_refused(tmp_path) -> None:
    file = tmp_path / "broken.safetensors"
    save_file({"w": torch.zeros(1), CONFIG: torch.zeros(9)}, file)
    with pytest.raises(GLMImageError, match=r"glm_image_config in .* is broken; save the file"):
        open_component(file, "vae")


def test_the_config_of_another_model_is_refused(snapshot, tmp_path) -> None:
    file = tmp_path / "other.safetensors"
    content = json.dumps({"component": "vae", "config": {"_class_name": "Other"}}).encode()
    config = {CONFIG: torch.tensor(list(content), dtype=torch.uint8)}
    save_file(tensors(snapshot, "vae", "") | config, file)
    with pytest.raises(GLMImageError, match="does not belong to GLM-Image's VAE"):
        open_component(file, "vae")
