"""Imports the pack as `glm_image` by its path, as ComfyUI does, without `sys.path`."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which other packages may do

import torch

ROOT = Path(__file__).resolve().parent.parent


def _import_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        "glm_image", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["glm_image"] = module
    spec.loader.exec_module(module)


_import_pack()
torch.set_grad_enabled(False)
torch.set_num_threads(1)  # with networks this small, more threads are slower


def pytest_collection_modifyitems(items: list) -> None:
    """Starts the slowest file first, so that no process runs it alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_meaning.py")
