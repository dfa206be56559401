"""Makes the pack importable as `glm_image`, as ComfyUI imports it: by path, not by `sys.path`."""

import importlib.util
import sys
from pathlib import Path

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
torch.set_num_threads(1)  # the nets are tiny: more threads would wait longer than they work


def pytest_collection_modifyitems(items: list) -> None:
    """The file that takes longest comes first, lest one process works at it alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_meaning.py")
