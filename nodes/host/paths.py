"""Finds checkpoints: snapshot folders in models/glm_image, single files in ComfyUI's folders."""

import os
from functools import lru_cache
from pathlib import Path

import folder_paths

from ...glm_core.convert import MODEL_FOLDERS
from ...glm_core.errors import GLMImageError
from ...glm_core.files.component import COMPONENTS, FORMAT
from ...glm_core.files.headers import read_metadata

SNAPSHOTS = "glm_image"


def register() -> None:
    """Adds models/glm_image to ComfyUI's folders, beside those of extra_model_paths.yaml."""
    folder_paths.add_model_folder_path(
        SNAPSHOTS, os.path.join(folder_paths.models_dir, SNAPSHOTS), is_default=True
    )


def model_names(component: str) -> list[str]:
    """Names of snapshot folders that hold the component, then of single files of it."""
    parts = _snapshot_parts(COMPONENTS[component].folder)
    snapshots = sorted({path.parent.name for path in parts})
    folder = MODEL_FOLDERS[component]
    files = folder_paths.get_filename_list(folder)
    paths = {name: folder_paths.get_full_path(folder, name) for name in files}
    return snapshots + [
        name for name, path in paths.items() if path and _component_in(Path(path)) == component
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
    file = folder_paths.get_full_path(MODEL_FOLDERS[component], name) if name else None
    if file is not None:
        return Path(file)
    names = model_names(component)
    known = f"installed are: {', '.join(names)}" if names else "none is installed"
    raise GLMImageError(
        f"No {kind.title} is called '{name}' ({known}); put a snapshot of zai-org/GLM-Image into "
        f"models/{SNAPSHOTS}/<name>/ or a single file into models/{MODEL_FOLDERS[component]}/."
    )


def _component_in(file: Path) -> str | None:
    """The component in a single file of GLM-Image, None for any other file."""
    if file.suffix != ".safetensors":
        return None
    try:
        return _read_component(file, file.stat().st_mtime_ns)
    except (GLMImageError, OSError):
        return None


@lru_cache(maxsize=1024)
def _read_component(file: Path, modified_ns: int) -> str | None:
    """`modified_ns` is part of the cache's key, so that a changed file is read again."""
    metadata = read_metadata(file, FORMAT)
    return metadata.get("component") if metadata.get("format") == FORMAT else None


def _children(root: Path) -> set[str]:
    return set(os.listdir(root)) if root.is_dir() else set()


def _snapshot_parts(folder: str) -> list[Path]:
    roots = [Path(root) for root in folder_paths.get_folder_paths(SNAPSHOTS)]
    return [part for root in roots if root.is_dir() for part in root.glob(f"*/{folder}")]
