"""A model's folder: a hub snapshot's subfolders, single files of components, or both.

A single file is known by its header, whatever its name. Where a component lies in the folder twice,
the single file is loaded: somebody has converted it in order to load it.
"""

from functools import lru_cache
from pathlib import Path

from ..errors import FileError, GLMImageError, shown
from .component import COMPONENTS, FORMAT
from .headers import mentions
from .listing import list_folder
from .opening import open_component
from .quantisation import LAYER_FORMATS
from .saved import CONFIG, read_parts
from .weight_dtypes import stored_format

MAX_FILES = 50
"""Files of a folder whose headers are read."""
SUFFIX = ".safetensors"


def components_in(file: Path) -> frozenset[str]:
    """The components in a single file of GLM-Image; none in any other file.

    A truncated file is one too: opening it says what is wrong.
    """
    if file.suffix.lower() != SUFFIX:
        return frozenset()
    try:
        return _read_components(file, file.stat().st_mtime_ns)
    except OSError:
        return frozenset()


@lru_cache(maxsize=4096)
def _read_components(file: Path, modified_ns: int) -> frozenset[str]:
    """`modified_ns` is part of the cache's key, so that a changed file is read again."""
    try:
        ours = mentions(file, FORMAT, CONFIG)
        return frozenset(read_parts(file, whole=False)) & COMPONENTS.keys() if ours else frozenset()
    except GLMImageError:
        return frozenset()


def weight_files(files: list[Path]) -> list[Path]:
    """Those whose headers may be read: the first `MAX_FILES` safetensors files."""
    return [file for file in files if file.suffix.lower() == SUFFIX][:MAX_FILES]


def single_files(folder: Path, component: str) -> list[Path]:
    """The single files in a folder that hold a component."""
    files = weight_files(list_folder(folder).files)
    return [file for file in files if component in components_in(file)]


def places(folder: Path, component: str) -> list[Path]:
    """The single files and the subfolder in which a component lies."""
    subfolder = folder / COMPONENTS[component].folder
    return single_files(folder, component) + [subfolder] * subfolder.is_dir()


def find_component(folder: Path, component: str, weight_dtype: str = "default") -> Path:
    """What `open_component` is to open for a model's folder: a single file, or the folder itself.

    Args:
        weight_dtype: how the AR model or the decoder is to be loaded. A file in another quantised
            format cannot give it, so another file or the snapshot does.

    Raises:
        GLMImageError: several files will do.
    """
    kind, files = COMPONENTS[component], single_files(folder, component)
    weight_dtype = weight_dtype if kind.quantisable else "default"
    if not files or (len(files) == 1 and weight_dtype == "default"):
        return files[0] if files else folder
    formats = {file: stored_format(open_component(file, component)) for file in files}
    fitting = [file for file in files if weight_dtype in ("default", formats[file])]
    fitting = fitting or [file for file in files if formats[file] not in LAYER_FORMATS]
    if len(fitting) > 1:
        found = " and ".join(f"{shown(file.name)} ({formats[file]})" for file in fitting)
        choose = "set weight_dtype to the format to load, or " * kind.quantisable
        raise FileError(
            f"{folder} holds the {kind.title} {len(fitting)} times, in {found}; "
            f"{choose}move all but one to other folders."
        )
    has_snapshot = (folder / kind.folder).is_dir()
    return fitting[0] if fitting else folder if has_snapshot else files[0]
