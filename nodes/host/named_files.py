"""Files of ComfyUI's input, output and temp folder, by the names that graphs have for them."""

import os
from pathlib import Path

import folder_paths

from ...glm_core.errors import FileError, shown
from .paths import spellings


def find_file(input_name: str, name: object, remedy: str) -> Path | None:
    """The path of `name`, a file in the input folder, or of `name [output]` or `name [temp]`.

    None if there is none. Folders are separated as on any system.

    Args:
        remedy: what to do about a name that leads out of the folder.

    Raises:
        GLMImageError: the name leads out of the folder, or is no text.
    """
    for spelling in spellings(input_name, name):
        plain, folder = folder_paths.annotated_filepath(spelling)
        root = os.path.abspath(folder or folder_paths.get_input_directory())
        path = inside(root, plain)
        if path is None:
            raise FileError(
                f"{input_name} is '{shown(name)}', which lies outside the {Path(root).name} "
                f"folder; {remedy}."
            )
        if os.path.isfile(path):  # False also for names that no file can have
            return path
    return None


def inside(root: str, name: str) -> Path | None:
    """The path of a name below a folder, None if it leads out of it.

    It is not resolved, as links may lead out of the folder.
    """
    path = Path(os.path.abspath(os.path.join(root, name)))
    return path if path.is_relative_to(root) else None
