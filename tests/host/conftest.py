"""ComfyUI's own modules in this process, on the CPU, with random reference models to load."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from glm_image.scripts import environment
from reference import SHAPES, reference_snapshot
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(environment.host().path))

from comfy.cli_args import args

args.cpu = True  # before anything asks for a device

import folder_paths  # noqa: E402


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory) -> dict:
    """The reference pipeline of every shape, its snapshot in models/glm_image under its name."""
    base = tmp_path_factory.mktemp("base")
    folder_paths.models_dir = str(base / "models")
    folder_paths.set_output_directory(str(base / "output"))
    folder_paths.set_input_directory(str(base / "input"))
    folder_paths.set_temp_directory(str(base / "temp"))
    folder_paths.add_model_folder_path("glm_image", str(base / "models" / "glm_image"))
    for folder in ("output", "input", "models/loras"):
        (base / folder).mkdir(parents=True)
    folder_paths.add_model_folder_path("loras", str(base / "models" / "loras"))
    return {name: reference_snapshot(base / "models" / "glm_image" / name, name) for name in SHAPES}


@pytest.fixture(scope="session")
def nodes(pipelines) -> dict:
    """Node classes of the pack by id."""
    pack = importlib.import_module("glm_image.nodes")
    return {node.define_schema().node_id: node for node in pack.NODES}


@pytest.fixture
def loras(pipelines) -> Path:
    return Path(folder_paths.models_dir) / "loras"


@pytest.fixture(scope="module")
def models(nodes):
    """The decoder's patcher and the AR, small."""
    return tuple(
        nodes[f"GLMImageLoad{kind}"].execute("small", "default").result[0]
        for kind in ("Decoder", "AR")
    )


@pytest.fixture
def normal():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator) * 0.3


@pytest.fixture
def apply(nodes, models, loras):
    """Applies a file to both models with a strength; gives their patchers."""

    def apply(tensors: dict[str, Tensor], metadata: dict | None = None, strength: float = 1.0):
        save_file(
            {key: value.contiguous().clone() for key, value in tensors.items()},
            loras / "kind.safetensors",
            metadata and {"lora_adapter_metadata": json.dumps(metadata)},
        )
        load_lora = nodes["GLMImageLoadLora"].execute
        decoder, ar = load_lora("kind.safetensors", strength, strength, *models).result
        return {"decoder": decoder, "ar": ar.patcher}

    return apply
