"""Where checkpoints lie: snapshot folders under models/glm_image, single files where they go."""

import os
from functools import lru_cache
from pathlib import Path

import folder_paths

from ...glm_core.convert import MODEL_FOLDERS
from ...glm_core.errors import GLMImageError
from ...glm_core.files.component import COMPONENTS, FORMAT
from ...glm_core.files.headers import read_header

SNAPSHOTS = "glm_image"


def register() -> None:
    """Add models/glm_image to ComfyUI's folders, beside those of extra_model_paths.yaml."""
    folder_paths.add_model_folder_path(
        SNAPSHOTS, os.path.join(folder_paths.models_dir, SNAPSHOTS), is_default=True
    )


def model_names(component: str) -> list[str]:
    """Snapshot folders that hold the component, then single files whose metadata says so."""
    folder = COMPONENTS[component].folder
    snapshots = sorted({path.parent.name for path in _snapshot_parts(folder)})
    folder = MODEL_FOLDERS[component]
    files = folder_paths.get_filename_list(folder)
    paths = {name: folder_paths.get_full_path(folder, name) for name in files}
    return snapshots + [
        name for name, path in paths.items() if path and _holds(Path(path)) == component
    ]


def find_model(component: str, name: str) -> Path:
    """The snapshot folder or the file that a loader's `model_name` means.

    Raises:
        GLMImageError: there is none of that name; says where to put one.
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


def _holds(file: Path) -> str | None:
    """The component in a single file of ours, None for any other file."""
    return _component_of(file, file.stat().st_mtime_ns) if file.suffix == ".safetensors" else None


@lru_cache(maxsize=1024)
def _component_of(file: Path, changed: int) -> str | None:
    """Reads the header once for each state of a file; `changed` is its time of modification."""
    try:
        metadata = read_header(file)[1]
    except (GLMImageError, OSError):
        return None
    return metadata.get("component") if metadata.get("format") == FORMAT else None


def _children(root: Path) -> set[str]:
    return set(os.listdir(root)) if root.is_dir() else set()


def _snapshot_parts(folder: str) -> list[Path]:
    roots = [Path(root) for root in folder_paths.get_folder_paths(SNAPSHOTS)]
    return [part for root in roots if root.is_dir() for part in root.glob(f"*/{folder}")]
