"""ComfyUI's own modules in this process, on the CPU, with random reference models to load."""

import importlib
import sys
from pathlib import Path

import pytest
from glm_image.scripts import environment
from reference import SHAPES, reference_snapshot

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
