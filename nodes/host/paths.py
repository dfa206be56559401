"""Finds checkpoints: snapshot folders in models/glm_image, single files in ComfyUI's folders."""

import logging
import os
from pathlib import Path

import folder_paths

from ...glm_core.convert import MODEL_FOLDERS
from ...glm_core.errors import FileError, InputError, first_few, shown
from ...glm_core.files.component import COMPONENTS
from ...glm_core.files.listing import list_folder
from ...glm_core.files.model_folder import components_in, find_component, places
from .snapshots import find_snapshots

log = logging.getLogger(__name__)

SNAPSHOTS = "glm_image"
CHECKPOINTS = "checkpoints"
"""ComfyUI's folder for files of several components, where Save Checkpoint writes them."""
COMPANIONS = {"ar": ("processor",), "decoder": ("scheduler", "vae")}
"""Folders of a snapshot that a component is loaded with, beside its own."""
MAX_NAMES = 20  # that a sentence lists


def register() -> None:
    """Adds models/glm_image to ComfyUI's folders, beside those of extra_model_paths.yaml."""
    folder_paths.add_model_folder_path(
        SNAPSHOTS, os.path.join(folder_paths.models_dir, SNAPSHOTS), is_default=True
    )


def model_names(component: str) -> list[str]:
    """Names of snapshot folders that hold the component, then of single files of it."""
    snapshots = sorted(name for name, path in _snapshots().items() if places(path, component))
    files = dict.fromkeys(
        name
        for folder in (MODEL_FOLDERS[component], CHECKPOINTS)
        for name in folder_paths.get_filename_list(folder)
    )
    return snapshots + [
        name for name in files if _holding(component, _single_files(component, name))
    ]


def checkpoint_names() -> list[str]:
    """The names under which every component is found."""
    first, *others = (model_names(component) for component in COMPONENTS)
    return [name for name in first if all(name in names for names in others)]


def find_model(
    component: str, name: str, weight_dtype: str = "default", *, tell: bool = False
) -> Path:
    """The snapshot folder or the single file of a loader's `model_name`.

    Args:
        weight_dtype: chooses among several files in one folder.
        tell: log which file is loaded where a folder holds the component more than once.

    Raises:
        GLMImageError: none has that name, or several files do.
    """
    place = find_place(component, name)
    if not place.is_dir():
        return place
    found = find_component(place, component, weight_dtype)
    if tell:
        _tell(component, place, found)
    return found


def find_place(component: str, name: str) -> Path:
    """The model's folder or the single file of that name.

    Raises:
        GLMImageError: none has that name; says where to put one.
    """
    kind, snapshots = COMPONENTS[component], _snapshots()
    for spelling in spellings("model_name", name):
        snapshot = snapshots.get(spelling) or _child(spelling)
        if snapshot is not None:
            return snapshot
        files = _single_files(component, spelling) if spelling else []
        if files:
            return next(iter(_holding(component, files) or files))
    names = model_names(component)
    known = f"installed are: {first_few(names, MAX_NAMES)}" if names else "none is installed"
    raise FileError(
        f"No {kind.title} is called '{shown(name)}' ({known}); put a snapshot of zai-org/GLM-Image "
        f"into models/{SNAPSHOTS}/<name>/ or a single file into models/{MODEL_FOLDERS[component]}/."
    )


def _tell(component: str, snapshot: Path, found: Path) -> None:
    kind = COMPONENTS[component]
    loaded = snapshot / kind.folder if found == snapshot else found
    others = [place.name for place in places(snapshot, component) if place != loaded]
    if others:
        log.info(
            "GLM-Image: the %s is loaded from %s; %s in the same folder is not used.",
            *(kind.title, loaded, " and ".join(others)),
        )


def model_stamp(name: str, component: str, weight_dtype: str) -> str:
    """Changes when a file changes that a loader would load.

    Raises:
        GLMImageError: as `find_model`.
    """
    path = find_model(component, name, weight_dtype)
    files = [path]
    if path.is_dir():
        parts = (COMPONENTS[component].folder, *COMPANIONS.get(component, ()))
        files = [file for part in parts for file in list_folder(path / part).files]
    return " ".join(map(stamp, files))


def stamp(file: Path) -> str:
    """Changes when the file does."""
    try:
        stat = file.stat()
    except OSError:  # a link to nowhere
        return str(file)
    return f"{file} {stat.st_size} {stat.st_mtime_ns}"


def spellings(input_name: str, name: object) -> list[str]:
    """A file's name as a graph has it, then with backslashes and with `/` between its folders.

    Raises:
        GLMImageError: it is no text.
    """
    if not isinstance(name, str):
        raise InputError(f"{input_name} is {shown(name)} and not a name; choose one from the list.")
    return list(dict.fromkeys((name, name.replace("/", "\\"), name.replace("\\", "/"))))


def as_listed(input_name: str, name: object, names: list[str]) -> str | None:
    """The name as a list has it, whichever slashes either has; None if it is not in the list.

    Raises:
        GLMImageError: it is no text.
    """
    if name in names:
        return name
    plain = spellings(input_name, name)[0].replace("\\", "/")
    return next((listed for listed in names if listed.replace("\\", "/") == plain), None)


def _single_files(component: str, name: str) -> list[Path]:
    """The files of that name in the folders of a component."""
    folders = (MODEL_FOLDERS[component], CHECKPOINTS)
    paths = (folder_paths.get_full_path(folder, name) for folder in folders)
    return [Path(path) for path in paths if path]


def _holding(component: str, files: list[Path]) -> list[Path]:
    return [file for file in files if component in components_in(file)]


def _snapshots() -> dict[str, Path]:
    return find_snapshots(folder_paths.get_folder_paths(SNAPSHOTS))


def _child(name: str) -> Path | None:
    """A folder right below a root that is no snapshot; opening it says what is missing."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(SNAPSHOTS)]
    children = (root / name for root in roots if root.is_dir() and name in os.listdir(root))
    return next((child for child in children if child.is_dir()), None)
