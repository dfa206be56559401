"""Finds checkpoints: snapshot folders in models/glm_image, single files in ComfyUI's folders."""

import os
from functools import lru_cache
from pathlib import Path

import folder_paths

from ...glm_core.convert import MODEL_FOLDERS
from ...glm_core.errors import GLMImageError
from ...glm_core.files.component import COMPONENTS
from ...glm_core.files.saved import read_parts

SNAPSHOTS = "glm_image"
CHECKPOINTS = "checkpoints"
"""ComfyUI's folder for files of several components, where Save Checkpoint writes them."""


def register() -> None:
    """Adds models/glm_image to ComfyUI's folders, beside those of extra_model_paths.yaml."""
    folder_paths.add_model_folder_path(
        SNAPSHOTS, os.path.join(folder_paths.models_dir, SNAPSHOTS), is_default=True
    )


def model_names(component: str) -> list[str]:
    """Names of snapshot folders that hold the component, then of single files of it."""
    parts = _snapshot_parts(COMPONENTS[component].folder)
    snapshots = sorted({path.parent.name for path in parts})
    files = dict.fromkeys(
        name
        for folder in (MODEL_FOLDERS[component], CHECKPOINTS)
        for name in folder_paths.get_filename_list(folder)
    )
    return snapshots + [
        name for name in files if _holding(component, _single_files(component, name))
    ]


def find_model(component: str, name: str) -> Path:
    """The snapshot folder or the single file of a loader's `model_name`.

    Raises:
        GLMImageError: none has that name; says where to put one.
    """
    kind = COMPONENTS[component]
    for root in folder_paths.get_folder_paths(SNAPSHOTS):
        snapshot = Path(root) / name
        if name in _children(Path(root)) and snapshot.is_dir():
            return snapshot
    files = _single_files(component, name) if name else []
    if files:
        return next(iter(_holding(component, files) or files))
    names = model_names(component)
    known = f"installed are: {', '.join(names)}" if names else "none is installed"
    raise GLMImageError(
        f"No {kind.title} is called '{name}' ({known}); put a snapshot of zai-org/GLM-Image into "
        f"models/{SNAPSHOTS}/<name>/ or a single file into models/{MODEL_FOLDERS[component]}/."
    )


def _single_files(component: str, name: str) -> list[Path]:
    """The files of that name in the folders of a component."""
    folders = (MODEL_FOLDERS[component], CHECKPOINTS)
    paths = (folder_paths.get_full_path(folder, name) for folder in folders)
    return [Path(path) for path in paths if path]


def _holding(component: str, files: list[Path]) -> list[Path]:
    return [file for file in files if component in _components_in(file)]


def _components_in(file: Path) -> frozenset[str]:
    """The components in a single file of GLM-Image; none in any other file."""
    if file.suffix != ".safetensors":
        return frozenset()
    return _read_components(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _read_components(file: Path, modified_ns: int) -> frozenset[str]:
    """`modified_ns` is part of the cache's key, so that a changed file is read again."""
    try:
        return frozenset(read_parts(file))
    except (GLMImageError, OSError):
        return frozenset()


def _children(root: Path) -> set[str]:
    return set(os.listdir(root)) if root.is_dir() else set()


def _snapshot_parts(folder: str) -> list[Path]:
    roots = [Path(root) for root in folder_paths.get_folder_paths(SNAPSHOTS)]
    return [part for root in roots if root.is_dir() for part in root.glob(f"*/{folder}")]
